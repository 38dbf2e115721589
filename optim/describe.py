"""What an optimizer can say about itself in numbers: how well its subspaces fit, what its codec left in fp32."""

from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

CODED = ("int8", "int4", "fp8")


def subspaces(optimizer: Optimizer) -> dict[str, Any] | None:
    """How well the subspaces fit their gradients, over all projected matrices, at the newest refresh of each.

    Returns:
        `refreshes`, the sum of their counts; `captured` {min, median}, the share |R|^2 / |G|^2 of a gradient's energy
        inside the basis; from the second refresh on `overlap` {min, median}, |Q_new Q_old^T|^2 / r. None without a
        subspace that follows gradients: a random one measures nothing.
    """
    found = [state for state in optimizer.state.values() if state.get("captured", 0.0) > 0.0 and state["refreshes"]]
    if not found:
        return None
    told: dict[str, Any] = {"refreshes": sum(state["refreshes"] for state in found)}
    told["captured"] = _spread([state["captured"] for state in found])
    turned = [state["overlap"] for state in found if state["refreshes"] > 1]
    return told | ({"overlap": _spread(turned)} if turned else {})


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values)}


def uncoded(optimizer: Optimizer) -> tuple[int, int, int]:
    """Parameters whose moments stay in full precision although their group's are kept in fewer bits.

    Returns:
        Their number, that of all such groups' parameters, and the bytes of the former's states.
    """
    count = total = held = 0
    for group in optimizer.param_groups:
        bits = group.get("states") in CODED or any(word in group.get("kind", "") for word in ("8bit", "4bit", "Fp8"))
        states = [optimizer.state[p] for p in group["params"] if bits and p in optimizer.state]
        total += len(states)
        for state in states:
            tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
            if not any(t.dtype is torch.uint8 for key, t in tensors.items() if not key.startswith("basis")):
                count += 1
                held += sum(t.numel() * t.itemsize for t in tensors.values())
    return count, total, held
