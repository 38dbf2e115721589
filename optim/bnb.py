"""bitsandbytes' optimizers by name: 8-bit blockwise AdamW and Lion, paged or not, and AdamW in paged fp32.

State, as bitsandbytes lays it out: tensors of at least 4096 values have uint8 codes `state1` (and `state2`) of the
parameter's shape and fp32 `absmax1` (`absmax2`) per 256 of its values in a row, counted through the whole tensor:
1 + 4/256 bytes a value and moment; smaller ones fp32. The code books are constants, and no part of a state.
Paged: buffers of at least 1e5 values lie in CUDA's managed memory, which moves to the host under pressure.
Paper: Dettmers et al. 2022, arXiv:2110.02861. Checked against 0.50.2.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.base import Group, State, is_pretended
from optim.library import SMALLEST, LibraryOptimizer, borrowed_step_

BLOCK = 256
KINDS = {"AdamW8bit": 2, "PagedAdamW8bit": 2, "PagedAdamW": 2, "Lion8bit": 1, "PagedLion8bit": 1}
"""Their classes, with the number of moments."""


class Bitsandbytes(LibraryOptimizer):
    """One of `KINDS`, stepped by bitsandbytes.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        kind: which of their classes; groups may differ.
        lr, betas, eps, weight_decay: as theirs. Lion knows no eps.
        rounding: how bf16 weights take a step: "nearest" by their kernel, "stochastic" by ours.
    """

    package = "bitsandbytes"
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
        rounding: str = "nearest",
    ) -> None:
        own = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "kind": kind}
        super().__init__(params, own, rounding)

    @classmethod
    def layout(cls, shape: Sequence[int], group: Group) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        numel = torch.Size(shape).numel()
        coded = "8bit" in group["kind"] and numel >= SMALLEST
        found: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
        for moment in range(1, KINDS[group["kind"]] + 1):
            found[f"state{moment}"] = (tuple(shape), torch.uint8 if coded else torch.float32)
            if coded:
                found[f"absmax{moment}"] = ((-(-numel // BLOCK),), torch.float32)
        return found

    def allocate(self, p: Tensor, shape: tuple[int, ...], dtype: torch.dtype, group: Group) -> Tensor:
        if "Paged" in group["kind"] and p.is_cuda and shape == tuple(p.shape) and not is_pretended(p):
            buffer: Tensor = worker(group["kind"]).get_state_buffer(p, dtype=dtype)  # managed memory, if large enough
            return buffer
        return super().allocate(p, shape, dtype, group)

    def step_tensor(self, p: Tensor, state: State, group: Group) -> None:
        if is_pretended(p):  # their kernels read code books by value; they step in place and allocate nothing
            state["step"] += 1
            return
        lent = dict(state)
        if state["state1"].dtype is torch.uint8:
            first, second = code_books(p.device)
            lent |= {"qmap1": first, "qmap2": second} if "state2" in state else {"qmap1": first}
        options = {key: group[key] for key in ("lr", "betas", "eps", "weight_decay")}
        state["step"] = borrowed_step_(worker(group["kind"]), p, lent, options)["step"]


@functools.cache
def worker(kind: str) -> Any:
    """An object of their class that owns no parameter between two steps."""
    import bitsandbytes

    made = getattr(bitsandbytes.optim, kind)([torch.zeros(1)])
    made.param_groups = []
    made.initialized = True  # what they do at a first step concerns parameters it was built with
    return made


@functools.cache
def code_books(device: torch.device) -> tuple[Tensor, Tensor]:
    """Their values of signed and unsigned codes."""
    from bitsandbytes.functional import create_dynamic_map

    return create_dynamic_map(signed=True).to(device), create_dynamic_map(signed=False).to(device)
