"""The run folder: where it is, what lies in it, and which configuration it belongs to."""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from datetime import datetime
from enum import Enum
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from parallel.collectives import from_leader
from parallel.launch import World
from trainer.errors import UserError
from trainer.schema import Config


@dataclass(frozen=True)
class RunFolder:
    """Paths of one run."""

    path: Path

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def tokenizer(self) -> Path:
        return self.path / "tokenizer"

    @property
    def plots(self) -> Path:
        return self.path / "plots"

    def write_json(self, name: str, content: Any) -> None:
        """Write `content` to `name`, whole or not at all."""
        write_text(self.path / name, json.dumps(content, indent=2) + "\n")


def open_folder(cfg: Config, world: World) -> RunFolder:
    """Make the run folder, the same one on every rank.

    Raises:
        UserError: it cannot be made or written to (on every rank).
    """
    problem = path = None
    if world.leads:
        path = Path(cfg.run.dir) if cfg.run.dir else unused_folder(Path("runs") / cfg.run.name)
        try:
            path.mkdir(parents=True, exist_ok=True)
            (path / "plots").mkdir(exist_ok=True)
            if not os.access(path, os.W_OK | os.X_OK):
                raise PermissionError(f"no permission to write in {path}")
        except OSError as error:
            problem = f"run.dir={path}: cannot be written ({error.strerror or error}). Give a folder you may write to."
    path, problem = from_leader(world, (path, problem))
    if problem:
        raise UserError(problem)
    return RunFolder(path)


def unused_folder(parent: Path) -> Path:
    """Make and return a folder under `parent` named by the time; runs begun in the same second get a number."""
    stamp = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    for count in range(1000):
        path = parent / (f"{stamp}-{count}" if count else stamp)
        try:
            path.mkdir(parents=True)
        except FileExistsError:
            continue
        return path
    raise UserError(f"{parent}: a thousand runs were begun in this second. Give each its own run.dir.")


def write_text(path: Path, text: str) -> None:
    """Write a file aside and rename it into place."""
    aside = path.with_name(path.name + ".new")
    aside.write_text(text)
    os.replace(aside, path)


def plain(cfg: Config) -> dict[str, Any]:
    """Return the configuration as plain dictionaries, enums by name: what YAML and JSON hold.

    As OmegaConf makes them of a structured configuration, in a hundredth of the time: every save asks for them.
    """
    found = as_plain(cfg)
    assert isinstance(found, dict)
    return found


def as_plain(value: Any) -> Any:
    """Sections as dictionaries, enums by name, lists as lists; anything else itself."""
    if is_dataclass(value):
        return {entry.name: as_plain(getattr(value, entry.name)) for entry in fields(value)}
    if isinstance(value, Mapping):
        return {key: as_plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(each) for each in value]
    return value.name if isinstance(value, Enum) else value


def save_config(cfg: Config, path: Path) -> None:
    """Write the resolved configuration, enough to run again."""
    write_text(path, OmegaConf.to_yaml(OmegaConf.create(plain(cfg))))


DATA_ORDER = (
    "source",
    "path",
    "eval_fraction",
    "tokenizer",
    "sequence_length",
    "packing",
    "text_field",
    "messages_field",
    "chat_template",
    "train_on_prompt",
    "name",
    "split",
    "streaming",
    "shuffle_buffer",
)
"""Options of `data` that decide which sample has which index. Evaluation and cache options do not."""


def identity(cfg: Config) -> dict[str, dict[str, Any]]:
    """Return what a checkpoint must agree on: `state` to be loadable at all, `order` to go on in the same data,
    `positions` to go on as the same model, which a run of its own may change: it is then extended."""
    values = plain(cfg)
    model = {
        f"model.{k}": v
        for k, v in values["model"].items()
        if k not in ("trust_remote_code", "attention", "weights", "rope")
    }
    state = {**model, "optim.name": values["optim"]["name"], "precision.weights": values["precision"]["weights"]}
    order = {"seed": values["seed"], **{f"data.{key}": values["data"][key] for key in DATA_ORDER}}
    positions = {f"model.rope.{k}": v for k, v in values["model"]["rope"].items() if v not in (None, "keep")}
    return {"state": state, "order": order, "positions": positions}


def differences(saved: dict[str, Any], asked: dict[str, Any]) -> list[str]:
    """Describe the options in which two identities differ. What was saved before an option existed had its default."""
    defaults = {key: value for part in identity(Config()).values() for key, value in part.items()}
    saved = {key: defaults[key] for key in asked if key in defaults} | saved
    keys = sorted(saved.keys() | asked.keys())
    return [f"{k}: saved {saved.get(k)}, asked {asked.get(k)}" for k in keys if saved.get(k) != asked.get(k)]
