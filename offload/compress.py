"""Activations as 8-bit codes: FP8 (E4M3) or integers, with a scale for each group of neighbours or for all.

For a group g of G values, in the order they lie in memory:

    s = bf16((max |x_g| + 1e-10) / top)        top: 448 for E4M3, 127 for integers
    code = round(clamp(x / s, -top, top))      divided by the scale as it is stored, so that the largest maps to top
    x' = code s

COAT (Xi et al. 2024, arXiv:2410.19313): G = 16 for the inputs of norms, activations and products, one scale for the
whole input of a linear layer. Groups lie within a row, a token's values, and the last of a row is shorter where G does
not divide it: so what a token becomes does not depend on the tokens beside it. An infinite value makes its group NaN,
and a NaN stays one: E4M3 on CPU would saturate both without a word, and the step's finite check is to see them.
COAT's own count of a LLaMA block is 13.96 bf16 hidden states with scales (r = 8/3); here it is 11.96, and less with
gated products that save gate and up alone (`offload.lean`). The 2 are COAT's rotary embeddings, for which it counts q
and k before they are turned: torch keeps of a turn only the tables that all blocks share.
Bytes per value: 1 + 2/G, a little more where G does not divide the row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

E4M3_TOP = 448.0
INT8_TOP = 127.0
FP8_GROUP = 16
INT8_GROUP = 64
PIECE = 2**20
"""Values encoded or decoded at a time: what is wide in between stays at 4 MiB."""


@dataclass(frozen=True)
class Codes:
    """Values as codes."""

    codes: Tensor
    """(n,) float8_e4m3fn or int8."""
    scales: Tensor
    """(groups,) bf16."""
    group: int
    """Values that share a scale, the last group of a row maybe fewer; 0: all do."""
    row: int
    """Values in a row."""
    dtype: torch.dtype
    """What the values were."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def encode(values: Tensor, *, integers: bool, group: int, row: int = 0) -> Codes:
    """Encode (n,) values of a floating dtype, which are n / `row` rows (0: one)."""
    count = values.numel()
    row = row or max(count, 1)
    assert count % row == 0, f"{count} values are no rows of {row}"
    top = INT8_TOP if integers else E4M3_TOP
    codes = torch.empty(count, dtype=torch.int8 if integers else torch.float8_e4m3fn, device=values.device)
    scales = torch.empty(groups_in(count, group, row), dtype=torch.bfloat16, device=values.device)
    if not group:
        scales.copy_(scale(largest(values), top))
    for begin, end in pieces(count, group, row):
        part = values[begin:end].float()
        if group:
            own = slice(groups_in(begin, group, row), groups_in(end, group, row))
            scales[own] = scale(by_group(part.abs(), group, row).amax(1), top)
            part = spread(part, scales[own].float().reciprocal(), group, row)
        else:
            part = part / scales.float()
        part = part.clamp_(-top, top)
        codes[begin:end] = part.round_().to(torch.int8) if integers else part.to(torch.float8_e4m3fn)
    return Codes(codes, scales, group, row, values.dtype)


def decode(coded: Codes) -> Tensor:
    """Return the (n,) values, in their dtype."""
    count, group, row = coded.codes.numel(), coded.group, coded.row
    values = torch.empty(count, dtype=coded.dtype, device=coded.codes.device)
    for begin, end in pieces(count, group, row):
        part = wide(coded.codes[begin:end])
        if group:
            own = slice(groups_in(begin, group, row), groups_in(end, group, row))
            values[begin:end] = spread(part, coded.scales[own].float(), group, row)
        else:
            values[begin:end] = part * coded.scales.float()
    return values


def wide(codes: Tensor) -> Tensor:
    """(n,) fp32 values of codes; FP8 on a CPU by a table, as torch's cast there works out each value by itself."""
    if codes.device.type != "cpu" or codes.dtype is torch.int8:
        return codes.float()
    # made for each call, in microseconds: one that is kept is a kilobyte that a plan on fake tensors does not hold
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return torch.index_select(table, 0, codes.view(torch.uint8).int())


def groups_in(count: int, group: int, row: int) -> int:
    """Scales of `count` values: of whole rows, or where G divides a row of whole groups."""
    return (count // row * -(-row // group) + count % row // group) if group else 1


def pieces(count: int, group: int, row: int) -> Iterator[tuple[int, int]]:
    """Yield (begin, end) of pieces that hold whole groups: whole rows where groups of their own end each."""
    unit = row if group and row % group else max(group, 1)
    step = max(PIECE // unit, 1) * unit
    for begin in range(0, count, step):
        yield begin, min(begin + step, count)


def scale(peak: Tensor, top: float) -> Tensor:
    """Scale of groups whose largest magnitude is `peak`: NaN where that is not finite."""
    return torch.where(peak.isfinite(), (peak + 1e-10) / top, torch.nan).to(torch.bfloat16)


def largest(values: Tensor) -> Tensor:
    """(1,) fp32: the largest magnitude, NaN and infinity included, without a wide copy of all values."""
    peaks = [values[begin:end].abs().amax() for begin, end in pieces(values.numel(), 0, 1)]
    return torch.stack(peaks).amax().float().reshape(1)


def by_group(part: Tensor, group: int, row: int) -> Tensor:
    """(n,) to (groups, group), zeros at the end of each row that G does not divide."""
    if row % group == 0:
        return part.view(-1, group)
    return torch.nn.functional.pad(part.view(-1, row), (0, -row % group)).view(-1, group)


def spread(part: Tensor, factors: Tensor, group: int, row: int) -> Tensor:
    """Multiply (n,) fp32 values by the factor of their group."""
    if row % group == 0:
        return (part.view(-1, group) * factors[:, None]).view(-1)
    each = factors.view(-1, -(-row // group)).repeat_interleave(group, dim=1)[:, :row]
    return (part.view(-1, row) * each).view(-1)
