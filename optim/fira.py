"""Fira: GaLore, and the part of the gradient outside the subspace scaled as Adam scales the part inside.

    W <- (1 - lr wd) W - lr a [scale back(N) + limit((G - scale back(R)) s)],  s = |N| / |R| per channel
with N, s, a and limit() as in `lift.py`. The authors' code has `scale` in both turns back, and so has this.
State: GaLore's and one number: 4 (2 r out + r in + 1) bytes per matrix.
Paper: Chen et al. 2024, arXiv:2410.01623, algorithm 1.
"""

from optim.base import Group
from optim.galore import LowRankAdamW


class Fira(LowRankAdamW):
    """Fira on Adam. Group keys as GaLore's: `rank, update_proj_gap (200), scale (0.25), proj_type ("std")`; the
    authors' package calls the scale `alpha`, which is taken too. With compat="authors" it follows fira 1.0.2 step for
    step, whose alpha is 1 where none is given.
    """

    lift = "fira"

    def add_param_group(self, param_group: Group) -> None:
        if "alpha" in param_group:
            param_group = {"scale": param_group["alpha"], **param_group}
            del param_group["alpha"]
        super().add_param_group(param_group)


FiraAdamW = Fira
"""Its name in the authors' package."""
