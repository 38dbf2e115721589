"""Overrides of single options: put into a composed configuration where they fit, reported where they don't."""

import copy
from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer.cli import store
from trainer.cli.overrides import Findings, hints, known_options, listing
from trainer.errors import first_line
from trainer.nearest import hint, nearest

FREE = "deepspeed."
"""Options whose names a library decides: `trainer.engines.deepspeed_config` judges them."""


def apply(cfg: DictConfig, values: list[Override], found: Findings) -> None:
    """Put every value that fits into `cfg`, as Hydra would, in place; the rest become problems.

    `cfg` is composed from the groups alone.
    """
    before = copy.deepcopy(cfg) if any("${" in str(override.input_line) for override in values) else cfg
    fitting = []
    asked = {override.key_or_group for override in values}
    for override in values:
        key = override.key_or_group
        if key.startswith("hydra."):
            continue  # of a sweep: Hydra's own to judge
        if key.startswith(FREE):
            OmegaConf.update(cfg, key, override.value(), merge=True, force_add=True)
            continue
        if (kind := option_type(cfg, key)) is None:
            if key.partition(".")[0] in found.doubtful and key in known_options():
                continue  # an option of the choice that was meant, not of the default that stands in for it
            near = [name for name in nearest(key, known_options(cfg), 1) if name not in asked]
            found.add(unknown_option(cfg, override), *near)
        elif problem := wrong_value(cfg, override, kind):
            found.add(problem, key)
        else:
            fitting.append(override)
    for override in fitting:
        if unresolved(cfg, override, found):
            OmegaConf.update(cfg, override.key_or_group, OmegaConf.select(before, override.key_or_group))
        else:
            found.given.add(override.key_or_group)


def option_type(cfg: DictConfig, key: str) -> Any:
    """Return the annotated type of the option `key`, or None if there is no such option."""
    node: type = OmegaConf.get_type(cfg)
    *path, last = key.split(".")
    where: Any = cfg
    for part in path:
        where = where[part] if is_dataclass(node) and part in hints(node) else None
        if not isinstance(where, DictConfig):
            return None
        node = OmegaConf.get_type(where)
    return hints(node).get(last) if is_dataclass(node) else None


def unknown_option(cfg: DictConfig, override: Override) -> str:
    """Say that there is no such option, and where it is if another optimizer has it."""
    key = override.key_or_group
    section, _, name = key.partition(".")
    if section == "optim":
        having = [other for other, kind in store.optimizers().items() if name in hints(kind)]
        if having:
            return (
                f"{override.input_line}: optim={cfg.optim.name} has no option {name}; {', '.join(having)} "
                f"{'has' if len(having) == 1 else 'have'} it: write optim={having[0]} too, or leave {name} out"
            )
    known = [*known_options(cfg), *store.groups()]
    return f"{override.input_line}: no such option; {hint(key, known)}{listing(key, cfg)}"


def wrong_value(cfg: DictConfig, override: Override, kind: Any) -> str | None:
    """Say why the value doesn't fit the option, if so; otherwise put it there."""
    value = override.value()
    if isinstance(value, bool) is not accepts_bool(kind) and not (value is None or isinstance(value, str)):
        return f"{override.input_line}: needs {described(kind)}"
    try:
        OmegaConf.update(cfg, override.key_or_group, value, merge=True)
    except OmegaConfBaseException as error:
        if is_dataclass(kind):
            known = listing(override.key_or_group)
            return f"{override.input_line}: is a section; set its options one by one ({first_line(error)}). {known}"
        return f"{override.input_line}: needs {described(kind)}{better_value(kind, value)}"
    return None


def accepts_bool(kind: Any) -> bool:
    return kind is bool or bool in get_args(kind)


def described(kind: Any) -> str:
    """Return in words what an option takes."""
    if isinstance(kind, UnionType):
        inner = [part for part in get_args(kind) if part is not NoneType]
        return f"{' or '.join(map(described, inner))}, or null"
    if get_origin(kind) is list:
        return f"a list in brackets, such as [0.9,0.999], each {described(get_args(kind)[0])}"
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(kind.__members__)}"
    return {int: "a whole number", float: "a number", bool: "true or false", str: "text"}.get(kind, "a section")


def better_value(kind: Any, value: object) -> str:
    """Return the value that was probably meant, as the end of a sentence."""
    plain = get_args(kind)[0] if isinstance(kind, UnionType) else kind
    if plain is int and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if isinstance(plain, type) and issubclass(plain, Enum):
        near = nearest(str(value), plain.__members__, 1)
        return f"; did you mean {near[0]}?" if near else ""
    return ""


def unresolved(cfg: DictConfig, override: Override, found: Findings) -> bool:
    """Whether a value that is now in `cfg` refers (${train.steps}) to something absent or of the wrong type."""
    key = override.key_or_group
    try:
        value = OmegaConf.select(cfg, key)
        if OmegaConf.is_config(value):
            OmegaConf.to_container(value, resolve=True)
    except OmegaConfBaseException as error:
        found.add(f"{override.input_line}: the reference cannot be followed ({first_line(error)}); give a value", key)
        return True
    return False
