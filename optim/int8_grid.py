"""Weights as whole numbers of 8 bits on a grid of their own for every group of neighbours in a row.

    w = low + q s,  q in 0..255,  s about (max - min) / 255
`low` is the group's minimum: the zero-point z = -low / s of Q-GaLore's w = (q - z) s, signed and without rounding. So
both ends of the range are on the grid, a group of one sign wastes none of it, and rounding up or down never leaves it:
stochastic rounding is unbiased for every value, the largest and smallest too. (Where z is rounded and cut to 0..255,
as in q-galore-torch, it is not: they are pushed inwards, and a group of one sign saturates.)

s is rounded up to 14 significant bits and `low` down to a multiple of 2^-13 of s's power of two. Then low + q s is
exact in fp32 (for |low| up to 1000 s), and the grid found from values on a grid whose ends are in use is that grid, bit
for bit: a weight that takes no update does not change.
Bytes of an (m, n) matrix: m (n + 8 ceil(n / group)).
Paper: Zhang et al. 2024, arXiv:2407.08296, section 3.1.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from optim.rounding import keyed_bits

LEVELS = 255
SMALLEST = 2.0**-100
"""Least scale, of a group of equal values."""
DROPPED = 10
"""Low bits of fp32's mantissa (24 with the leading one) that a scale does not use."""
EXACT = 2.0**24
"""Whole numbers below this are exact in fp32."""


def stored_bytes(shape: Sequence[int], group: int) -> int:
    """Bytes of an (m, n) matrix: codes, and scale and low of each group in fp32."""
    return shape[0] * (shape[1] + 8 * groups_of(shape[1], group))


def groups_of(width: int, group: int) -> int:
    """Groups of a row; the last may be shorter."""
    return -(-width // group)


def grid_of(least: Tensor, most: Tensor) -> tuple[Tensor, Tensor]:
    """(scale, low), fp32, of groups with these ends."""
    scale = ((most - least) / LEVELS).clamp_(min=SMALLEST)
    for _ in range(2):  # again, in case the rounding of the first scale has led over a power of two
        unit = (scale.view(torch.int32) & 0x7F800000).view(torch.float32).mul_(2.0 ** (DROPPED - 23))
        steps = least / unit
        low = torch.where(steps.abs() < EXACT, steps.floor() * unit, least)
        scale = _rounded_up(((most - low) / LEVELS).clamp_(min=SMALLEST))
    return scale, low


def _rounded_up(scale: Tensor) -> Tensor:
    return ((scale.view(torch.int32) + ((1 << DROPPED) - 1)) & -(1 << DROPPED)).view(torch.float32)


def decode(codes: Tensor, scale: Tensor, low: Tensor, group: int, out: Tensor) -> Tensor:
    """Write low + q s into `out` (m, n), computed in fp32 by chunks of rows and rounded once to the dtype of `out`."""
    for rows in _chunks(codes):
        wide = codes[rows].float()
        for own, part in _grouped(wide, group):
            part.mul_(scale[rows, own, None]).add_(low[rows, own, None])
        out[rows].copy_(wide)
    return out


def encode_(
    codes: Tensor, scale: Tensor, low: Tensor, group: int, values: Tensor, seed: int | None = None, first: int = 0
) -> None:
    """Find the grid of each group of `values` (m, n) and write codes, scale and low in place.

    Args:
        seed: of the parameter and step, for rounding up or down with the odds that make the mean exact; without one,
            to the nearest.
        first: flat index of the first value in the parameter (`optim.rounding.keyed_bits`).
    """
    width = codes.shape[1]
    for rows in _chunks(codes):
        wide = values[rows].to(torch.float32, copy=True, memory_format=torch.contiguous_format)
        for own, part in _grouped(wide, group):
            scale[rows, own], low[rows, own] = found = grid_of(part.amin(-1), part.amax(-1))
            part.sub_(found[1].unsqueeze(-1)).div_(found[0].unsqueeze(-1)).clamp_(0, LEVELS)
        if seed is None:
            wide.round_()
        else:
            draws = keyed_bits(seed, wide.shape, wide.device, first + rows.start * width)
            below = wide.floor()
            # 24 bits, as many as fp32 can tell apart; what is on the grid has no remainder and stays
            wide = below.add_(draws.bitwise_and_((1 << 24) - 1) < wide.sub_(below).mul_(2.0**24))
        codes[rows].copy_(wide)


def _grouped(matrix: Tensor, group: int) -> Iterator[tuple[slice, Tensor]]:
    """Views (rows, groups, values) of a contiguous matrix, with the groups they are: the full ones, then the rest."""
    full = matrix.shape[1] // group
    if full:
        yield slice(0, full), matrix[:, : full * group].view(matrix.shape[0], full, group)
    if full * group < matrix.shape[1]:
        yield slice(full, full + 1), matrix[:, full * group :].unsqueeze(1)


def _chunks(codes: Tensor) -> Iterator[slice]:
    """Slices of whole rows: what a CPU's cache holds in fp32, or 16 MiB where each step is a kernel to launch."""
    rows = max((2**17 if codes.device.type == "cpu" else 2**22) // max(codes.shape[1], 1), 1)
    for start in range(0, codes.shape[0], rows):
        yield slice(start, min(start + rows, codes.shape[0]))
