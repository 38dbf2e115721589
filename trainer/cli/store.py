"""What Hydra knows: dataclasses as `base_*` nodes, the YAML folder, recipes as overlays, and how to compose them."""

import copy
import functools
import re
import zlib
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from optim.config import CONFIGS as CONFIGS_BY_NAME
from optim.config import OptimConfig
from trainer import recipes
from trainer.schema import Config

CONFIGS = recipes.ROOT / "configs"
MAIN = "train"
"""configs/train.yaml, the root of every composition."""

SECTIONS: dict[str, type] = {field.name: field.type for field in fields(Config) if isinstance(field.type, type)}
"""Root options of a run by name; those that are dataclasses are sections."""


def subclasses(kind: type[Any]) -> Iterator[type[Any]]:
    """Yield every class derived from `kind`, nearest first."""
    for child in kind.__subclasses__():
        yield child
        yield from subclasses(child)


def optimizers() -> dict[str, type[OptimConfig]]:
    """Return the dataclass of each optimizer by the name its YAML and its `optim.name` have."""
    return CONFIGS_BY_NAME


@functools.cache
def groups() -> dict[str, list[str]]:
    """Return the choices of every config group, in the order of the schema, `recipe` last."""
    found = {name: sorted(path.stem for path in (CONFIGS / name).glob("*.yaml")) for name in SECTIONS}
    return {name: choices for name, choices in found.items() if choices} | {"recipe": recipes.names()}


@functools.cache
def register() -> None:
    """Put the dataclasses into Hydra's store, and the resolver that recipes find their data with."""
    OmegaConf.register_new_resolver("repository", repository, replace=True)
    store = ConfigStore.instance()
    store.store("base_config", Config)
    for name in groups():
        if name in SECTIONS:
            store.store(f"base_{name}", SECTIONS[name], group=name)
    for name, kind in optimizers().items():
        store.store(f"base_{name}", kind, group="optim")
    for name in recipes.names():
        add_overlay(name, recipes.RECIPES / name, as_name=name)


def repository(path: str) -> str:
    """Resolve `${repository:../shared/data}`: a path relative to the folder that holds trainer/ and configs/."""
    return str((recipes.ROOT / path).resolve())


def add_overlay(given: str, folder: Path, *, as_name: str) -> None:
    """Make a recipe a choice of the group `recipe`, laid over everything before the command line's overrides."""
    content = recipes.overlay(folder) | {"recipe": given}
    choices = content.get("defaults", [])
    content["defaults"] = choices if "_self_" in choices else [*choices, "_self_"]
    ConfigStore.instance().store(as_name, content, group="recipe", package="_global_")


def add_recipe(given: str) -> str:
    """Find a recipe by name or path and return the choice Hydra knows it by.

    Raises:
        UserError: there is no such recipe, or its config.yaml can't be read.
    """
    register()
    folder = recipes.find(given)
    if folder.parent == recipes.RECIPES:
        return folder.name
    digest = zlib.crc32(str(folder).encode() + (folder / "config.yaml").read_bytes())  # a changed file is a new choice
    name = f"{re.sub(r'[^A-Za-z0-9_]', '_', folder.name)}_{digest:08x}"
    add_overlay(str(folder), folder, as_name=name)
    return name


def composed(overrides: list[str]) -> DictConfig:
    """Compose configs/train.yaml with overrides, as Hydra does. Errors are Hydra's and OmegaConf's own."""
    return copy.deepcopy(_composed(tuple(overrides)))


@functools.lru_cache(maxsize=64)  # the jobs of a sweep mostly share their choices, and Hydra takes 50 ms for each
def _composed(overrides: tuple[str, ...]) -> DictConfig:
    register()
    GlobalHydra.instance().clear()
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(MAIN, list(overrides))
