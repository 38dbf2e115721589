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

Of a sharded matrix each rank steps a part of the long side, with k whole. Newton-Schulz then needs the k x k Gram
matrix of its rows summed in each pass, and S and U products of r: a rank sends, in values,
    r k (U, shared out by its rows) + 2 r k + 2 r^2 + 5 * 2 k^2, and 2 m n / D where the shards cut the smaller side,
whose parts an all-to-all exchanges for parts of the long one and back. Handing every matrix to one rank would send
2 m n / D for n of them at once, fewer where D is large; but that rank would hold it whole, and in a backward hook,
which has one matrix at a time, all others would wait for it.
Paper: Liu et al. 2025, arXiv:2502.17410, with the order of its code at commit 61de180; code and paper differ where
code drops the momentum without Nesterov, which is therefore the only form here.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from optim.base import Group, State, read, state_dtype
from optim.codec import PLAIN, codec_for
from optim.compose import ComposedOptimizer, Known
from optim.projection import gram_basis
from optim.rules import Stepped
from optim.sharded import new_tensors
from parallel.dtensor import WHOLE, Layout, local

QUINTIC = (3.4445, -4.7750, 2.0315)
"""Coefficients of Newton-Schulz (Jordan 2024, Muon): fast, singular values end between 0.7 and 1.2."""
PASSES = 5


def newton_schulz(x: Tensor, eps: float, over: Layout = WHOLE) -> Tensor:
    """About U V^T for x = U diag(s) V^T, in the dtype of x. Rows that `over` shares out are the longer side."""
    a, b, c = QUINTIC
    wide = over.whole and x.shape[0] <= x.shape[1]
    x = x if wide else x.T
    x = x / (over.norms(x)[0] + eps)
    for _ in range(PASSES):
        gram = over.sum_(x @ x.T)
        x = a * x + torch.addmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x if wide else x.T


def cosmos_direction(
    grad: Tensor, first: Tensor, second: Tensor, basis: Tensor, moment: Tensor,
    *, step: int, betas: tuple[float, float], eps: float, gamma: float, low_precision: bool, over: Layout = WHOLE,
) -> Tensor:  # fmt: skip
    """unit(A + gamma B) of a tall gradient (m, k); all states are updated in place.

    Args:
        first, second: M (m, k) and V (m, r).
        basis: U^T (r, k).
        moment: S (r, r).
        step: counts from 1.
        low_precision: run Newton-Schulz in bf16.
        over: layout of the gradient, M and V where their rows are shared out.
    """
    beta1, beta2 = betas
    first.mul_(beta1).add_(grad)
    if step == 1:
        basis.copy_(gram_basis(grad, basis.shape[0], "right", over))
        low = grad @ basis.T
        moment.copy_((1 - beta2) * over.sum_(low.T @ low))
    else:
        pulled = (1 - beta2) * over.sum_((grad @ basis.T).T @ grad) + beta2 * (moment @ basis)
        fresh = torch.linalg.qr(pulled.T).Q.T
        turn = basis @ fresh.T
        basis.copy_(fresh)
        low = grad @ basis.T
        moment.copy_(beta2 * (turn.T @ moment @ turn) + (1 - beta2) * over.sum_(low.T @ low))
    second.lerp_(low.square(), 1 - beta2)
    nesterov = (grad + beta1 * first) / (1 + beta1 * (1 - beta1**step) / (1 - beta1))
    inside = nesterov @ basis.T
    leading = (inside / ((second / (1 - beta2**step)).sqrt_() + eps)) @ basis
    if basis.shape[0] == basis.shape[1]:  # nothing is left but rounding, which must not be scaled up
        return unit(leading, eps, over)
    rest = nesterov.addmm_(inside, basis, alpha=-1.0)
    rest = newton_schulz(rest.bfloat16() if low_precision else rest, eps, over).to(rest.dtype)
    return unit(leading + gamma * unit(rest, eps, over), eps, over)


def unit(x: Tensor, eps: float, over: Layout) -> Tensor:
    """x with a root mean square of 1."""
    count = x.numel() if over.whole else math.prod(over.shape)
    factor: Tensor = math.sqrt(count) / (over.norms(x)[0] + eps)
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

    def reduced_bytes(self, p: Tensor, group: Group) -> int | None:
        return None  # the momentum is of the whole gradient's size

    def matrix_state(self, p: Tensor, group: Group) -> State:
        wide, layout = state_dtype(p.dtype), self._layout(p)
        state: dict[str, Any] = {"step": 0}
        for key, place in _coded(layout, group).items():
            codec = codec_for(group["states"], place.shape)
            state |= new_tensors(partial(codec.new, key, wide=wide), local(p), codec.home(place))
        basis, moment = _exact(p.shape, group).values()
        state |= new_tensors(partial(PLAIN.new, "basis", wide=wide), local(p), layout.like(basis, 0))
        return state | {"moment": local(p).new_zeros(moment, dtype=wide)}

    @classmethod
    def matrix_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype) -> int:
        wide = state_dtype(dtype)
        places = [place.shape for place in _coded(Layout(tuple(shape)), group).values()]
        coded = sum(codec_for(group["states"], place).nbytes(place, wide) for place in places)
        return coded + sum(math.prod(s) for s in _exact(shape, group).values()) * wide.itemsize

    def step_matrices(self, batch: list[tuple[Stepped, Known]], group: Group, *, reduced: bool = False) -> None:
        # One by one: what a step holds, and the sums over ranks, are too large to be put together.
        for item, known in batch:
            finite = torch.isfinite(item.grad.sum(dtype=state_dtype(item.param.dtype)))
            if self.check_finite and item.layout.whole and not read(finite, usual=1.0):
                self._skip(known.name)
            else:
                self._step_matrix(item, group)

    def _step_matrix(self, item: Stepped, group: Group) -> None:
        state, p, wide, layout = item.state, item.param, state_dtype(item.param.dtype), item.layout
        state["step"] += 1
        places = _coded(layout, group)
        codecs = {key: codec_for(group["states"], place.shape) for key, place in places.items()}
        homes = {key: codec.home(places[key]) for key, codec in codecs.items()}
        held = {
            key: codec.read(state, key, slice(None), wide, signed=key == "exp_avg", width=homes[key].local_shape[1])
            for key, codec in codecs.items()
        }
        long, home = places["exp_avg"], homes["exp_avg"]
        first, grad = home.move(held["exp_avg"], long.dim), layout.move(item.grad.to(wide), long.dim)
        tall = layout.shape[0] >= layout.shape[1]
        basis_layout = layout.like(_exact(layout.shape, group)["basis"], 0)
        basis = basis_layout.gather(state["basis"])
        direction = cosmos_direction(
            grad if tall else grad.T, first if tall else first.T, held["exp_avg_sq"], basis, state["moment"],
            step=state["step"], betas=group["betas"], eps=group["eps"], gamma=group["gamma"],
            low_precision=p.dtype is torch.bfloat16, over=long if tall else long.like(layout.shape[::-1], 0),
        )  # fmt: skip
        if basis is not state["basis"]:
            state["basis"].copy_(basis_layout.cut(basis))
        held["exp_avg"] = long.move(first, home.dim)
        for key, codec in codecs.items():
            codec.write(state, key, slice(None), held[key], signed=key == "exp_avg")
        direction = long.move(direction if tall else direction.T, layout.dim)
        stepped = p.to(wide) if p.dtype != wide else p
        stepped.mul_(1 - group["lr"] * group["weight_decay"])
        stepped.sub_(direction, alpha=group["lr"] * group["lr_ratio"])
        if stepped is not p:
            item.store(p, stepped)


def _coded(layout: Layout, group: Group) -> dict[str, Layout]:
    """The moments that a codec may keep, shared out along the longer side."""
    shape = layout.shape
    low = (max(shape), min(group["rank"], *shape))
    return {"exp_avg": layout.like(shape, 0 if shape[0] >= shape[1] else 1), "exp_avg_sq": layout.like(low, 0)}


def _exact(shape: Sequence[int], group: Group) -> dict[str, tuple[int, int]]:
    """Shapes of U^T and S."""
    rank = min(group["rank"], *shape)
    return {"basis": (rank, min(shape)), "moment": (rank, rank)}
