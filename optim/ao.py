"""torchao's low-bit AdamW by name: moments in 8 bits, 4 bits or FP8.

State, as torchao lays it out: a tensor of at least 4096 values that its block divides has codes (uint8 of the
parameter's shape; 4 bits: flat, two a byte) and fp32 `_scale` per block of 256 (4 bits: 128) values counted through
the whole tensor: 1 + 4/256 or 1/2 + 4/128 bytes a value and moment; others fp32, also for bf16 weights, where
torchao's own would be bf16. FP8 codes are E4M3 bytes scaled to their block's largest magnitude.
torchao compiles its step for each shape on first use, which takes seconds each; `compile=False` runs it eagerly.
Checked against 0.18.
"""

import functools
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from optim.base import Group, State, is_pretended
from optim.library import SMALLEST, LibraryOptimizer, borrowed_step_

KINDS = {"AdamW8bit": (8, 256), "AdamW4bit": (4, 128), "AdamWFp8": (8, 256)}
"""Their classes, with bits and block."""
MOMENTS = {"exp_avg": True, "exp_avg_sq": False}
"""Keys of a state, and whether its values have signs."""


class Torchao(LibraryOptimizer):
    """One of `KINDS`, stepped by torchao.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        kind: which of their classes; groups may differ.
        lr, betas, eps, weight_decay: as theirs.
        compile: whether torch compiles the step, as torchao does.
        rounding: how bf16 weights take a step: "nearest" by their code, "stochastic" by ours.
    """

    package = "torchao"
    kinds = KINDS

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        kind: str = "AdamW8bit",
        compile: bool = True,
        rounding: str = "nearest",
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "kind": kind, "compile": compile}
        super().__init__(params, own, rounding)

    @classmethod
    def layout(cls, shape: Sequence[int], group: Group) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        numel, (bits, block) = torch.Size(shape).numel(), KINDS[group["kind"]]
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for key in MOMENTS:
            if numel < SMALLEST or numel % block:
                found[key] = (tuple(shape), torch.float32)
            else:
                found[key] = (tuple(shape) if bits == 8 else (numel // 2,), torch.uint8)
                found[key + "_scale"] = ((numel // block,), torch.float32)
        return found

    def step_tensor(self, p: Tensor, state: State, group: Group) -> None:
        moments = {key: borrowed(state, key, p, group["kind"]) for key in MOMENTS}
        lent = {"step": torch.tensor(float(state["step"])), **moments}
        options = {key: group[key] for key in ("betas", "eps", "weight_decay")}
        options |= {"lr": torch.tensor(float(group["lr"])), "amsgrad": False}
        compiled = group["compile"] and not is_pretended(p)
        with nullcontext() if compiled else torch.compiler.set_stance("force_eager"):
            borrowed_step_(worker(group["kind"]), p, lent, options)
        state["step"] += 1


def borrowed(state: State, key: str, p: Tensor, kind: str) -> Tensor:
    """A moment as torchao's class, on the storage of ours."""
    from torchao.optim import subclass_4bit, subclass_8bit, subclass_fp8

    if key + "_scale" not in state:
        plain: Tensor = state[key]
        return plain
    codes, scale = state[key], state[key + "_scale"]
    if kind == "AdamWFp8":
        fp8: Tensor = subclass_fp8.OptimStateFp8(codes.view(torch.float8_e4m3fn), scale, p.dtype)
        return fp8
    signed = MOMENTS[key]
    home = subclass_8bit if kind == "AdamW8bit" else subclass_4bit
    with unset_fake_temporarily():  # torchao keeps the lists, and reads them off tensors
        book = home.get_qmap_signed() if signed else home.get_qmap_unsigned()
    values = torch.tensor(book, device=p.device)
    if kind == "AdamW8bit":
        coded: Tensor = subclass_8bit.OptimState8bit(codes, scale, values, signed, p.dtype)
    else:
        coded = subclass_4bit.OptimState4bit(codes, scale, values, signed, p.shape, p.dtype)
    return coded


@functools.cache
def worker(kind: str) -> Any:
    """An object of their class that owns no parameter between two steps."""
    from torchao import optim

    with unset_fake_temporarily():
        made = getattr(optim, kind)([torch.zeros(1)])
    made.param_groups = []
    return made
