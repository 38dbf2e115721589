"""Code books: sorted values in [-1, 1] that stand for numbers, and the nearest of them for any number.

A search among 256 values takes eight steps a number. Here the upper 16 bits of a float (sign, exponent, 7 bits of
mantissa) are looked up instead, which leaves at most two candidates, and the lower 16 decide by the carry of one
addition, to the same code; `benchmarks/optimizer_step.py` has the times.
The dynamic map is that of Dettmers et al. 2022, arXiv:2110.02861, as bitsandbytes and torchao build it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily

MANY_THREADS = 4
"""From here on a lookup on all cores is quicker (reckoned from one and two)."""


def dynamic_values(*, signed: bool, exponents: int, bits: int) -> list[float]:
    """The dynamic map: `exponents` decades up to 1, each with twice the values of the one below, and 0 and 1."""
    values = [0.0, 1.0]
    with unset_fake_temporarily():  # a step may be predicted on fake tensors, which have no values to list
        for i in range(exponents):
            count = 2 ** (i + bits - 1 - exponents + (not signed))
            edges = torch.linspace(0.1, 1.0, count + 1, device="cpu")
            middles = (10.0 ** (i + 1 - exponents) * ((edges[:-1] + edges[1:]) / 2)).tolist()
            values += middles + ([-middle for middle in middles] if signed else [])
    return sorted(values)


@dataclass(frozen=True)
class CodeBook:
    """Tables on one device; of a machine whose bytes are in order of their weight (little-endian), as all are here."""

    values: Tensor
    """fp32, sorted; the code is the index."""
    of_bytes: Tensor
    """What a byte stands for: a value, or the two of a byte of 4-bit codes (first the upper half) as the bytes of an
    int64."""
    cells: Tensor
    """int32 (65536,), see `_cells`."""

    def encode(self, x: Tensor) -> Tensor:
        """Nearest code of each number of a contiguous fp32 tensor. int32, flat"""
        bits = x.view(-1).view(torch.int32)
        keys = (bits >> 16).bitwise_and_(0xFFFF)
        return look_up(self.cells, keys).add_(bits).bitwise_right_shift_(16).abs_()

    def decode(self, codes: Tensor) -> Tensor:
        """Values of uint8 codes, of two codes a byte where the book is one of 4 bits. fp32, flat"""
        return look_up(self.of_bytes, codes.reshape(-1).int()).view(torch.float32)


def look_up(table: Tensor, index: Tensor) -> Tensor:
    """Entries of a flat table at a flat int32 index.

    torch's index_select runs on one core; `take` runs on all, but does more for each number: it is for many threads.
    `python -m benchmarks.optimizer_step --arms adamw_8bit --threads N` shows what either takes; measured for two.
    """
    if table.device.type == "cpu" and torch.get_num_threads() >= MANY_THREADS:
        return table.take(index.long())
    return table.index_select(0, index)


def make_book(values: list[float], device: torch.device) -> CodeBook:
    """Tables for sorted `values` no closer to each other than floats of 7 mantissa bits are."""
    table = of_bytes = torch.tensor(values)
    if len(values) == 16:
        of_bytes = torch.cartesian_prod(table, table).view(torch.int64).flatten()
    return CodeBook(table.to(device), of_bytes.to(device), _cells(table).to(device))


def _cells(table: Tensor) -> Tensor:
    """For all numbers whose upper 16 bits are the index: what is to be added to their bits, that the upper half of the
    sum is their code, or minus their code. int32 (65536,)

    Of a cell with no bound between two codes that is the code itself, less the upper bits. A bound within it needs a
    carry: from the first number above it on, the lower bits plus 65535 - bound pass 2**16. Negative numbers fall as
    their bits rise: there minus the code is counted up, from the bound on.
    """
    middles = (table[:-1] + table[1:]) / 2
    keys = torch.arange(1 << 16, dtype=torch.int64)
    negative = keys >= 1 << 15
    # The lowest number of a cell has its lower bits all zero, or all one where the sign bit makes it negative.
    bits = (keys << 16) | torch.where(negative, 0xFFFF, 0)
    lowest = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    codes = torch.bucketize(lowest, middles)
    nowhere = torch.full((1,), 1 << 32)
    bounds = torch.cat([middles.view(torch.int32).long() & 0xFFFFFFFF, nowhere])[codes]
    inside = bounds >> 16 == keys
    up = (codes << 16) + 0xFFFF - (bounds & 0xFFFF)
    down = (1 << 16) - (bounds & 0xFFFF) - ((codes + 1) << 16)
    sums = torch.where(inside, torch.where(negative, down, up), codes << 16)
    return (sums - (keys << 16)).int()  # modulo 2**32, as the addition is


BOOKS: dict[tuple[int, bool], Callable[[], list[float]]] = {
    (8, True): functools.partial(dynamic_values, signed=True, exponents=7, bits=8),
    (8, False): functools.partial(dynamic_values, signed=False, exponents=7, bits=8),
    (4, True): functools.partial(dynamic_values, signed=True, exponents=3, bits=4),
    (4, False): lambda: [i / 16 for i in range(1, 17)],  # linear without zero, as torchao: sqrt(v) divides
}
"""Values by (bits, signed). The unsigned ones are for second moments."""


def book(bits: int, signed: bool, like: Tensor) -> CodeBook:
    """The code book on the device of `like`; made anew where that is fake, as nothing fake may outlive its mode."""
    if isinstance(like, FakeTensor):
        return make_book(BOOKS[bits, signed](), like.device)
    return _cached(bits, signed, like.device)


@functools.cache
def _cached(bits: int, signed: bool, device: torch.device) -> CodeBook:
    return make_book(BOOKS[bits, signed](), device)
