"""GaLore-AdamW: Adam on the gradient projected into a subspace that is refreshed now and then.

Every T steps: Q <- about the leading r singular vectors of G, on one side.
For W (out, in) with gradient G, right side (left is the mirror image, see `projection.py`):
    R = G Q^T                                          (out, r)
    N = the step of Adam on R; what becomes of its moments when Q changes is `on_refresh`
    W <- (1 - lr wd) W - lr scale N Q
State: m and v (out, r) and Q (r, in), fp32 (fp64 for fp64 weights): 4 (2 r out + r in) bytes per matrix.
Everything else (embedding, head, norms, biases) takes plain AdamW without `scale`.
Paper: Zhao et al. 2024, arXiv:2403.03507, algorithm 2. Left out: projection of both sides, tensors beyond matrices.
"""

from typing import Any

from optim.compose import ComposedOptimizer


class LowRankAdamW(ComposedOptimizer):
    """Base of the projected optimizers on Adam; keyword arguments are defaults of the group keys.

    Args:
        params: parameters, (name, parameter) pairs, or groups; a group with a `rank` is projected.
        lr: learning rate of projected and plain parameters alike.
        betas: decay rates of the two moments.
        eps: default 1e-8; with compat="authors" 1e-6, as theirs.
        weight_decay: decoupled decay; `scale` does not touch it.
        refresh: how a basis is found, the class's choice by default; "svd" with compat="authors".
        on_refresh: what becomes of the moments: "keep", "sign" and "procrustes" turn the new basis to the old one,
            "rotate" turns the moments to the new basis, "reset" begins them anew.
        basis: "fp32", or "int4" to keep the basis in half a byte a value.
        stagger: spread the refreshes of different matrices over the gap, by their names.
        lazy: double a matrix's gap while the last five overlaps of its subspaces average `lazy_threshold`.
        states: codec of the moments: "fp32", "bf16", "int8", "int4" or "fp8".
        rounding: how bf16 weights take an fp32 step: "nearest" or "stochastic".
        compat: "torch" (eps after the bias correction, decay before the update) or "authors", which follows
            the authors' package step for step: eps before the correction, decay after the update, the solver's signs.
    """

    choices: dict[str, Any] = {"scale": 1.0, "refresh": "warm"}
    """What this method chooses where the user does not."""

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        refresh: str | None = None,
        on_refresh: str = "keep",
        basis: str = "fp32",
        stagger: bool = False,
        lazy: bool = False,
        lazy_threshold: float = 0.4,
        states: str = "fp32",
        rounding: str = "nearest",
        compat: str = "torch",
    ) -> None:
        authors = compat == "authors"
        exact = "svd" if authors and self.choices["refresh"] == "warm" else self.choices["refresh"]
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": (1e-6 if authors else 1e-8) if eps is None else eps,
            "weight_decay": weight_decay,
            "rank": None,
            "update_proj_gap": 200,
            "proj_type": "std",
            "on_refresh": on_refresh,
            "basis": basis,
            "stagger": stagger,
            "lazy": lazy,
            "lazy_threshold": lazy_threshold,
            "states": states,
            "rounding": rounding,
            "compat": compat,
        }
        super().__init__(params, defaults | self.choices | {"refresh": exact if refresh is None else refresh})


class GaLoreAdamW(LowRankAdamW):
    """GaLore-AdamW. Groups with a `rank` are projected where they hold matrices; all else takes AdamW.

    Group keys are those of galore-torch: `rank, update_proj_gap (200), scale (0.25), proj_type ("std")`.
    The basis is found by an eigendecomposition first and a warm-started power iteration from then on.
    """

    choices = {"scale": 0.25, "refresh": "warm"}
