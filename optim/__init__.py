"""Memory-efficient optimizers. Names load on first use: `import optim.config` does not import torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim.adafactor import Adafactor as Adafactor
    from optim.adafactor import GaLoreAdafactor as GaLoreAdafactor
    from optim.adamw import AdamW as AdamW
    from optim.apollo import APOLLO as APOLLO
    from optim.apollo import APOLLOAdamW as APOLLOAdamW
    from optim.apollo import APOLLOMini as APOLLOMini
    from optim.base import MemoryOptimizer as MemoryOptimizer
    from optim.cosmos import COSMOS as COSMOS
    from optim.fira import Fira as Fira
    from optim.fira import FiraAdamW as FiraAdamW
    from optim.galore import GaLoreAdamW as GaLoreAdamW
    from optim.galore import GaLoreAdamW8bit as GaLoreAdamW8bit
    from optim.in_backward import InBackward as InBackward
    from optim.sgd import SGD as SGD

_HOMES = {
    "APOLLO": "optim.apollo",
    "APOLLOAdamW": "optim.apollo",
    "APOLLOMini": "optim.apollo",
    "Adafactor": "optim.adafactor",
    "AdamW": "optim.adamw",
    "COSMOS": "optim.cosmos",
    "Fira": "optim.fira",
    "FiraAdamW": "optim.fira",
    "GaLoreAdafactor": "optim.adafactor",
    "GaLoreAdamW": "optim.galore",
    "GaLoreAdamW8bit": "optim.galore",
    "InBackward": "optim.in_backward",
    "MemoryOptimizer": "optim.base",
    "SGD": "optim.sgd",
}

__all__ = [
    "APOLLO",
    "APOLLOAdamW",
    "APOLLOMini",
    "Adafactor",
    "AdamW",
    "COSMOS",
    "Fira",
    "FiraAdamW",
    "GaLoreAdafactor",
    "GaLoreAdamW",
    "GaLoreAdamW8bit",
    "InBackward",
    "MemoryOptimizer",
    "SGD",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optim' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
