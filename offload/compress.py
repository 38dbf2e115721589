"""Activations as 8-bit codes: FP8 (E4M3) or integers, with a scale for each group of neighbours or for all.

For a group g of G values, in the order they lie in memory:

    s = bf16((max |x_g| + 1e-10) / top)        top: 448 for E4M3, 127 for integers
    code = round(clamp(x / s, -top, top))      by the scale as it is stored, so that the largest maps to top
    x' = code s

COAT (Xi et al. 2024, arXiv:2410.19313): G = 16 for the inputs of norms, activations and products, one scale for the
whole input of a linear layer. Groups lie within a row, a token's values, and the last of a row is shorter where G does
not divide it: so what a token becomes does not depend on the tokens beside it. An infinite value makes its group NaN,
and a NaN stays one: E4M3 on CPU would saturate both without a word, and the step's finite check is to see them.
COAT's own count of a LLaMA block is 13.96 bf16 hidden states with scales (r = 8/3); here it is 11.96, and less with
gated products that save gate and up alone (`offload.lean`). The 2 are COAT's rotary embeddings, for which it counts q
and k before they are turned: torch keeps of a turn only the tables that all blocks share.
Bytes per value: 1 + 2/G, a little more where G does not divide the row.

On CUDA each pass over the values is one kernel (`offload.fused`); on a CPU, and in ragged rows, torch's own operators
take a piece at a time. The codes are the same: a value meets one product, rounded as IEEE says, and one cast.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from offload.fused import Fused, pays

FP8_GROUP = 16
INT8_GROUP = 64
TOPS = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}
PIECE = 2**20
"""Values encoded or decoded at a time where nothing is fused: what is wide in between stays at 4 MiB."""
MAGNITUDE = {2: (torch.int16, 0x7FFF), 4: (torch.int32, 0x7FFF_FFFF), 8: (torch.int64, 0x7FFF_FFFF_FFFF_FFFF)}
"""By bytes of a float: integers of its size, and the bits of them that are not the sign."""


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
    fused: bool = False
    """Whether one kernel decodes them."""

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scales.nbytes


def encode(values: Tensor, *, integers: bool, group: int, row: int = 0, fused: bool | None = None) -> Codes:
    """Encode (n,) values of a floating dtype, which are n / `row` rows (0: one).

    Args:
        fused: whether torch compiles what it takes; None: where that pays.
    """
    count = values.numel()
    row = row or max(count, 1)
    assert count % row == 0, f"{count} values are no rows of {row}"
    ragged = bool(group and row % group)
    fused = (pays(values) if fused is None else fused) and not ragged and count > 0
    codes = torch.empty(count, dtype=torch.int8 if integers else torch.float8_e4m3fn, device=values.device)
    peaks = torch.zeros(groups_in(count, group, row), dtype=torch.float32, device=values.device)
    raise_, write = (raise_peaks, write_codes) if fused else (raise_peaks.function, write_codes.function)
    for part, own in pieces(count, group, row, whole=fused):
        raise_(peaks[own], by_group(values[part], group, row))
    scales = scale(peaks, TOPS[codes.dtype])
    factors = scales.float().reciprocal_()
    for part, own in pieces(count, group, row, whole=fused):
        here, factor = by_factor(values[part], factors[own], group, row)
        write(codes[part].view(here.shape), here, factor)
    return Codes(codes, scales, group, row, values.dtype, fused)


def decode(coded: Codes) -> Tensor:
    """Return the (n,) values, in their dtype."""
    count, group, row = coded.codes.numel(), coded.group, coded.row
    values = torch.empty(count, dtype=coded.dtype, device=coded.codes.device)
    write = write_values if coded.fused else write_values.function
    for part, own in pieces(count, group, row, whole=coded.fused):
        here, scales = by_factor(coded.codes[part], coded.scales[own].float(), group, row)
        write(values[part].view(here.shape), here, scales)
    return values


# --- what is done to values: (groups, n) or (rows, n), each into its first argument ---


@Fused
def raise_peaks(peaks: Tensor, values: Tensor) -> None:
    """Raise each of (groups,) fp32 to the largest magnitude in its group, infinity and NaN above all.

    Magnitudes of floats are in the order of their bits, and integers compare three times as fast.
    """
    integers, bits = MAGNITUDE[values.itemsize]
    found = (values.view(integers) & bits).amax(1).view(values.dtype)
    peaks.copy_(torch.maximum(peaks, found.float()))


@Fused
def write_codes(codes: Tensor, values: Tensor, factors: Tensor) -> None:
    """Multiply by fp32 factors, (groups, 1) or of each value, and round to what codes there are."""
    top = TOPS[codes.dtype]
    scaled = (values.float() * factors).clamp_(-top, top)
    codes.copy_(scaled.round_() if codes.dtype is torch.int8 else scaled)


@Fused
def write_values(values: Tensor, codes: Tensor, scales: Tensor) -> None:
    """Multiply what codes stand for by fp32 scales, (groups, 1) or of each."""
    values.copy_(wide(codes) * scales)


def wide(codes: Tensor) -> Tensor:
    """fp32 values of codes; FP8 on a CPU by a table, as torch's cast there works out each value by itself."""
    if codes.device.type != "cpu" or codes.dtype is torch.int8:
        return codes.float()
    # made for each call, in microseconds: one that is kept is a kilobyte that a plan on fake tensors does not hold
    table = torch.arange(256, dtype=torch.uint8).view(codes.dtype).float()
    return torch.index_select(table, 0, codes.view(torch.uint8).int().view(-1)).view(codes.shape)


# --- how they lie ---


def groups_in(count: int, group: int, row: int) -> int:
    """Scales of `count` values: of whole rows, or where G divides a row of whole groups."""
    return (count // row * -(-row // group) + count % row // group) if group else 1


def pieces(count: int, group: int, row: int, *, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Yield pieces that hold whole groups (whole rows where groups of their own end each), and their groups.

    Args:
        whole: whether all is one piece.
    """
    unit = row if group and row % group else max(group, 1)
    step = max(count, 1) if whole else max(PIECE // unit, 1) * unit
    for begin in range(0, count, step):
        end = min(begin + step, count)
        own = slice(groups_in(begin, group, row), groups_in(end, group, row)) if group else slice(0, 1)
        yield slice(begin, end), own


def scale(peak: Tensor, top: float) -> Tensor:
    """Scale of groups whose largest magnitude is `peak`: NaN where that is not finite."""
    finite = (peak + 1e-10).div_(top)
    return finite.add_(peak - peak).to(torch.bfloat16)  # a difference of 0, but NaN of what is not finite


def by_group(part: Tensor, group: int, row: int) -> Tensor:
    """(n,) to (groups, group), zeros at the end of each row that G does not divide; (1, n) where all are one group."""
    if not group:
        return part[None]
    if row % group == 0:
        return part.view(-1, group)
    return torch.nn.functional.pad(part.view(-1, row), (0, -row % group)).view(-1, group)


def by_factor(part: Tensor, factors: Tensor, group: int, row: int) -> tuple[Tensor, Tensor]:
    """(n,) values and (groups,) factors as two matrices, of which the second multiplies the first."""
    if not group or row % group == 0:
        return part.view(len(factors), -1), factors[:, None]
    each = factors.view(-1, -(-row // group)).repeat_interleave(group, dim=1)[:, :row]
    return part.view(-1, row), each
