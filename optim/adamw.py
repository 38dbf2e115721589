"""AdamW: Adam with decoupled weight decay.

    W <- (1 - lr wd) W
    m <- b1 m + (1 - b1) G;  v <- b2 v + (1 - b2) G*G
    W <- W - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
State: m and v, each of the shape of W, fp32 (fp64 for fp64 weights): 8 bytes per value.
Paper: Loshchilov, Hutter 2019, arXiv:1711.05101, algorithm 2. Left out: amsgrad, maximize.

The kernel is torch's fused AdamW, one call for all tensors of a kind: for fp32 and fp64 weights the result is
that of `torch.optim.AdamW(fused=True)` bit for bit. For bf16 and fp16 weights the moments stay in fp32: with
b2 = 0.999 the change of v in a step is below bf16's resolution, and v would stand still.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optim.base import CHUNK, Group, MemoryOptimizer, State, contiguous_as, state_dtype


def adamw_update_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    authors: bool = False,
) -> None:
    """Step tensors of one device and dtype in place; `step` counts from 1. Gradients are read, never written.

    `authors` is the order of the low-rank papers' packages: eps added to the root of the uncorrected v, which is
    torch's with eps / sqrt(1 - b2^t), and decay of the updated weights instead of the old ones.
    """
    if authors:
        eps /= math.sqrt(1.0 - betas[1] ** step)
    fused_ = partial(_fused_, step=step, lr=lr, betas=betas, eps=eps, weight_decay=0.0 if authors else weight_decay)
    grads = [contiguous_as(grad, p) for p, grad in zip(params, grads, strict=True)]
    if params[0].dtype == exp_avgs[0].dtype:
        fused_(params, grads, exp_avgs, exp_avg_sqs)
    else:
        for tensors in zip(params, grads, exp_avgs, exp_avg_sqs, strict=True):
            for p, grad, exp_avg, exp_avg_sq in zip(*map(_chunks, tensors), strict=True):
                wide = p.to(exp_avg.dtype)
                fused_([wide], [grad.to(wide.dtype)], [exp_avg], [exp_avg_sq])
                p.copy_(wide)
    if authors and weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)


def _fused_(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
) -> None:
    count = torch.full((), float(step), device=params[0].device)  # the kernel reads it on the device
    torch._fused_adamw_(
        params,
        grads,
        exp_avgs,
        exp_avg_sqs,
        [],
        [count] * len(params),
        lr=lr,
        beta1=betas[0],
        beta2=betas[1],
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )


def _chunks(tensor: Tensor) -> Sequence[Tensor]:
    """Slices of whole rows, about CHUNK values each; a tensor that is not contiguous stays whole."""
    if tensor.numel() <= CHUNK or not tensor.is_contiguous():
        return (tensor,)
    return torch.split(tensor, max(CHUNK * tensor.shape[0] // tensor.numel(), 1))


def adamw_state(p: Tensor) -> State:
    """The state of a parameter that AdamW steps: here, and as the fallback of the low-rank optimizers."""
    dtype = state_dtype(p.dtype)
    return {"step": 0, "exp_avg": torch.zeros_like(p, dtype=dtype), "exp_avg_sq": torch.zeros_like(p, dtype=dtype)}


def adamw_state_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    """Bytes of `adamw_state`."""
    return 2 * math.prod(shape) * state_dtype(dtype).itemsize


def adamw_step_(params: list[Tensor], state: Mapping[Tensor, State], group: Group) -> None:
    """Step parameters that have gradients, all of a kind in one call of the kernel."""
    alike: dict[tuple[Any, ...], list[Tensor]] = defaultdict(list)
    for p in params:
        state[p]["step"] += 1
        alike[p.device, p.dtype, state[p]["step"]].append(p)
    for (_, _, step), batch in alike.items():
        adamw_update_(
            batch,
            [p.grad for p in batch if p.grad is not None],
            [state[p]["exp_avg"] for p in batch],
            [state[p]["exp_avg_sq"] for p in batch],
            step=step,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            authors=group.get("compat") == "authors",
        )


class AdamW(MemoryOptimizer):
    """AdamW with at least fp32 moments, made at construction. Takes parameters, (name, parameter) pairs or groups."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def init_state(self, p: Tensor, group: Group) -> State:
        return adamw_state(p)

    def update(self, params: list[Tensor], group: Group) -> None:
        adamw_step_(params, self.state, group)

    @classmethod
    def state_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype = torch.float32) -> int:
        return adamw_state_bytes(shape, dtype)
