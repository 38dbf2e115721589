"""Code books: sorted values in [-1, 1] that stand for numbers, and the nearest of them for any number.

A search among 256 values takes 80 ns a number on a CPU. Here the upper 16 bits of a float (sign, exponent, 7 bits of
mantissa) are looked up instead, which leaves at most two candidates, and one comparison decides: 2 ns, same code.
The dynamic map is that of Dettmers et al. 2022, arXiv:2110.02861, as bitsandbytes and torchao build it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily


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
    """Tables on one device."""

    values: Tensor
    """fp32, sorted; the code is the index."""
    bounds: Tensor
    """Upper bound of each code: the middle to the next value; infinity for the last."""
    lowest: Tensor
    """uint8 (65536,): the code of the lowest number whose upper 16 bits are the index."""

    def encode(self, x: Tensor) -> Tensor:
        """Nearest code of each number of a contiguous fp32 tensor. uint8, flat"""
        keys = x.view(-1).view(torch.int32) >> 16
        codes = self.lowest.index_select(0, keys.bitwise_and_(0xFFFF))
        return codes.add_(x.view(-1) > self.bounds.index_select(0, codes.int()))

    def decode(self, codes: Tensor) -> Tensor:
        """Values of uint8 codes. fp32, flat"""
        return self.values.index_select(0, codes.reshape(-1).int())


def make_book(values: list[float], device: torch.device) -> CodeBook:
    """Tables for sorted `values` no closer to each other than floats of 7 mantissa bits are."""
    table = torch.tensor(values)
    middles = (table[:-1] + table[1:]) / 2
    keys = torch.arange(1 << 16, dtype=torch.int64)
    # The lowest number of a cell has its lower bits all zero, or all one where the sign bit makes it negative.
    bits = (keys << 16) | torch.where(keys >= 1 << 15, 0xFFFF, 0)
    lowest = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).int().view(torch.float32)
    codes = torch.bucketize(lowest, middles).to(torch.uint8)
    bounds = torch.cat([middles, torch.tensor([torch.inf])])
    return CodeBook(table.to(device), bounds.to(device), codes.to(device))


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
