"""Overrides as the user typed them: their form, and the choices of groups. Values are in `trainer.cli.values`.

Hydra stops at the first error, and accepts `+optim.typo=1`, which nothing would read; here each override is judged by
itself, so that every mistake is reported.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType, Quote, QuotedString, ValueType
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from trainer.cli import store
from trainer.errors import UserError
from trainer.nearest import hint

SET_BY_GROUP = ("optim.name", "model.name")
"""Labels that stand for everything else in their group: setting one alone would change nothing."""


@dataclass
class Findings:
    """What is wrong with a command line, and which options that leaves in doubt."""

    problems: list[str] = field(default_factory=list)
    doubtful: set[str] = field(default_factory=set)
    """Options, and whole groups, whose value isn't what the user meant; conclusions drawn from them are withheld."""
    given: set[str] = field(default_factory=set)
    """Options that the user set to something possible: even in a doubtful group they are what was meant."""

    def doubts(self, problem: str) -> bool:
        """Whether a problem speaks of an option in doubt, so that it may only follow from a reported one."""
        for key in self.doubtful:
            pattern = rf"(?<![\w.]){re.escape(key)}" + (r"(?!\w)" if "." in key else r"(\.\w+|(?==))")
            if any(match[0] not in self.given for match in re.finditer(pattern, problem)):
                return True
        return False

    def add(self, problem: str, *doubtful: str) -> None:
        self.problems.append(problem)
        self.doubtful.update(doubtful)


def parse(texts: list[str], found: Findings) -> list[Override]:
    """Parse each override with Hydra's grammar; what isn't one becomes a problem."""
    parser = OverridesParser.create()
    parsed = []
    for text in texts:
        try:
            parsed.append(parser.parse_override(text))
        except HydraException as error:
            found.add(syntax_problem(text, str(error)), text.lstrip("+~").partition("=")[0])
    return parsed


def syntax_problem(text: str, reason: str) -> str:
    """Say how to write an override that Hydra's grammar doesn't take."""
    key, equals, value = text.partition("=")
    if text.startswith("-"):
        return f"{text}: no such flag; options are written key=value without dashes, such as train.steps=100"
    if not equals:
        return f"{text}: is no override; write key=value, such as train.steps=100 (see `stowage train --help`)"
    detail = next((line for line in reason.splitlines() if not line.startswith(("Error parsing", "See https"))), "")
    if "'" in value or '"' in value:
        return f"{text}: cannot be read ({detail}); check that quotes and brackets come in pairs"
    return f"{text}: cannot be read ({detail}); quote a value with special characters: '{key}=\"{value}\"'"


def split(parsed: list[Override], found: Findings, *, sweep: bool = False) -> tuple[list[Override], list[Override]]:
    """Return the well-formed choices of groups and the well-formed values; the rest become problems."""
    groups, values = [], []
    for override in parsed:
        if form_problem := wrong_form(override, sweep=sweep):
            found.add(form_problem, override.key_or_group)
        elif override.key_or_group not in store.groups():
            values.append(override)
        elif choice_problem := wrong_choice(override):
            found.add(choice_problem, override.key_or_group)
        else:
            groups.append(override)
    return groups, values


def wrong_form(override: Override, *, sweep: bool) -> str | None:
    """Say what is wrong with an override before its key and value are looked at, if anything."""
    text, key = str(override.input_line), override.key_or_group
    plain = text.lstrip("+~")
    if key.split(".")[0].split("/")[0] == "hydra":
        return None if sweep else f"{text}: Hydra's settings act only in a sweep (-m); a run's folder is run.dir=PATH"
    if override.type is OverrideType.DEL:
        return f"{text}: an option cannot be removed; set it instead, to null where it may be empty"
    if override.package is not None:
        return f"{text}: a group cannot be placed elsewhere; write {key}={shown_choice(override)}"
    if override.type is OverrideType.ADD:
        known = known_options()
        if key in store.groups() or key in known:
            return f"{text}: the option exists already; write it without +: {plain}"
        return f"{text}: no such option, and none can be added; {hint(key, known)}{listing(key)}"
    if override.is_sweep_override() and not sweep:
        return f"{text}: several values make a sweep; add -m to run each, or quote a single one: '{quoted(plain)}'"
    if key in SET_BY_GROUP:
        group = key.partition(".")[0]
        return f"{text}: is set by the choice of {group}; write {group}={shown_choice(override)}"
    return None


def quoted(text: str) -> str:
    """Return `key=value` with the value as one text, whatever is in it."""
    key, _, value = text.partition("=")
    return f'{key}="{value}"'


def quote(value: str) -> str:
    """Return a text as Hydra reads it back unchanged."""
    return str(QuotedString(value, Quote.single).with_quotes())


def shown_choice(override: Override) -> str:
    return str(override.input_line).partition("=")[2]


def wrong_choice(override: Override) -> str | None:
    """Say that a group has no such choice, if so."""
    group, known = override.key_or_group, store.groups()[override.key_or_group]
    for choice in choices(override):
        if group == "recipe" and isinstance(choice, str):
            try:
                store.add_recipe(choice)
            except UserError as error:
                return str(error)
        elif not isinstance(choice, str) or choice not in known:
            near = hint(str(choice), known, prefix=f"{group}=")
            return f"{override.input_line}: no such choice; {near}Known for {group}: {', '.join(known)}"
    return None


def choices(override: Override) -> list[Any]:
    """Return the values an override asks for: one, or those of a sweep that can be listed (a glob can't, yet)."""
    if not override.is_sweep_override():
        return [override.value()]
    listed = override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP
    return list(override.sweep_iterator()) if listed else []


def hints(node: type) -> dict[str, Any]:
    """Return the options of a dataclass with their types."""
    annotated = get_type_hints(node)
    return {entry.name: annotated[entry.name] for entry in fields(node)}


def known_options(cfg: DictConfig | None = None) -> list[str]:
    """Return every option as a dotted key: of the composed `cfg`, else of all choices together."""
    found: dict[str, None] = {}
    for name, kind in store.SECTIONS.items():
        kinds = [OmegaConf.get_type(cfg[name])] if cfg is not None else [kind, *store.subclasses(kind)]
        for each in kinds if is_dataclass(kind) else ():
            found |= dict.fromkeys(dotted(f"{name}.", each))
        if not is_dataclass(kind):
            found[name] = None
    return list(found)


def dotted(prefix: str, kind: type) -> Iterator[str]:
    """Yield the options of a section and of the sections in it."""
    for name, inner in hints(kind).items():
        if is_dataclass(inner):
            assert isinstance(inner, type)
            yield from dotted(f"{prefix}{name}.", inner)
        else:
            yield prefix + name


def listing(key: str, cfg: DictConfig | None = None) -> str:
    """Return what is known beside `key`: the options of its section, or all sections."""
    known = known_options(cfg)
    for section in (key, key.rpartition(".")[0], key.split(".")[0].split("/")[0]):
        beside = [name.removeprefix(f"{section}.") for name in known if section and name.startswith(f"{section}.")]
        if beside:
            return f"Known in {section}: {', '.join(beside)}"
    return f"Known sections: {', '.join(store.SECTIONS)}"
