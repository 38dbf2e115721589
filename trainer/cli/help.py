"""`stowage train --help`: made from the dataclasses, their texts and the YAML files, as composed with the overrides.

So `stowage train optim=adamw --help` shows AdamW's options and the values they would have.
"""

import re
import sys
from collections.abc import Iterator
from dataclasses import is_dataclass
from enum import Enum
from types import NoneType, UnionType
from typing import Any, get_args, get_origin

from omegaconf import DictConfig, OmegaConf
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from trainer.check_model import is_read
from trainer.cli import store
from trainer.cli.compose import compose, load, message
from trainer.cli.docs import choice_docs, option_docs
from trainer.cli.overrides import Findings, hints
from trainer.cli.packages import version
from trainer.errors import UserError
from trainer.schema import Config, shown
from trainer.sizes import llama_shapes, vocabulary_of

WIDTH = 100
"""Columns, on a wider terminal and in a pipe too."""

EXAMPLES = """\
stowage train                                        a small LLaMA with GaLore, offline, a minute
stowage train optim=adamw train.steps=1000           another optimizer, longer
stowage train data=text data.path='books/*.txt'      text of your own
stowage train model=hf model.path=Qwen/Qwen3-0.6B precision=bf16 activations=recompute
stowage train run.dir=runs/mine                      go on where an interrupted run left off
stowage train -m optim.lr=1e-3,3e-3,1e-2             a sweep: one run each
torchrun --nproc-per-node 2 -m trainer train.global_batch=32
stowage train optim=adamw --help                     the options of another choice"""


def print_train_help(overrides: list[str]) -> None:
    """Print every group, choice and option, with the values that `overrides` give.

    Raises:
        UserError: the overrides don't compose.
    """
    found = Findings()
    cfg = compose(overrides, found)
    if found.problems or cfg is None:
        raise UserError(message(found.problems))
    console = make_console()
    with console.capture() as capture:
        print_help(console, cfg, chosen(overrides))
        if any(override.startswith("optim=") for override in overrides):  # torch takes a second to import
            print_state_bytes(console, overrides)
    print("\n".join(line.rstrip() for line in capture.get().splitlines()))


def print_help(console: Console, cfg: DictConfig, choices: dict[str, str]) -> None:
    console.print(f"[bold]stowage train[/] {version()}: train a model as configured\n")
    console.print(escape("usage: stowage train [key=value ...] [group=choice ...] [-m] [--cfg] [--help]\n"))
    console.print(flags_table())
    heading(console, "Groups", "choose with group=choice")
    console.print(groups_table(choices))
    heading(console, "Options", "set with key=value; shown are type and value")
    for number, table in enumerate(option_tables(cfg)):
        console.print(*([""] if number else []), table, sep="\n")
    heading(console, "Examples")
    console.print("\n".join(f"  {escape(line)}" for line in EXAMPLES.splitlines()))


def print_state_bytes(console: Console, overrides: list[str]) -> None:
    """Print what each optimizer's states take for the model as configured, the chosen one's with its options.

    Only for a model given by its sizes: `stowage plan` reads the files of others.
    """
    cfg = load(overrides)
    vocabulary = vocabulary_of(cfg.model, cfg.data.tokenizer)
    if is_read(cfg.model) or vocabulary is None:
        return
    from optim import registry
    from trainer.display.report import ratio_text
    from trainer.memory import format_bytes
    from trainer.precision import torch_dtype

    shapes = llama_shapes(cfg.model, vocabulary)
    configs = {name: registry.config_class(name)() for name in registry.names()} | {cfg.optim.name: cfg.optim}
    sizes = {
        name: registry.state_bytes(own, shapes, torch_dtype(cfg.precision.weights)) for name, own in configs.items()
    }
    heading(console, "Bytes of optimizer states", f"for {cfg.model.name}; others than the chosen one at their defaults")
    table = grid(24, 10, 6)
    for name, size in sorted(sizes.items(), key=lambda item: item[1]):
        mark = "*" if name == cfg.optim.name else " "
        table.add_row(f"{mark} {name}", Text(format_bytes(size), justify="right"), ratio_text(size, sizes["adamw"]), "")
    console.print(table)


def make_console() -> Console:
    """Return a console of at most `WIDTH` columns, plain where the output is no terminal."""
    if not sys.stdout.isatty():
        return Console(width=WIDTH, highlight=False, color_system=None)
    return Console(width=min(WIDTH, Console().width), highlight=False)


def heading(console: Console, title: str, remark: str = "") -> None:
    console.print(f"\n[bold]{title}[/]" + (f" ({remark})" if remark else "") + "\n")


def flags_table() -> Table:
    table = grid(22)
    table.add_row("  -m, --multirun", "run every combination of comma-separated values (Hydra's sweeper and launcher)")
    table.add_row("  -c, --cfg", "print the resolved configuration as YAML instead of training")
    table.add_row("  -h, --help", "this text, for the choices given")
    return table


def grid(*widths: int) -> Table:
    """Return a table of columns with fixed widths and one that takes the rest."""
    table = Table.grid(padding=(0, 1, 0, 0))
    for width in widths:
        table.add_column(width=width, overflow="fold")
    table.add_column(overflow="fold")
    return table


def chosen(overrides: list[str]) -> dict[str, str]:
    """Return the choice of every group: configs/train.yaml's, or the overrides'."""
    main = OmegaConf.load(store.CONFIGS / f"{store.MAIN}.yaml")
    choices = {str(k): str(v) for entry in main.defaults if isinstance(entry, DictConfig) for k, v in entry.items()}
    given = (override.partition("=") for override in overrides)
    return choices | {key: value for key, _, value in given if key in store.groups()}


def groups_table(choices: dict[str, str]) -> Table:
    table = grid(13, 26)
    for group in store.groups():
        label = f"  [bold]{group}[/]"
        for choice, text in choice_docs(group).items():
            mark = "*" if choices.get(group) == choice else " "
            table.add_row(label, f"{mark} {choice}", escape(text))
            label = ""
    table.add_row("", "", "* as chosen here")
    return table


def option_tables(cfg: DictConfig) -> Iterator[Table]:
    """Yield a table for the options of the root and of each section."""
    own = [name for name, kind in store.SECTIONS.items() if not is_dataclass(kind)]
    free = [name for name, kind in hints(Config).items() if get_origin(kind) is dict]
    yield options_table("", Config, cfg, own + free)
    for name, kind in store.SECTIONS.items():
        if is_dataclass(kind):
            yield from section_tables(f"{name}.", cfg[name])


def section_tables(prefix: str, values: DictConfig) -> Iterator[Table]:
    """Yield a table for the options of a section, and one for each section in it."""
    kind = OmegaConf.get_type(values)
    inner = [name for name, annotated in hints(kind).items() if is_dataclass(annotated)]
    yield options_table(prefix, kind, values, [name for name in hints(kind) if name not in inner])
    for name in inner:
        yield from section_tables(f"{prefix}{name}.", values[name])


def options_table(prefix: str, kind: type, values: DictConfig, names: list[str]) -> Table:
    table = grid(29, 20)
    docs, types = option_docs(kind), hints(kind)
    for name in names:
        choices = choices_of(types[name])
        untold = any(not re.search(rf"\b{choice}\b", docs[name]) for choice in choices)
        text = f"{docs[name]} One of {', '.join(choices)}." if untold else docs[name]
        value = OmegaConf.to_container(values[name]) if OmegaConf.is_config(values[name]) else values[name]
        table.add_row(f"  {prefix}{name}", escape(f"{type_name(types[name])} = {shown(value)}"), escape(text))
    return table


def choices_of(kind: Any) -> list[str]:
    return list(kind.__members__) if isinstance(kind, type) and issubclass(kind, Enum) else []


def type_name(kind: Any) -> str:
    """Return a type as a user would call it."""
    if isinstance(kind, UnionType):
        return "|".join("null" if part is NoneType else type_name(part) for part in get_args(kind))
    if get_origin(kind) is list:
        return f"[{type_name(get_args(kind)[0])}, ...]"
    if get_origin(kind) is dict:
        return "KEY=VALUE"
    if choices_of(kind):
        return "choice"
    return {str: "text", float: "number", int: "int", bool: "bool"}.get(kind, str(kind))
