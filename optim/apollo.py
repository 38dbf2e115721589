"""APOLLO: the raw gradient, scaled per channel as Adam would, which a small random projection is enough to tell.

Every T steps: P ~ N(0, 1/r), from the parameter's name and the number of the refresh.
For W (out, in) with gradient G, right side:
    R = G P^T                                          (out, r)
    s = |N| / |R| per row, N the step of Adam on R     (out, 1); APOLLO-Mini: rank 1 and one s for the matrix
    W <- (1 - lr wd) W - lr a sqrt(scale) limit(G s)
with a and limit() as in `lift.py`. The theory gives sqrt(in / r) for sqrt(scale); the authors leave that to the rate.
State: m and v (out, r), P (r, in) and one number, fp32: 4 (2 r out + r in + 1) bytes per matrix.
Paper: Zhu et al. 2024, arXiv:2412.05270, algorithm 1.
"""

from typing import Any

from torch import Tensor

from optim.base import Group, State
from optim.galore import LowRankAdamW
from optim.options import SUBSPACE_DEFAULTS

SCALE_TYPES = ("channel", "tensor")
PROJ = {"random": "random", "svd": "svd"}


class APOLLO(LowRankAdamW):
    """APOLLO. Groups with a `rank` are projected where they hold matrices; all else takes AdamW.

    Group keys are those of apollo-torch: `rank, update_proj_gap (200), scale (1), proj_type ("std"),
    proj ("random" or "svd"), scale_type ("channel" or "tensor")`. With compat="authors" it follows apollo-torch 1.0.3
    step for step, its seeds by position in the list of parameters included. `q_compat` limits the growth of updates
    after Adam's bias correction instead of before it, as the authors' Q-APOLLO does. Their `scale_front`, whether the
    scale comes before the limiter, is taken and makes no difference.
    """

    choices = SUBSPACE_DEFAULTS | {"scale": 1.0, "refresh": "random", "scale_type": "channel", "q_compat": False}

    def __init__(self, params: Any, *args: Any, scale_front: bool = False, **options: Any) -> None:
        # The limiter compares norms of updates, which a scale before it changes alike: nothing else follows from it.
        super().__init__(params, *args, **options)

    def add_param_group(self, param_group: Group) -> None:
        if "proj" in param_group:
            proj = param_group.pop("proj")
            if proj not in PROJ:
                raise ValueError(f"proj={proj!r}: must be one of {', '.join(PROJ)}")
            param_group = {"refresh": PROJ[proj], **param_group}
        super().add_param_group(param_group)

    def check_options(self, group: Group) -> None:
        if group["scale_type"] not in SCALE_TYPES:
            raise ValueError(f"scale_type={group['scale_type']!r}: must be one of {', '.join(SCALE_TYPES)}")
        super().check_options(group)

    def matrix_state(self, p: Tensor, group: Group) -> State:
        state = super().matrix_state(p, group)
        if group["compat"] == "authors" and group["refresh"] == "random":
            # Their seeds are positions in the list of all parameters.
            listed = [q for each in self.param_groups for q in each["params"]]
            state["seed"] = 1 + next(i for i, q in enumerate(listed) if q is p)
        return state

    @classmethod
    def lift_of(cls, group: Group) -> str:
        return str(group["scale_type"])


APOLLOAdamW = APOLLO
"""Its name in apollo-torch."""


class APOLLOMini(APOLLO):
    """APOLLO with one scale per matrix; meant for rank 1, where states all but vanish. `scale` is the authors' 128."""

    choices = SUBSPACE_DEFAULTS | {
        "scale": 128.0,
        "refresh": "random",
        "scale_type": "tensor",
        "q_compat": False,
    }
