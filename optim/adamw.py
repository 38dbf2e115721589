"""AdamW: Adam with decoupled weight decay; the math is in `adam.py`.

State: m and v, each of the shape of W, fp32 (fp64 for fp64 weights): 8 bytes per value; less with a codec (`states`).
For bf16 and fp16 weights the moments stay in fp32: with b2 = 0.999 the change of v in a step is below bf16's
resolution, and v would stand still.
"""

from typing import Any

from optim.compose import ComposedOptimizer


class AdamW(ComposedOptimizer):
    """AdamW with at least fp32 math, states made at construction. Takes parameters, (name, parameter) pairs or groups.

    Args:
        params: parameters, (name, parameter) pairs, or groups.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the bias-corrected second moment.
        weight_decay: decoupled decay, of the weights before the update.
        states: codec of the moments: "fp32", "bf16", "int8", "int4" or "fp8".
        rounding: how bf16 weights take an fp32 step: "nearest" or "stochastic".
    """

    choices: dict[str, Any] = {}

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        **options: Any,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}, options)
