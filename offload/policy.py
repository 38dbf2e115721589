"""Which fate a saved tensor meets: the user's rules, then the preset, held against the modules that are there.

A fate belongs to what an operator saves inside a module, except recomputation, which belongs to a module as a whole:
of nested modules the outermost that is to be recomputed is, and rules for operators then say what it keeps.
"""

import functools
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from offload.config import COMPRESSED, ActivationsConfig, Fate, Rule

LINEAR = frozenset({"linear", "addmm"})
"""Operators whose saved input COAT keeps with one scale: it was quantized for the product anyway."""
GROUPED = frozenset(
    {"rms_norm", "layer_norm", "pow", "mul", "swiglu", "silu", "gelu", "relu", "sigmoid", "tanh", "square"}
)
"""Norms, activations and products, whose saved inputs are kept with a scale for each group. What others save stays:
attention needs its operands as they are, and dropout's masks are bytes already."""

OURS = frozenset({"linear_attention"})
"""Functions of ours that rules may name."""
ATTENTION_KERNELS = (
    "scaled_dot_product_attention", "_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention", "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_fused_attention_overrideable",
)  # fmt: skip
KERNELS = {
    "linear": ("mm", "addmm", "bmm", "_scaled_mm"),
    "matmul": ("mm", "bmm", "mv"),
    "scaled_dot_product_attention": ATTENTION_KERNELS,
}
"""Kernels that a function runs, where they have other names."""
PRODUCTS = KERNELS["linear"]


@dataclass(frozen=True)
class Verdict:
    """What happens to one saved tensor."""

    fate: Fate
    whole: bool = False
    """Compressed with one scale for all values."""


@dataclass(frozen=True)
class Region:
    """A module that is recomputed as a whole."""

    name: str
    module: nn.Module
    keep: tuple[str, ...] = ()
    """Kernels whose results are kept."""
    alternate: tuple[str, ...] = ()
    """Kernels of which every second result is kept."""
    shared_attention: bool = False
    """Whether the results of attention over rows that ranks share are kept."""


class Policy:
    """The fates of one run.

    Raises:
        ValueError: a rule that nothing in `blocks` can meet.
    """

    def __init__(
        self, cfg: ActivationsConfig, blocks: Sequence[tuple[str, nn.Module]], *, shared_rows: bool = False
    ) -> None:
        self.cfg, self._shared_rows = cfg, shared_rows
        self.rules = cfg.parsed()
        self._modules = [(name, module) for block, top in blocks for name, module in named(block, top)]
        self._check_names()
        self.regions = [region for block, top in blocks for region in self._regions(block, top)]
        self._check_operators({name for name, _ in blocks})
        self.by_module = any(rule.module for rule in self.rules)
        """Whether it matters which module saves."""
        self.by_operator = any(rule.operator for rule in self.rules) or bool(cfg.fates() & set(COMPRESSED))
        """Whether it matters which operator saves."""
        self.verdict = functools.cache(self._verdict)
        self.met: set[Rule] = set()
        """Rules that decided about a tensor so far."""

    def _verdict(self, module: str, operator: str | None) -> Verdict:
        """Decide what happens to a tensor that `operator` saves in `module`."""
        named_here, fate = False, self.cfg.fate
        for rule in self.rules:
            if rule.fate is not Fate.recompute and meets(rule, module) and rule.operator in (None, operator):
                fate, named_here = rule.fate, rule.operator is not None
                self.met.add(rule)
                break
        if fate in (Fate.recompute, Fate.selective):
            fate = Fate.keep  # outside every region: what a rule takes out of one
        if fate not in COMPRESSED:
            return Verdict(fate)
        if operator in LINEAR:
            return Verdict(fate, whole=fate is Fate.fp8)
        return Verdict(fate if operator in GROUPED or named_here else Fate.keep)

    def _own_fate(self, name: str, otherwise: Fate) -> Fate:
        """The fate of a module as a whole."""
        return next((rule.fate for rule in self.rules if rule.operator is None and meets(rule, name)), otherwise)

    def _regions(self, block: str, top: nn.Module) -> list[Region]:
        found: list[Region] = []
        for name, module in named(block, top):
            inside = next((region for region in found if name.startswith(region.name + ".")), None)
            fate = self._own_fate(name, self.cfg.fate if name == block else Fate.keep)
            if inside is None:
                if fate in (Fate.recompute, Fate.selective):
                    found.append(self._region(name, module, fate))
                continue
            rule = next((rule for rule in self.rules if rule.operator is None and meets(rule, name)), None)
            if rule is not None and rule.fate is not Fate.recompute:
                raise ValueError(
                    f"activations.rules='{rule.text}': {name} lies inside {inside.name}, which is recomputed as a "
                    "whole. Name what to recompute by rules instead ('self_attn -> recompute'), or name an operator "
                    "whose result is to be kept ('linear() -> keep')."
                )
        return found

    def _region(self, name: str, module: nn.Module, fate: Fate) -> Region:
        keep = [
            kernel
            for rule in self.rules
            if rule.operator is not None and rule.fate is Fate.keep and meets(rule, name)
            for kernel in kernels(rule.operator)
        ]
        if fate is Fate.selective or self.cfg.attention is Fate.keep:
            keep = [*ATTENTION_KERNELS, *keep]
        shared = self._shared_rows and set(keep) >= set(ATTENTION_KERNELS)
        if shared:  # many kernels' results, of which those of the whole are made
            keep = [kernel for kernel in keep if kernel not in ATTENTION_KERNELS]
        alternate = [kernel for kernel in PRODUCTS if kernel not in keep] if fate is Fate.selective else []
        return Region(name, module, tuple(keep), tuple(alternate), shared)

    def _check_names(self) -> None:
        """Every rule's module pattern must match something, every operator must be one."""
        for rule in self.rules:
            if rule.module is not None and not any(meets(rule, name) for name, _ in self._modules):
                some = ", ".join(dict.fromkeys(name for name, _ in self._modules[:12]))
                raise ValueError(
                    f"activations.rules='{rule.text}': {rule.module} matches no module of the model's blocks. "
                    f"There are {some}, and more of the kind."
                )
            if rule.operator is not None and not is_operator(rule.operator):
                raise ValueError(
                    f"activations.rules='{rule.text}': torch has no function {rule.operator}. Names are those that a "
                    f"model's code calls, such as {', '.join(sorted(GROUPED | LINEAR))}, scaled_dot_product_attention."
                )

    def _check_operators(self, blocks: set[str]) -> None:
        """What an operator's result is inside a recomputed module can be kept; nothing else."""
        recomputed = {region.name for region in self.regions}
        for rule in self.rules:
            if rule.operator is None:
                continue
            if rule.fate is not Fate.keep and recomputed == blocks:
                raise ValueError(
                    f"activations.rules='{rule.text}': every block is recomputed as a whole, and what an operator "
                    "saves there can be kept or recomputed, not moved or compressed. Use -> keep, or another "
                    "activations=... than recompute and selective."
                )
            if rule.fate is Fate.keep and recomputed and not any(meets(rule, name) for name in recomputed):
                raise ValueError(
                    f"activations.rules='{rule.text}': {rule.module} names no module that is recomputed as a whole, "
                    f"such as {min(recomputed)}; give its pattern, or leave it out for all."
                )

    def unmet(self) -> list[str]:
        """Rules that decided about nothing so far: their operator saves nothing, or rules before them met it all."""
        regional = {rule for rule in self.rules if rule.operator and rule.fate is Fate.keep and self.regions}
        decided = self.met | regional
        return [rule.text for rule in self.rules if rule.fate is not Fate.recompute and rule not in decided]


def named(block: str, top: nn.Module) -> Iterable[tuple[str, nn.Module]]:
    """Modules of a block under their full names, outer ones first."""
    return ((f"{block}.{name}" if name else block, module) for name, module in top.named_modules())


def meets(rule: Rule, module: str) -> bool:
    return rule.module is None or re.search(rule.module, module) is not None


def kernels(operator: str) -> tuple[str, ...]:
    """Names in torch.ops.aten of what a function runs."""
    return KERNELS.get(operator, (operator,))


def is_operator(name: str) -> bool:
    places: tuple[Any, ...] = (torch, torch.nn.functional, torch.Tensor)
    return name in LINEAR | GROUPED | OURS or any(callable(getattr(place, name, None)) for place in places)
