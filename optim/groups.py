"""Which parameter takes which options: regex rules over names, first match wins.

Decided from names and global shapes alone, so that it is the same on every rank and for a plan without weights.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from optim.config import OptimConfig, Rule

PLAIN = "matrices"
"""Group of everything with two or more dimensions that no rule takes: embedding, head, convolutions."""
VECTORS = "vectors"
"""Group of norms, biases and scalars."""


def assign(shapes: Sequence[tuple[str, Sequence[int]]], rules: Sequence[Rule]) -> list[str]:
    """Label of the group of each (name, global shape).

    Raises:
        ValueError: a rule fits no parameter at all.
    """
    labels = [_label(name, len(shape), rules) for name, shape in shapes]
    for rule in rules:
        if not any(_fits(rule, name, len(shape)) for name, shape in shapes):
            raise ValueError(_no_match(rule, shapes))
    return labels


def settle(cfg: OptimConfig, shapes: Sequence[tuple[str, Sequence[int]]]) -> OptimConfig:
    """Return `cfg` with what it leaves to the model decided: a rank of None becomes a quarter of the median smaller
    side of the projected matrices, which is a quarter of the hidden size in any transformer."""
    if getattr(cfg, "rank", 0) is not None:
        return cfg
    sides = [min(shape) for name, shape in shapes if any(_fits(rule, name, len(shape)) for rule in cfg.rules())]
    return replace(cfg, rank=max(1, int(median(sides)) // 4)) if sides else cfg  # type: ignore[call-arg]


def options(cfg: OptimConfig, label: str) -> dict[str, Any]:
    """Group keys of the group `label` under `cfg`."""
    found = cfg.options()
    if label == VECTORS and not cfg.decay_vectors:
        found["weight_decay"] = 0.0
    for rule in cfg.rules():
        if rule.label == label:
            found |= rule.options
    return found


def parameter_groups(
    cfg: OptimConfig, named_parameters: Iterable[tuple[str, torch.nn.Parameter]]
) -> list[dict[str, Any]]:
    """Groups for a torch optimizer, each trainable parameter in exactly one, with its name.

    A tied parameter counts once, under the first name it appears by. Empty groups are left out.

    Raises:
        ValueError: nothing is trainable, or a rule fits no parameter.
    """
    named = _unique_trainable(named_parameters)
    if not named:
        raise ValueError("no parameter requires a gradient: nothing to optimize; unfreeze some of the model")
    shapes = [(name, p.shape) for name, p in named]
    cfg = settle(cfg, shapes)
    labels = assign(shapes, cfg.rules())
    groups = []
    for label in [rule.label for rule in cfg.rules()] + [PLAIN, VECTORS]:
        members = [pair for pair, own in zip(named, labels, strict=True) if own == label]
        if members:
            groups.append({"params": members, "label": label} | options(cfg, label))
    return groups


def _unique_trainable(named: Iterable[tuple[str, torch.nn.Parameter]]) -> list[tuple[str, torch.nn.Parameter]]:
    first: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, p in named:
        if p.requires_grad:
            first.setdefault(id(p), (name, p))
    return list(first.values())


def _label(name: str, ndim: int, rules: Sequence[Rule]) -> str:
    for rule in rules:
        if _fits(rule, name, ndim):
            return rule.label
    return VECTORS if ndim < 2 else PLAIN


def _fits(rule: Rule, name: str, ndim: int) -> bool:
    return ndim == rule.ndim and re.search(rule.pattern, name) is not None


def _no_match(rule: Rule, shapes: Sequence[tuple[str, Sequence[int]]]) -> str:
    names = [name for name, shape in shapes if len(shape) == rule.ndim]
    some = ", ".join(names[:: max(len(names) // 4, 1)][:5]) or "none"
    return (
        f"{rule.key}={rule.pattern!r} finds none of the {len(names)} trainable parameters with {rule.ndim} dimensions. "
        f"Their names look like: {some}. Give a regular expression that finds some of them, or use optim=adamw."
    )
