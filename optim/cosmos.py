"""COSMOS: SOAP in the leading eigenspace of the gradient, Muon's orthogonalised momentum in the rest.

For W (m, n) with gradient G; where m < n all of it is done to the transposes, so that U is on the smaller side k:
    M <- b1 M + G
    U <- qr(b2 U S + (1 - b2) G^T G U)                  (k, r); at the first step the leading eigenvectors of G^T G
    S <- b2 K^T S K + (1 - b2) (G U)^T (G U)            (r, r), K = U_old^T U
    V <- b2 V + (1 - b2) (G U)^2                        (long side, r)
    g = (G + b1 M) / (1 + b1 (1 - b1^t) / (1 - b1))     Nesterov
    A = [(g U) / (sqrt(V / (1 - b2^t)) + eps)] U^T,  B = unit(newton_schulz(g - g U U^T))
    W <- (1 - lr wd) W - lr lr_ratio unit(A + gamma B),  unit(X) = sqrt(m n) X / |X|
State: 4 (m n + r long + r k + r^2) bytes per matrix; M and V less with a codec. Everything else takes AdamW.
Paper: Liu et al. 2025, arXiv:2502.17410, with the order of its code at commit 61de180; code and paper differ where
code drops the momentum without Nesterov, which is therefore the only form here.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from optim.base import Group, State, read, state_dtype
from optim.codec import codec_for
from optim.compose import ComposedOptimizer
from optim.projection import gram_basis
from optim.rules import Stepped

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Newton-Schulz (Jordan 2024, Muon): fast, singular values end between 0.7 and 1.2."""
PASSES = 5


def newton_schulz(x: Tensor, eps: float) -> Tensor:
    """About U V^T for x = U diag(s) V^T, in the dtype of x."""
    a, b, c = QUINTIC
    wide = x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (torch.linalg.vector_norm(x) + eps)
    for _ in range(PASSES):
        gram = x @ x.T
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide else x.T


def cosmos_direction(
    grad: Tensor, first: Tensor, second: Tensor, basis: Tensor, moment: Tensor,
    *, step: int, betas: tuple[float, float], eps: float, gamma: float, low_precision: bool,
) -> Tensor:  # fmt: skip
    """unit(A + gamma B) of a tall gradient (m, k); all states are updated in place.

    Args:
        first, second: M (m, k) and V (m, r).
        basis: U^T (r, k).
        moment: S (r, r).
        step: counts from 1.
        low_precision: run Newton-Schulz in bf16.
    """
    beta1, beta2 = betas
    first.mul_(beta1).add_(grad)
    if step == 1:
        basis.copy_(gram_basis(grad, basis.shape[0], "right"))
        low = grad @ basis.T
        moment.copy_((1 - beta2) * (low.T @ low))
    else:
        pulled = (1 - beta2) * ((grad @ basis.T).T @ grad) + beta2 * (moment @ basis)
        fresh = torch.linalg.qr(pulled.T).Q.T
        turn = basis @ fresh.T
        basis.copy_(fresh)
        low = grad @ basis.T
        moment.copy_(beta2 * (turn.T @ moment @ turn) + (1 - beta2) * (low.T @ low))
    second.lerp_(low.square(), 1 - beta2)
    nesterov = (grad + beta1 * first) / (1 + beta1 * (1 - beta1**step) / (1 - beta1))
    inside = nesterov @ basis.T
    leading = (inside / ((second / (1 - beta2**step)).sqrt_() + eps)) @ basis
    rest = nesterov.addmm_(inside, basis, alpha=-1.0)
    rest = newton_schulz(rest.bfloat16() if low_precision else rest, eps).to(rest.dtype)
    return unit(leading + gamma * unit(rest, eps), eps)


def unit(x: Tensor, eps: float) -> Tensor:
    """x with a root mean square of 1."""
    factor: Tensor = math.sqrt(x.numel()) / (torch.linalg.vector_norm(x) + eps)
    return x * factor


class COSMOS(ComposedOptimizer):
    """COSMOS where a group with a `rank` holds matrices; all else takes AdamW.

    Group keys: `rank, lr_ratio (0.1), gamma (0.2)`; a matrix moves by lr lr_ratio per value and step. Newton-Schulz
    runs in bf16 for bf16 weights, in the precision of the math otherwise.
    """

    choices = {"rank": None, "lr_ratio": 0.1, "gamma": 0.2}

    def __init__(
        self,
        params: Any,
        lr: float = 2e-3,
        betas: tuple[float, float] = (0.95, 0.95),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)

    def check_matrix_options(self, group: Group) -> None:
        if not isinstance(group["rank"], int) or group["rank"] < 1:
            raise ValueError(f"rank={group['rank']!r}: must be a whole number of at least 1")
        for key in ("lr_ratio", "gamma"):
            if not 0 <= group[key] < math.inf:
                raise ValueError(f"{key}={group[key]}: must be a finite number of at least 0")

    def reduces(self, p: Tensor, group: Group) -> bool:
        return False  # the momentum is of the whole gradient's size

    def matrix_state(self, p: Tensor, group: Group) -> State:
        wide = state_dtype(p.dtype)
        state: State = {"step": 0}
        for key, shape in _coded(p.shape, group).items():
            state |= codec_for(group["states"], shape).new(key, p, shape, wide)
        return state | {key: p.new_zeros(shape, dtype=wide) for key, shape in _exact(p.shape, group).items()}

    @classmethod
    def matrix_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype) -> int:
        wide = state_dtype(dtype)
        coded = sum(codec_for(group["states"], s).nbytes(s, wide) for s in _coded(shape, group).values())
        return coded + sum(math.prod(s) for s in _exact(shape, group).values()) * wide.itemsize

    def step_matrix(self, item: Stepped, name: str, group: Group) -> bool:
        state, p, wide = item.state, item.param, state_dtype(item.param.dtype)
        if self.check_finite and not read(torch.isfinite(item.grad.sum(dtype=wide)), usual=1.0):
            return False
        state["step"] += 1
        codecs = {key: codec_for(group["states"], shape) for key, shape in _coded(p.shape, group).items()}
        values = {
            key: codec.read(state, key, slice(None), wide, signed=key == "exp_avg") for key, codec in codecs.items()
        }
        tall = p.shape[0] >= p.shape[1]
        grad = item.grad.to(wide)
        direction = cosmos_direction(
            grad if tall else grad.T, values["exp_avg"] if tall else values["exp_avg"].T, values["exp_avg_sq"],
            state["basis"], state["moment"], step=state["step"], betas=group["betas"], eps=group["eps"],
            gamma=group["gamma"], low_precision=p.dtype is torch.bfloat16,
        )  # fmt: skip
        for key, codec in codecs.items():
            codec.write(state, key, slice(None), values[key], signed=key == "exp_avg")
        stepped = p.to(wide) if p.dtype != wide else p
        stepped.mul_(1 - group["lr"] * group["weight_decay"])
        stepped.sub_(direction if tall else direction.T, alpha=group["lr"] * group["lr_ratio"])
        if stepped is not p:
            item.store(p, stepped)
        return True


def _coded(shape: Sequence[int], group: Group) -> dict[str, tuple[int, ...]]:
    """Shapes of the moments that a codec may keep."""
    return {"exp_avg": tuple(shape), "exp_avg_sq": (max(shape), min(group["rank"], *shape))}


def _exact(shape: Sequence[int], group: Group) -> dict[str, tuple[int, int]]:
    """Shapes of U^T and S."""
    rank = min(group["rank"], *shape)
    return {"basis": (rank, min(shape)), "moment": (rank, rank)}
