"""Memory-efficient optimizers. Names load on first use: `import optim.config` does not import torch."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optim.adamw import AdamW as AdamW
    from optim.base import MemoryOptimizer as MemoryOptimizer
    from optim.galore import GaLoreAdamW as GaLoreAdamW

_HOMES = {"AdamW": "optim.adamw", "GaLoreAdamW": "optim.galore", "MemoryOptimizer": "optim.base"}

__all__ = ["AdamW", "GaLoreAdamW", "MemoryOptimizer"]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'optim' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_HOMES[name]), name)
