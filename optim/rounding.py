"""Random numbers that belong to a parameter, and rounding that is right on average.

A draw is keyed by the parameter's name and the numbers of its step, never by a position in a list, a rank or the
global generator: it is the same after a resume, in a backward hook, and for any grouping of the parameters.
"""

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Store = Callable[[Tensor, Tensor], object]
"""Writes wide values into a narrower tensor: `Tensor.copy_` to the nearest, or a `Stochastic`."""


def seed_of(name: str, *numbers: int) -> int:
    """Seed below 2**63, the same on every machine and in every process (Python's own hash is not)."""
    text = "\0".join([name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_normal(shape: tuple[int, int], like: Tensor, name: str, *numbers: int) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn in fp32 where that is.

    Made of `keyed_bits` by Box and Muller's method, as torch's generators give other numbers on a GPU than on a CPU,
    and on another GPU. On all devices they are the same up to the last digit of a logarithm and a cosine.
    """
    count = math.prod(shape)
    half = (count + 1) // 2
    bits = keyed_bits(seed_of(name, *numbers), (2 * half,), like.device)
    # 24 bits, as many as fp32 can tell apart, in the middles of 2**24 intervals: never 0.
    uniform = (bits >> 8).bitwise_and_((1 << 24) - 1).float().add_(0.5).mul_(2.0**-24)
    radius = uniform[:half].log_().mul_(-2.0).sqrt_()
    angle = uniform[half:].mul_(2.0 * math.pi)
    found = torch.cat([radius * angle.cos(), angle.sin_().mul_(radius)])[:count]
    return found.view(shape).to(like.dtype)


def seeded_normal(shape: tuple[int, int], like: Tensor, seed: int) -> Tensor:
    """Standard normal fp32 numbers, drawn on the device of `like`: how apollo-torch draws a basis."""
    if like.is_meta:
        return like.new_empty(shape, dtype=torch.float32)
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=like.device)


def next_seed(seed: int) -> int:
    """The seed of apollo-torch's next basis: the 15th whole number that a generator of this seed draws."""
    with unset_fake_temporarily():
        generator = torch.Generator().manual_seed(seed)
        draws = [int(torch.randint(0, 2**63 - 1, (1,), generator=generator)) for _ in range(15)]
    return draws[-1]


def keyed_bits(
    seed: int, shape: Sequence[int], device: torch.device, first: int = 0, pitch: int | None = None
) -> Tensor:
    """Random bits, int32 of `shape`, for the values from flat index `first` on of a tensor that `seed` belongs to.

    A hash of the index, so that each value has its draw whatever piece of its tensor is asked for: by chunks, on one
    rank or on many, on any device. Two rounds of multiply and shift, each with its half of the seed, as in MurmurHash3.

    Args:
        pitch: values from one row to the next in the tensor, where `shape` is of a part of its columns.
    """
    count = math.prod(shape)
    bits = torch.arange(count, dtype=torch.int32, device=device)
    if pitch is not None and count:
        width = count // shape[0]
        bits.view(shape[0], width).add_(torch.arange(shape[0], device=device).mul_(pitch - width).int()[:, None])
    bits.add_(int32(first)).mul_(int32(0x9E3779B9)).add_(int32(seed))
    _stir_(bits, 15).mul_(int32(0x85EBCA6B))
    _stir_(bits, 13).add_(int32(seed >> 32)).mul_(int32(0xC2B2AE35))
    _stir_(bits, 16).mul_(int32(0x27D4EB2F))
    return _stir_(bits, 15).view(tuple(shape))


def _stir_(bits: Tensor, shift: int) -> Tensor:
    return bits.bitwise_xor_((bits >> shift).bitwise_and_((1 << (32 - shift)) - 1))  # >> repeats the sign


def int32(number: int) -> int:
    """The number with the lowest 32 bits of `number`, as torch's int32 holds them."""
    return (number + 2**31) % 2**32 - 2**31


@dataclass(frozen=True)
class Stochastic:
    """A rounder to bf16 for one parameter in one step, which takes `whole` and any slice of its rows."""

    name: str
    step: int
    whole: Tensor
    """This rank's part of the parameter."""
    row: int = 0
    """Where `whole` begins in the parameter, if it is a shard of its rows."""
    column: int = 0
    """The same of columns, in values; then `pitch` is the length of the parameter's rows."""
    pitch: int | None = None

    def __call__(self, target: Tensor, wide: Tensor) -> None:
        bits = keyed_bits(self.seed, wide.shape, wide.device, self.first_of(target), self.pitch)
        round_to_bf16_(target, wide, bits)

    @property
    def seed(self) -> int:
        return seed_of(self.name, self.step)

    def first_of(self, target: Tensor) -> int:
        """Flat index in the parameter of the first value of `target`, some rows of `whole`."""
        first = first_index(target, self.whole, self.row)
        if self.pitch is None or not self.whole.numel():
            return first
        return first * self.pitch * len(self.whole) // self.whole.numel() + self.column


def first_index(part: Tensor, whole: Tensor, row: int = 0) -> int:
    """Flat index of the first value of `part`, some rows of `whole`, which begins at `row` of its parameter."""
    width = math.prod(whole.shape[1:])
    if not (whole.dim() and whole.is_contiguous()):
        return row * width  # never cut into chunks
    return row * width + int(part.storage_offset()) - int(whole.storage_offset())


def round_to_bf16_(target: Tensor, wide: Tensor, bits: Tensor) -> None:
    """Write fp32 `wide` into bf16 `target`, up or down with the odds that make the mean exact. `bits` are used up.

    bf16 is the upper half of fp32: a random number below 2**16 is added to the lower half, which is then cut off.
    The carry goes up with a probability of lower half / 2**16. Zeros, infinities and NaNs stay what they are.
    """
    bits.bitwise_and_((1 << 16) - 1).add_(wide.contiguous().view(torch.int32)).bitwise_and_(-(1 << 16))
    target.copy_(bits.view(torch.float32))
