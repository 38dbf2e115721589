"""SGD with momentum, plain or in a subspace, where it is the oracle: at full rank and scale 1 it equals itself.

    m <- mu m + G;  W <- (1 - lr wd) W - lr m
State: m, 4 bytes per value (less with a codec); of a projected matrix 4 (r out + r in) bytes.
torch.optim.SGD without dampening, with decoupled decay.
"""

from typing import Any

from optim.base import Group
from optim.compose import ComposedOptimizer
from optim.rules import SGDRule


class SGD(ComposedOptimizer):
    """SGD with momentum. Groups with a `rank` are projected where they hold matrices.

    Further options: `states`, `rounding` and what `optim.options.SUBSPACE_DEFAULTS` lists.
    """

    rule = SGDRule()

    def __init__(
        self, params: Any, lr: float = 1e-2, momentum: float = 0.9, weight_decay: float = 0.0, **options: Any
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}, options)

    def check_options(self, group: Group) -> None:
        super().check_options(group)
        if not 0 <= group["momentum"] < 1:
            raise ValueError(f"momentum={group['momentum']}: must lie in [0, 1)")
