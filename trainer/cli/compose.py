"""From overrides to a checked configuration, or to one message with everything that is wrong.

No torch, no transformers: a mistake is reported within a second.
"""

import os
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from trainer import check, recipes
from trainer.cli import store
from trainer.cli.overrides import Findings, choices, parse, split
from trainer.cli.values import apply
from trainer.engines import accelerate_config
from trainer.errors import UserError
from trainer.schema import Config


def load(overrides: list[str]) -> Config:
    """Compose the configuration of a training run from `key=value` and `group=choice` overrides, and check it.

    Raises:
        UserError: names every problem of the whole configuration.
    """
    loaded, problems = judge(overrides)
    if problems or loaded is None:
        raise UserError(message(problems))
    return loaded


def judge(overrides: list[str]) -> tuple[Config | None, list[str]]:
    """Return the configuration as far as it can be made, and everything that is wrong with it."""
    found = Findings()
    cfg = compose(overrides, found)
    loaded = None if cfg is None else as_object(cfg, found)
    if loaded is not None:
        loaded, problems = accelerate_config.applied(loaded, os.environ)
        conclude(found, problems or [*check.problems(loaded), *check.start_problems(loaded)])
    return loaded, found.problems


def compose(overrides: list[str], found: Findings) -> DictConfig | None:
    """Compose what is right about `overrides`; the rest goes to `found`. None if nothing can be composed."""
    groups, values = split(parse(overrides, found), found)
    try:
        cfg = store.composed([text(override) for override in groups])
    except (HydraException, OmegaConfBaseException) as error:
        found.add(composition_problem(error, groups))
        return None
    apply(cfg, values, found)
    return cfg


def text(override: Override) -> str:
    """Return the override as Hydra is to see it: a recipe's path becomes the name it was stored under."""
    if override.key_or_group != "recipe" or not choices(override):
        return str(override.input_line)
    return f"recipe={','.join(store.add_recipe(recipe) for recipe in choices(override))}"


def composition_problem(error: Exception, groups: list[Override]) -> str:
    """Say which files do not go together; with one recipe among them, it is nearly always its own options."""
    reason = " ".join(line.strip() for line in str(error.__cause__ or error).splitlines()[:3])
    chosen = " ".join(str(override.input_line) for override in groups)
    recipe = next((str(override.value()) for override in groups if override.key_or_group == "recipe"), None)
    if recipe is None:
        return f"{chosen or 'configs/train.yaml'}: cannot be composed ({reason}); compare the file with its dataclass"
    path = recipes.find(recipe) / "config.yaml"
    return f"{chosen}: {path} does not fit the other choices ({reason}); leave one of them out, or correct the recipe"


def as_object(cfg: DictConfig, found: Findings) -> Config | None:
    """Turn a composed configuration into dataclasses, `~/` expanded."""
    try:
        loaded = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        found.add(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}")
        return None
    assert isinstance(loaded, Config)
    expand_home(loaded)
    return loaded


def expand_home(node: object) -> None:
    """Replace a leading `~/`, which no shell expands after `key=`, in every text of a dataclass tree, in place."""
    for entry in fields(node):  # type: ignore[arg-type]
        value = getattr(node, entry.name)
        if is_dataclass(value):
            expand_home(value)
        elif isinstance(value, str) and value.startswith("~/"):
            setattr(node, entry.name, str(Path(value).expanduser()))


def conclude(found: Findings, problems: list[str]) -> None:
    """Add problems of values, but not those that only follow from an option that is in doubt already."""
    for problem in dict.fromkeys(problems):
        if not found.doubts(problem):
            found.add(problem)


def message(problems: list[str]) -> str:
    """Return one text for all problems."""
    if len(problems) == 1:
        return problems[0]
    return "\n".join([f"{len(problems)} problems in the configuration:", *(f"- {problem}" for problem in problems)])


def to_yaml(cfg: Config) -> str:
    """Return `cfg` as the text of a config.yaml that `load_saved` reads back to an equal one."""
    return str(OmegaConf.to_yaml(OmegaConf.structured(cfg)))


KEPT_WITH_NEW_DATA = ("tokenizer", "sequence_length", "packing", "chat_template", "eval_rows", "cache_dir")
"""Options of [data] that belong to the model rather than to the source, and stay when another `data=...` is chosen."""


def load_saved(path: Path, overrides: list[str] | None = None) -> Config:
    """Read a run's config.yaml, with overrides on top.

    `data=...` replaces the source of the text and keeps what the model was trained with (tokenizer, length, packing).

    Args:
        overrides: None reads the file as it is; a list, even an empty one, also checks the values, and that the files
            they name are still there.

    Raises:
        UserError: the file is missing or isn't a run's configuration, or names every problem of the overrides.
    """
    if not path.is_file():
        raise UserError(f"{path}: no such file; give the folder of a run, which has a config.yaml")
    saved = recipes.mapping(path)
    found = Findings()
    groups, values = split(parse(list(overrides or []), found), found)
    for override in groups:
        if override.key_or_group != "data":
            found.add(f"{override.input_line}: the run has made that choice; only data=... can be chosen anew")
    groups = [override for override in groups if override.key_or_group == "data"]
    try:
        cfg = store.composed([f"optim={saved.get('optim', {}).get('name', 'adamw')}", *map(text, groups)])
        cfg = DictConfig(OmegaConf.merge(cfg, without_source(saved) if groups else saved))
        OmegaConf.set_struct(cfg, True)
        apply(cfg, values, found)
        loaded = as_object(cfg, found)
    except (HydraException, OmegaConfBaseException, AttributeError) as error:
        reason = " ".join(str(error.__cause__ or error).split())
        raise UserError(f"{path}: is not the configuration of a run of this version ({reason})") from error
    if loaded is not None and overrides is not None:
        conclude(found, check.problems(loaded))
    if found.problems or loaded is None:
        raise UserError(message(found.problems))
    return loaded


def without_source(saved: dict[str, Any]) -> dict[str, Any]:
    """Return a saved configuration without what says where its text came from."""
    data = {name: value for name, value in saved.get("data", {}).items() if name in KEPT_WITH_NEW_DATA}
    return saved | {"data": data}
