"""Whole numbers of 4 bits with a scale and a zero-point per group: how Q-GaLore keeps a basis.

    s = (max - min) / 15,  z = round(-min / s),  q = clamp(round(x / s) + z, 0, 15),  x = (q - z) s
The range is widened to hold 0, so that z always lies in 0..15: without that a group of one sign saturates. Groups lie
inside rows; s and z take two bytes each. Two codes a byte, the first in the upper half.
Paper: Zhang et al. 2024, arXiv:2407.08296, section 3.1 (whose code stores one code a byte).
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from optim.codec import Blocks, pack, unpack

LEVELS = 15
SMALLEST = 2.0**-24
"""Least scale: the smallest number of fp16."""


class Affine4(Blocks):
    """Bytes of an (m, n) matrix: m (ceil(n / 2) + 4 ceil(n / block))."""

    extra = ("_scale", "_zero")
    extra_dtype = torch.float16

    def __init__(self, block: int) -> None:
        super().__init__(bits=4, block=block)

    def new(self, key: str, like: Tensor, shape: Sequence[int], wide: torch.dtype) -> dict[str, Tensor]:
        if len(shape) != 2:
            raise ValueError(f"{key} of shape {tuple(shape)}: 4-bit groups need a matrix")
        return super().new(key, like, shape, wide)

    def read(
        self, state: Mapping[str, Any], key: str, rows: slice, wide: torch.dtype, *, signed: bool, width: int
    ) -> Tensor:
        scale, zero = (state[key + suffix][rows].to(wide) for suffix in self.extra)
        values = unpack(state[key][rows])[:, :width].to(wide)
        for blocks, part in self.parts(values):
            part.sub_(zero[:, blocks, None]).mul_(scale[:, blocks, None])
        return values

    def write(self, state: Mapping[str, Any], key: str, rows: slice, values: Tensor, *, signed: bool) -> None:
        scale, zero = (state[key + suffix][rows] for suffix in self.extra)
        codes = torch.empty_like(values)
        for (blocks, part), (_, out) in zip(self.parts(values), self.parts(codes), strict=True):
            low, high = part.amin(-1).clamp(max=0.0), part.amax(-1).clamp(min=0.0)
            scale[:, blocks] = ((high - low) / LEVELS).clamp(min=SMALLEST)
            step = scale[:, blocks].to(part.dtype)  # as it is stored
            zero[:, blocks] = (-low / step).round().clamp(0, LEVELS)
            torch.div(part, step.unsqueeze(-1), out=out)
            out.round_().add_(zero[:, blocks, None]).clamp_(0, LEVELS)
        state[key][rows] = pack(codes.to(torch.uint8))
