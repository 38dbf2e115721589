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
    """Base of the projected optimizers on Adam.

    Args:
        params: parameters, (name, parameter) pairs, or groups; a group with a `rank` is projected.
        lr: learning rate of projected and plain parameters alike.
        betas: decay rates of the two moments.
        eps: default 1e-8; with compat="authors" 1e-6, as theirs.
        weight_decay: decoupled decay; `scale` does not touch it.
        compat: "torch" (eps after the bias correction, decay before the update) or "authors", which follows
            the authors' package step for step: eps before the correction, decay after the update, the solver's signs.
        correct_bias: as the authors' packages have it; only True.
        no_deprecation_warning: theirs; there is none here.
        options: `states`, `rounding` and what `optim.options.SUBSPACE_DEFAULTS` lists, as defaults of the groups.
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 0.0,
        *,
        correct_bias: bool = True,
        no_deprecation_warning: bool = True,
        compat: str = "torch",
        **options: Any,
    ) -> None:
        if not correct_bias:
            raise ValueError("correct_bias=False: Adam's moments are corrected here; leave it out")
        authors = compat == "authors"
        if authors and self.choices["refresh"] == "warm":
            options = {"refresh": "svd", **options}
        eps = (1e-6 if authors else 1e-8) if eps is None else eps
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "compat": compat}
        super().__init__(params, defaults, options)


class GaLoreAdamW(LowRankAdamW):
    """GaLore-AdamW. Groups with a `rank` are projected where they hold matrices; all else takes AdamW.

    Group keys are those of galore-torch: `rank, update_proj_gap (200), scale (0.25), proj_type ("std")`.
    """


class GaLoreAdamW8bit(GaLoreAdamW):
    """GaLore-AdamW with moments in 8 bits: `states="int8"`, and galore-torch's default for the weight decay."""

    choices = GaLoreAdamW.choices | {"states": "int8"}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float | None = None,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, lr, betas, eps, weight_decay, **options)
