"""GaLore-AdamW: Adam on the gradient projected into a subspace that is refreshed now and then.

Every T steps: Q <- leading r singular vectors of G, on one side.
For W (out, in) with gradient G, right side (left is the mirror image, see `projection.py`):
    R = G Q^T                                          (out, r)
    N = the step of Adam on R, moments m and v kept as they are when Q changes
    W <- (1 - lr wd) W - lr scale N Q
State: m and v (out, r) and Q (r, in), fp32 (fp64 for fp64 weights): 4 (2 r out + r in) bytes per matrix.
Everything else (embedding, head, norms, biases) takes plain AdamW without `scale`.
Paper: Zhao et al. 2024, arXiv:2403.03507, algorithm 2. Left out: projection of both sides, tensors beyond matrices.
"""

import logging
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from optim.adamw import adamw_state, adamw_state_bytes, adamw_step_, adamw_update_
from optim.base import Group, MemoryOptimizer, State, read, state_dtype
from optim.projection import METHODS, Side, add_back_, basis_shape, find_basis, low_shape, project, side_of

log = logging.getLogger(__name__)

PROJ_TYPES = ("std", "reverse_std", "left", "right")
COMPAT = ("torch", "authors")


def galore_update_(
    param: Tensor,
    grad: Tensor,
    basis: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    side: Side,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    scale: float,
    authors: bool = False,
    check_finite: bool = True,
) -> bool:
    """Step one matrix in place; `step` counts from 1. False, and nothing written, if the gradient is not finite.

    Workspace: two tensors of the projected gradient's shape. Decay and update enter the weight in one product.
    """
    low = project(grad, basis, side)
    # One non-finite element of G makes at least one of R non-finite (0 times inf is NaN), and R is smaller.
    if check_finite and not read(torch.isfinite(low.sum()), usual=1.0):
        return False
    delta = torch.zeros_like(low)  # stands in for the weight, so that the fused step leaves -lr N in it
    adamw_update_(
        [delta],
        [low],
        [exp_avg],
        [exp_avg_sq],
        step=step,
        lr=lr,
        betas=betas,
        eps=eps,
        weight_decay=0.0,
        authors=authors,
    )
    decay = 1.0 - lr * weight_decay
    add_back_(param, delta, basis, side, beta=decay, alpha=scale * decay if authors else scale)
    return True


class GaLoreAdamW(MemoryOptimizer):
    """GaLore-AdamW. Groups with a `rank` are projected where they hold matrices; all else takes AdamW.

    Group keys are those of galore-torch: `rank, update_proj_gap (200), scale (0.25), proj_type ("std")`.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: learning rate of projected and plain parameters alike.
        betas: decay rates of the two moments.
        eps: default 1e-8; with compat="authors" 1e-6, as theirs.
        weight_decay: decoupled decay; `scale` does not touch it.
        refresh: "gram" or "svd", how a basis is found; default "gram", with compat="authors" "svd".
        compat: "torch" (eps after the bias correction, decay before the update) or "authors", which follows
            galore-torch 1.0 step for step: eps before the correction, decay after the update, the solver's signs.

    `skipped` counts updates left out because a matrix's gradient was not finite: its weight, moments and basis stay
    as they were, and a refresh that was due is made at the next step. The trainer finds such gradients before any
    optimizer runs; this guards other loops, at the price of one read per matrix from the device.
    """

    skipped: int = 0

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        refresh: str | None = None,
        compat: str = "torch",
    ) -> None:
        authors = compat == "authors"
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": (1e-6 if authors else 1e-8) if eps is None else eps,
            "weight_decay": weight_decay,
            "rank": None,
            "update_proj_gap": 200,
            "scale": 0.25,
            "proj_type": "std",
            "refresh": ("svd" if authors else "gram") if refresh is None else refresh,
            "compat": compat,
        }
        super().__init__(params, defaults)

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        for key, known in (("proj_type", PROJ_TYPES), ("refresh", tuple(METHODS)), ("compat", COMPAT)):
            if group[key] not in known:
                raise ValueError(f"{key}={group[key]!r}: must be one of {', '.join(known)}")
        if group["rank"] is None:
            return
        for key in ("rank", "update_proj_gap"):
            if not isinstance(group[key], int) or group[key] < 1:
                raise ValueError(f"{key}={group[key]!r}: must be a whole number of at least 1")
        if not 0 < group["scale"] < math.inf:
            raise ValueError(f"scale={group['scale']}: must be a finite number above 0; 0.25 is usual")
        self._warn_of_cut_ranks(group)

    def init_state(self, p: Tensor, group: Group) -> State:
        if not _projected(p.shape, group):
            return adamw_state(p)
        if isinstance(p, DTensor):
            raise ValueError(
                f"{self.name_of(p)} is sharded ({p.placements}), and GaLore cannot project shards. "
                "Use parallel.zero=0 or optim=adamw."
            )
        side = side_of(p.shape, group["proj_type"])
        dtype = state_dtype(p.dtype)
        low = low_shape(p.shape, group["rank"], side)
        return {
            "step": 0,
            "captured": 0.0,  # share of the gradient's energy in the basis when it was made; 0 while there is none
            "basis": p.new_zeros(basis_shape(p.shape, group["rank"], side), dtype=dtype),
            "exp_avg": p.new_zeros(low, dtype=dtype),
            "exp_avg_sq": p.new_zeros(low, dtype=dtype),
        }

    def update(self, params: list[Tensor], group: Group) -> None:
        plain = [p for p in params if not _projected(p.shape, group)]
        adamw_step_(plain, self.state, group)
        for p in params:
            if _projected(p.shape, group):
                self._update_projected(p, group)

    def _update_projected(self, p: Tensor, group: Group) -> None:
        assert p.grad is not None, "update() is given parameters with gradients"
        state = self.state[p]
        side = side_of(p.shape, group["proj_type"])
        if state["step"] % group["update_proj_gap"] == 0 or state["captured"] == 0.0:
            self._refresh(p.grad, state, side, group)
        stepped = galore_update_(
            p,
            p.grad,
            state["basis"],
            state["exp_avg"],
            state["exp_avg_sq"],
            side=side,
            step=state["step"] + 1,
            lr=group["lr"],
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            scale=group["scale"],
            authors=group["compat"] == "authors",
            check_finite=self.check_finite,
        )
        if stepped:
            state["step"] += 1
        else:
            self.skipped += 1
            log.warning("gradient of %s is not finite: weight and state left as they were", self.name_of(p))

    def _refresh(self, grad: Tensor, state: State, side: Side, group: Group) -> None:
        """Replace the basis; keep it if the gradient is zero, in which no direction leads, or not finite."""
        basis = state["basis"]
        peak = read(torch.linalg.vector_norm(grad, math.inf), usual=1.0)
        if not 0.0 < peak < math.inf:
            return
        # Squares of a very small or very large gradient leave fp32's range.
        wide = basis.dtype if 1e-12 < peak < 1e12 else torch.float64
        fix_signs = group["compat"] != "authors"
        basis.copy_(find_basis(grad, basis.shape[0], side, group["refresh"], wide, fix_signs=fix_signs))
        inside = torch.linalg.vector_norm(project(grad, basis, side), dtype=wide)
        captured = (inside / torch.linalg.vector_norm(grad, dtype=wide)).square()
        state["captured"] = read(captured, usual=1.0)

    def _warn_of_cut_ranks(self, group: Group) -> None:
        cut = [p for p in group["params"] if p.dim() == 2 and min(p.shape) < group["rank"]]
        if cut:
            warnings.warn(
                f"rank={group['rank']} exceeds the smaller side of {len(cut)} matrices, such as {self.name_of(cut[0])} "
                f"{tuple(cut[0].shape)}: each takes the full rank of its smaller side, which saves little or nothing",
                stacklevel=2,
            )

    @classmethod
    def state_bytes(cls, shape: Sequence[int], group: Group, dtype: torch.dtype = torch.float32) -> int:
        if not _projected(shape, group):
            return adamw_state_bytes(shape, dtype)
        side = side_of(shape, group.get("proj_type", "std"))
        basis, low = basis_shape(shape, group["rank"], side), low_shape(shape, group["rank"], side)
        return (math.prod(basis) + 2 * math.prod(low)) * state_dtype(dtype).itemsize


def _projected(shape: Sequence[int], group: Group) -> bool:
    return group.get("rank") is not None and len(shape) == 2
