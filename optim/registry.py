"""Optimizers by name: which there are, how one is built from its config, and how many bytes its states take."""

import difflib
import importlib
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from optim.config import CONFIGS, OptimConfig

if TYPE_CHECKING:
    import torch

    from optim.base import MemoryOptimizer

CLASSES = {
    "adamw": ("optim.adamw", "AdamW"),
    "adamw_8bit": ("optim.adamw", "AdamW"),
    "adamw_4bit": ("optim.adamw", "AdamW"),
    "adamw_fp8": ("optim.adamw", "AdamW"),
    "sgd": ("optim.sgd", "SGD"),
    "adafactor": ("optim.adafactor", "Adafactor"),
    "galore": ("optim.galore", "GaLoreAdamW"),
    "galore_8bit": ("optim.galore", "GaLoreAdamW"),
    "galore_adafactor": ("optim.adafactor", "Adafactor"),
    "qgalore": ("optim.galore", "GaLoreAdamW"),
    "apollo": ("optim.apollo", "APOLLO"),
    "apollo_mini": ("optim.apollo", "APOLLOMini"),
    "qapollo": ("optim.apollo", "APOLLO"),
    "qapollo_mini": ("optim.apollo", "APOLLOMini"),
    "fira": ("optim.fira", "Fira"),
    "cosmos": ("optim.cosmos", "COSMOS"),
    "bnb_adamw_8bit": ("optim.bnb", "Bitsandbytes"),
    "bnb_paged_adamw_8bit": ("optim.bnb", "Bitsandbytes"),
    "bnb_paged_adamw": ("optim.bnb", "Bitsandbytes"),
    "bnb_lion_8bit": ("optim.bnb", "Bitsandbytes"),
    "bnb_paged_lion_8bit": ("optim.bnb", "Bitsandbytes"),
    "torchao_adamw_8bit": ("optim.ao", "Torchao"),
    "torchao_adamw_4bit": ("optim.ao", "Torchao"),
    "torchao_adamw_fp8": ("optim.ao", "Torchao"),
}
"""Module and class of each, imported on use: listing names costs no import of torch."""


def names() -> list[str]:
    """Every name that `optim.name` accepts."""
    return list(CONFIGS)


def config_class(name: str) -> type[OptimConfig]:
    """The dataclass that holds the options of an optimizer.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    _require_known(name)
    return CONFIGS[name]


def groups(
    cfg: OptimConfig,
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    stepped: "Mapping[str, torch.nn.Parameter] | None" = None,
) -> list[dict[str, Any]]:
    """Groups of `cfg` over the trainable parameters, each once, grouped by the config's rules.

    Args:
        named_parameters: of the model, frozen ones included; their names and shapes decide.
        stepped: what this process steps of each, by name: a part, or nothing for a name that is absent. Default: all.

    Raises:
        ValueError: nothing trainable, or a rule that fits no parameter.
    """
    from optim.groups import parameter_groups

    found = parameter_groups(cfg, named_parameters)
    if stepped is None:
        return found
    for group in found:
        group["params"] = [(name, stepped[name]) for name, _ in group["params"] if name in stepped]
    return [group for group in found if group["params"]]


def build(
    cfg: OptimConfig,
    named_parameters: "Iterable[tuple[str, torch.nn.Parameter]]",
    *,
    rounding: str = "nearest",
    stepped: "Mapping[str, torch.nn.Parameter] | None" = None,
) -> "MemoryOptimizer":
    """Build the optimizer of `cfg` over the trainable parameters, each once, grouped by the config's rules.

    Args:
        cfg: one of the dataclasses of `optim.config`.
        named_parameters: of the model, frozen ones included.
        rounding: how bf16 weights take an fp32 step, "nearest" or "stochastic".
        stepped: as for `groups`.

    Raises:
        ValueError: unknown name, nothing trainable, or a rule that fits no parameter.
    """
    cls = _optimizer_class(cfg.name)
    optimizer: MemoryOptimizer = cls(groups(cfg, named_parameters, stepped), **cfg.options(), rounding=rounding)
    return optimizer


def state_bytes(
    cfg: OptimConfig, named_shapes: Iterable[tuple[str, Sequence[int]]], dtype: "torch.dtype | None" = None
) -> int:
    """Bytes of all states for trainable parameters of these global shapes, with weights of `dtype` (default fp32).

    Give a tied parameter once. Raises as `build` does.
    """
    return sum(state_bytes_each(cfg, named_shapes, dtype))


def state_bytes_each(
    cfg: OptimConfig, named_shapes: Iterable[tuple[str, Sequence[int]]], dtype: "torch.dtype | None" = None
) -> list[int]:
    """`state_bytes` parameter by parameter."""
    import torch

    from optim.groups import assign, options, settle

    cls = _optimizer_class(cfg.name)
    shapes = list(named_shapes)
    cfg = settle(cfg, shapes)
    labels = assign(shapes, cfg.rules())
    return [
        cls.state_bytes(shape, options(cfg, label), dtype or torch.float32)
        for (_, shape), label in zip(shapes, labels, strict=True)
    ]


def _optimizer_class(name: str) -> "type[Any]":
    _require_known(name)
    module, attribute = CLASSES[name]
    return getattr(importlib.import_module(module), attribute)  # type: ignore[no-any-return]


def _require_known(name: str) -> None:
    if name not in CONFIGS:
        near = difflib.get_close_matches(name, CONFIGS, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        raise ValueError(f"optim.name={name}: unknown; known are {', '.join(CONFIGS)}.{hint}")
