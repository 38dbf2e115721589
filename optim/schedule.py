"""Learning-rate schedules: a pure function from step to the factor on the peak rate.

With W warmup steps and N steps in all, counted from 0: the factor rises linearly as (step + 1) / W, is 1 at
step max(W - 1, 0), and is exactly the floor at step N - 1 (except for `constant`, which stays at 1).
wsd (warmup, stable, decay) holds 1 until the last `decay` steps and then falls linearly: Hu et al. 2024,
arXiv:2404.06395, with the linear decay of Hagele et al. 2024, arXiv:2405.18392.
"""

import math
from typing import Any

from optim.config import ScheduleConfig, ScheduleName


def multiplier(cfg: ScheduleConfig, step: int, steps: int) -> float:
    """Factor on the peak learning rate for `step` (from 0) of a run of `steps` steps.

    Steps beyond the run keep the last step's factor.
    """
    step = min(step, steps - 1)
    warmup = _length(cfg.warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    match cfg.name:
        case ScheduleName.constant:
            return 1.0
        case ScheduleName.linear:
            fallen = _progress(step, max(warmup - 1, 0), steps)
        case ScheduleName.cosine:
            fallen = 0.5 - 0.5 * math.cos(math.pi * _progress(step, max(warmup - 1, 0), steps))
        case ScheduleName.wsd:
            stable_until = steps - 1 - max(_length(cfg.decay, steps), 1)
            fallen = _progress(step, max(stable_until, warmup - 1, 0), steps)
    return cfg.floor * fallen + (1.0 - fallen)


def _length(value: float, steps: int) -> int:
    """Steps meant by a fraction of the run (below 1) or a number of steps (from 1 on)."""
    return round(value * steps) if value < 1 else int(value)


def _progress(step: int, start: int, steps: int) -> float:
    """Share of the way from step `start` (0) to the last step (1)."""
    return max(step - start, 0) / max(steps - 1 - start, 1)


def scale_rates(optimizer: Any, multiplier: float) -> None:
    """Let the next step take `multiplier` times each group's own learning rate, which it has when first seen here."""
    for group in optimizer.param_groups:
        group["lr"] = group.setdefault("initial_lr", group["lr"]) * multiplier
