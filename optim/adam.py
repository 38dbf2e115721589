"""The math of Adam with decoupled weight decay, as one fused pass over many tensors.

    W <- (1 - lr wd) W
    m <- b1 m + (1 - b1) G;  v <- b2 v + (1 - b2) G*G
    W <- W - lr (m / (1 - b1^t)) / (sqrt(v / (1 - b2^t)) + eps)
Paper: Loshchilov, Hutter 2019, arXiv:1711.05101, algorithm 2. Left out: amsgrad, maximize.

The kernel is torch's fused AdamW, one call for all tensors of a kind: the result is that of
`torch.optim.AdamW(fused=True)` bit for bit.
"""

import math

import torch
from torch import Tensor

UNCORRECTED = 10**9
"""A step count whose bias corrections are 1: no beta below 1 - 1e-7 has a power of it that fp64 can tell from 0."""


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
    raw: bool = False,
) -> None:
    """Step tensors of one device and dtype in place; `step` counts from 1. Gradients are read, never written.

    All tensors of one place in the lists must be laid out alike: the kernel walks raw memory.

    Args:
        authors: the order of the low-rank papers' packages: eps added to the root of the uncorrected v, which is
            torch's with eps / sqrt(1 - b2^t), and decay of the updated weights instead of the old ones.
        raw: leave the factor sqrt(1 - b2^t) / (1 - b1^t) out of the step, for a caller that applies it later.
    """
    root = math.sqrt(1.0 - betas[1] ** step)
    if authors and not raw:
        eps /= root
    if raw and not authors:
        eps *= root
    count = torch.full((), float(UNCORRECTED if raw else step), device=params[0].device)  # read on the device
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
        weight_decay=0.0 if authors else weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
    )
    if authors and weight_decay:
        torch._foreach_mul_(params, 1.0 - lr * weight_decay)
