"""Random numbers that belong to a parameter, and rounding that is right on average.

A draw is keyed by the parameter's name and the numbers of its step, never by a position in a list, a rank or the
global generator: it is the same after a resume, in a backward hook, and for any grouping of the parameters.
"""

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

Store = Callable[[Tensor, Tensor], object]
"""Writes wide values into a narrower tensor: `Tensor.copy_` to the nearest, or a rounder of `stochastic`."""


def seed_of(name: str, *numbers: int) -> int:
    """Seed below 2**63, the same on every machine and in every process (Python's own hash is not)."""
    text = "\0".join([name, *map(str, numbers)])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def keyed_normal(shape: tuple[int, int], like: Tensor, name: str, *numbers: int) -> Tensor:
    """Standard normal numbers with the dtype and device of `like`, drawn in fp32 on the CPU.

    CUDA's generators are only reproducible on equal GPUs, and every rank must draw the same.
    """
    generator = torch.Generator().manual_seed(seed_of(name, *numbers))
    return torch.randn(shape, generator=generator).to(device=like.device, dtype=like.dtype)


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


def stochastic(name: str, step: int, device: torch.device) -> Store:
    """Return a rounder to bf16 for one parameter in one step; its draws follow each other call after call."""
    generator = torch.Generator(device).manual_seed(seed_of(name, step)) if device.type != "meta" else None

    def round_(target: Tensor, wide: Tensor) -> None:
        round_to_bf16_(target, wide, generator)

    return round_


def round_to_bf16_(target: Tensor, wide: Tensor, generator: torch.Generator | None) -> None:
    """Write fp32 `wide` into bf16 `target`, up or down with the odds that make the mean exact.

    bf16 is the upper half of fp32: a random number below 2**16 is added to the lower half, which is then cut off.
    The carry goes up with a probability of lower half / 2**16. Zeros, infinities and NaNs stay what they are.
    """
    draws = torch.randint(0, 1 << 16, wide.shape, dtype=torch.int32, device=wide.device, generator=generator)
    bits = wide.contiguous().view(torch.int32)
    target.copy_(draws.add_(bits).bitwise_and_(-(1 << 16)).view(torch.float32))
