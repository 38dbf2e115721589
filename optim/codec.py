"""State codecs: how a moment is kept between two steps, whatever the rule that uses it.

| name | bytes per value | kept as |
|---|---|---|
| fp32 | 4 (8 for fp64 weights) | itself |
| bf16 | 2 | rounded to nearest |
| int8 | 1 + 4/256 | code of the dynamic map, largest magnitude of the block (bitsandbytes) |
| int4 | 1/2 + 4/128 | two codes a byte, largest magnitude of the block (torchao) |
| fp8 | 1 + 8/128 | E4M3 after dynamic range expansion (COAT), largest magnitude and exponent of the block |

Math is always done on decoded values of at least fp32. A block is up to that many neighbours in one row (the first
dim against all others), the last of a row may be shorter: shards of whole rows hold the same bytes as the whole.
Vectors, tensors below 4096 values and rows shorter than a quarter of a block stay fp32: there the scales would cost
as much as they save. Only the global shape decides.
Papers: Dettmers et al. 2022, arXiv:2110.02861; Li et al. 2023, arXiv:2309.01507; Xi et al. 2024, arXiv:2410.19313.
"""

import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optim.codebook import book, look_up
from parallel.dtensor import Layout

SMALLEST = 4096
"""Values from which a tensor is quantized; bitsandbytes and torchao draw the line there too."""
E4M3_MAX = 448.0
EXPANSION_RANGE = math.log2(E4M3_MAX**2 / 2)
"""log2 of the dynamic range that COAT's code stretches a block to (specs: code, not paper)."""
LARGEST_POWER = 64
LARGEST_INT = 2**31 - 1
INFINITY = 0x7F800000
"""Its bits in fp32."""
TINY = 1e-37
"""Smallest divisor whose inverse is finite in fp32."""


class Codec:
    """One tensor's storage under `key` and keys derived from it in a parameter's state."""

    in_place = False
    """Whether `read` returns the stored tensor itself, which is then updated in place."""

    def __init__(self, dtype: torch.dtype | None = None) -> None:
        self.dtype = dtype

    def new(self, key: str, like: Tensor, shape: Sequence[int], wide: torch.dtype) -> dict[str, Tensor]:
        """Storage of zeros on the device of `like`; `wide` is the dtype of the math."""
        if tuple(shape) == tuple(like.shape):
            return {key: torch.zeros_like(like, dtype=self.dtype or wide)}
        return {key: like.new_zeros(tuple(shape), dtype=self.dtype or wide)}

    def nbytes(self, shape: Sequence[int], wide: torch.dtype) -> int:
        """Bytes that `new` allocates."""
        return math.prod(shape) * (self.dtype or wide).itemsize

    def home(self, layout: Layout) -> Layout:
        """How a state of a tensor of `layout` is sharded: as the tensor, unless that would cut a block."""
        return layout

    def read(
        self, state: Mapping[str, Any], key: str, rows: slice, wide: torch.dtype, *, signed: bool, width: int
    ) -> Tensor:
        """Decoded values of some rows. `width` is the length of one, the product of all dims but the first."""
        return rows_of(state[key], rows).to(wide)

    def write(self, state: Mapping[str, Any], key: str, rows: slice, values: Tensor, *, signed: bool) -> None:
        """Encode values of some rows, in the shape of `read`."""
        rows_of(state[key], rows).copy_(values)


class Plain(Codec):
    """At least fp32, updated in place."""

    in_place = True

    def read(
        self, state: Mapping[str, Any], key: str, rows: slice, wide: torch.dtype, *, signed: bool, width: int
    ) -> Tensor:
        return rows_of(state[key], rows)

    def write(self, state: Mapping[str, Any], key: str, rows: slice, values: Tensor, *, signed: bool) -> None:
        pass


class Blocks(Codec):
    """Codes of one byte (or half) a value, and fp32 numbers of each block."""

    extra: tuple[str, ...] = ("_scale",)
    extra_dtype = torch.float32

    def __init__(self, bits: int, block: int) -> None:
        super().__init__(torch.uint8)
        if block < 2 or block & (block - 1):
            raise ValueError(f"block={block}: must be a power of two, such as 128 or 256")
        self.bits, self.block = bits, block

    def shapes(self, shape: Sequence[int]) -> tuple[tuple[int, int], tuple[int, int]]:
        """Shape of the codes and of each number per block."""
        rows, width = shape[0], math.prod(shape[1:])
        return (rows, -(-width * self.bits // 8)), (rows, -(-width // self.block))

    def new(self, key: str, like: Tensor, shape: Sequence[int], wide: torch.dtype) -> dict[str, Tensor]:
        codes, blocks = self.shapes(shape)
        numbers = {key + suffix: like.new_zeros(blocks, dtype=self.extra_dtype) for suffix in self.extra}
        return {key: like.new_zeros(codes, dtype=torch.uint8)} | numbers

    def home(self, layout: Layout) -> Layout:
        """Rows stay whole where shards of columns would end inside a block."""
        if layout.dim in (None, 0):
            return layout
        whole_blocks = len(layout.shape) == 2 and -(-layout.shape[1] // layout.count) % self.block == 0
        return layout if whole_blocks else layout.like(layout.shape, 0)

    def nbytes(self, shape: Sequence[int], wide: torch.dtype) -> int:
        codes, blocks = self.shapes(shape)
        return math.prod(codes) + self.extra_dtype.itemsize * len(self.extra) * math.prod(blocks)

    def parts(self, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Views (rows, blocks, block) of a matrix of values, with the blocks they are: the full ones, then the rest."""
        full = matrix.shape[1] // self.block
        if full:
            yield slice(0, full), matrix[:, : full * self.block].view(matrix.shape[0], full, self.block)
        if full * self.block < matrix.shape[1]:
            yield slice(full, full + 1), matrix[:, full * self.block :].unsqueeze(1)

    def whole(self, flat: Tensor) -> Tensor:
        """A matrix of values as (rows, blocks, block): a view, or a copy where a row ends inside a block, with zeros
        behind. Two parts of strange strides would take half as long again as that copy."""
        rows, width = flat.shape
        blocks = -(-width // self.block)
        if width % self.block:
            padded = flat.new_empty(rows, blocks * self.block)
            padded[:, :width] = flat
            padded[:, width:] = 0
            flat = padded
        return flat.view(rows, blocks, self.block)


class Dynamic(Blocks):
    """8 or 4 bits: the nearest value of a code book times the largest magnitude of the block."""

    def read(
        self, state: Mapping[str, Any], key: str, rows: slice, wide: torch.dtype, *, signed: bool, width: int
    ) -> Tensor:
        codes, scale = state[key][rows], state[key + "_scale"][rows]
        values = book(self.bits, signed, codes).decode(codes).view(len(codes), codes.shape[1] * 8 // self.bits)
        values = values[:, :width].contiguous()  # the last byte of a row of odd length holds one of 4 bits
        for blocks, part in self.parts(values):
            part.mul_(scale[:, blocks, None])
        return values.to(wide)

    def write(self, state: Mapping[str, Any], key: str, rows: slice, values: Tensor, *, signed: bool) -> None:
        codes, scale = state[key][rows], state[key + "_scale"][rows]
        blocks = self.whole(values.flatten(1))
        largest = (torch.maximum(blocks.amax(-1), -blocks.amin(-1)) if signed else blocks.amax(-1)).float()
        scale.copy_(largest)
        unit = torch.empty(blocks.shape, dtype=torch.float32, device=blocks.device)
        torch.mul(blocks, largest.clamp_(min=TINY).reciprocal_().unsqueeze(-1), out=unit)
        found = book(self.bits, signed, codes).encode(unit).view(len(codes), blocks.shape[1] * self.block)
        if self.bits == 4:
            found = pack(found)
        codes.copy_(found[:, : codes.shape[1]])


class Expanded(Blocks):
    """E4M3 of sign(x) (|x| / Amax)^k, with k such that the block's range fills that of E4M3.

    COAT scales by c = sqrt(Amax Amin), which cancels: x = sign Amax (|code| / 448)^(1/k). k is a multiple of 1/16,
    below 1 where the block's range exceeds E4M3's. Zeros are left out of Amin and stay zero.
    """

    extra = ("_scale", "_power")

    def read(
        self, state: Mapping[str, Any], key: str, rows: slice, wide: torch.dtype, *, signed: bool, width: int
    ) -> Tensor:
        codes, scale, power = (state[key + suffix][rows] for suffix in ("", *self.extra))
        first = (power * 16).int().mul_(256)
        index = codes.int()
        for blocks, part in self.parts(index):
            part.add_(first[:, blocks, None])
        values = look_up(roots(codes), index.view(-1)).view(codes.shape)
        for blocks, part in self.parts(values):
            part.mul_(scale[:, blocks, None])
        return values.to(wide)

    def write(self, state: Mapping[str, Any], key: str, rows: slice, values: Tensor, *, signed: bool) -> None:
        codes, scale, power = (state[key + suffix][rows] for suffix in ("", *self.extra))
        flat = values.flatten(1)
        unit = self.whole(flat.abs() if signed else flat).float()
        # As whole numbers the bits of magnitudes are in order; added to this, modulo 2**32, a zero becomes the largest
        # of them and all others keep their order, so that the least is that of the smallest magnitude but zero.
        least = unit.view(torch.int32).add(LARGEST_INT).amin(-1)
        smallest = least.sub_(LARGEST_INT).clamp_(0, INFINITY).view(torch.float32)
        largest = unit.amax(-1)
        k = expansion(largest, torch.minimum(smallest, largest))  # of zeros alone, 0
        scale.copy_(largest)
        power.copy_(k)
        inverse = largest.clamp_(min=TINY).reciprocal_().unsqueeze(-1)
        unit = unit.mul_(inverse) if signed else unit * inverse
        # At most 448.01, which the cast rounds down; it makes NaN of 464 and more.
        unit.log2_().mul_(k.unsqueeze(-1)).exp2_().mul_(E4M3_MAX)
        found = unit.flatten(1)[:, : flat.shape[1]]
        if signed:
            found.copysign_(flat)
        codes.view(torch.float8_e4m3fn).copy_(found)


def roots(like: Tensor) -> Tensor:
    """sign (|code| / 448)^(1/k) of every E4M3 code and every k = i/16, flat: of code c at 256 i + c, where `like` is.

    Looked up, a value costs a third of the exponential it stands for (on a CPU; torch's cast from E4M3 takes 10 ns).
    """
    return _roots(like.device) if not isinstance(like, FakeTensor) else _make_roots(like.device)


@functools.cache
def _roots(device: torch.device) -> Tensor:
    return _make_roots(device)


def _make_roots(device: torch.device) -> Tensor:
    codes = torch.arange(256, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()
    powers = torch.arange(16 * LARGEST_POWER + 1, dtype=torch.float32, device=device).clamp_(min=1).div_(16)
    logs = codes.abs().div_(E4M3_MAX).log_()
    return (logs / powers[:, None]).exp_().copysign_(codes).flatten()


def expansion(largest: Tensor, smallest: Tensor) -> Tensor:
    """COAT's exponent k, rounded down to a multiple of 1/16, and at most LARGEST_POWER, where magnitudes are all but
    equal: COAT's goes to infinity there, but at 64 the codes are a thousandth apart already."""
    span = largest.clamp(min=TINY).log2() - smallest.clamp(min=TINY).log2()
    return (16 * EXPANSION_RANGE / span.clamp(min=1e-6)).floor_().div_(16).clamp_(1 / 16, LARGEST_POWER)


def pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte, the first in the upper half; a row of odd length ends in half a byte of zero."""
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    return (codes[:, ::2] << 4) | codes[:, 1::2]


def unpack(packed: Tensor) -> Tensor:
    """The codes of `pack`, with the padding of a row of odd length."""
    return torch.stack([packed >> 4, packed & 15], dim=-1).flatten(1)


PLAIN = Plain()
CODECS: dict[str, Codec] = {
    "fp32": PLAIN,
    "bf16": Codec(torch.bfloat16),
    "int8": Dynamic(bits=8, block=256),
    "int4": Dynamic(bits=4, block=128),
    "fp8": Expanded(bits=8, block=128),
}
"""By the name in the option `states`."""


def codec_for(name: str, shape: Sequence[int]) -> Codec:
    """The codec of a state of this global shape: `name`'s, or fp32 where that would save little."""
    return _codec_for(name, tuple(shape))


@functools.lru_cache(maxsize=2**14)
def _codec_for(name: str, shape: tuple[int, ...]) -> Codec:
    codec = CODECS[name]
    if not isinstance(codec, Blocks):
        return codec
    width = math.prod(shape[1:])
    large = len(shape) >= 2 and math.prod(shape) >= SMALLEST and width >= codec.block // 4
    return codec if large else PLAIN


def rows_of(tensor: Tensor, rows: slice) -> Tensor:
    """Rows of a tensor; a scalar has none to choose from."""
    return tensor[rows] if tensor.dim() else tensor
