"""What an optimizer can say about itself in numbers: how well its subspaces fit, what its codec left in fp32."""

from collections.abc import Iterable, Mapping
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

CODED = ("int8", "int4", "fp8")


def subspaces(states: Iterable[Mapping[str, Any]]) -> dict[str, Any] | None:
    """How well the subspaces fit their gradients, over all projected matrices, at the newest refresh of each.

    Args:
        states: of parameters; their numbers are enough.

    Returns:
        `refreshes`, the sum of their counts; `captured` {min, median}, the share |R|^2 / |G|^2 of a gradient's energy
        inside the basis; from the second refresh on `overlap` {min, median}, |Q_new Q_old^T|^2 / r. None without a
        subspace that follows gradients: a random one measures nothing.
    """
    found = [state for state in states if state.get("captured", 0.0) > 0.0 and state["refreshes"]]
    if not found:
        return None
    told: dict[str, Any] = {"refreshes": sum(state["refreshes"] for state in found)}
    told["captured"] = _spread([state["captured"] for state in found])
    turned = [state["overlap"] for state in found if state["refreshes"] > 1]
    return told | ({"overlap": _spread(turned)} if turned else {})


def _spread(values: list[float]) -> dict[str, float]:
    return {"min": min(values), "median": median(values)}


def uncoded(optimizer: Optimizer) -> dict[str, int]:
    """Of each parameter whose group keeps moments in fewer bits: bytes of its states if they stay in full precision,
    else 0. By name."""
    found = {}
    for index, group in enumerate(optimizer.param_groups):
        bits = group.get("states") in CODED or any(word in group.get("kind", "") for word in ("8bit", "4bit", "Fp8"))
        names = group.get("param_names") or [f"{index}.{place}" for place in range(len(group["params"]))]
        for name, p in zip(names, group["params"], strict=True):
            if not (bits and p in optimizer.state):
                continue
            tensors = {key: value for key, value in optimizer.state[p].items() if isinstance(value, Tensor)}
            coded = any(t.dtype is torch.uint8 for key, t in tensors.items() if not key.startswith("basis"))
            found[name] = 0 if coded else sum(t.numel() * t.itemsize for t in tensors.values())
    return found
