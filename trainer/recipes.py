"""Recipes: a result, the configuration that gave it, and the figures a new run of it is held to.

A folder `recipes/<name>/` has a config.yaml (an overlay on configs/train.yaml), a claim.yaml (below), a README.md, and
what the last run here measured: runs.jsonl, loss.csv, resolved.yaml, versions.txt.

    # claim.yaml
    claim: one sentence
    arms:
      adamw: [optim=adamw]                        # overrides
      galore: [optim=galore, optim.rank=64]
      longer:                                     # a stage: begins with the weights that another arm ends with
        after: adamw
        ranks: 2                                  # processes, started by torchrun
        overrides: [optim=adamw, data.sequence_length=4096, parallel.sequence=ring]
    seeds: [0, 1, 2]
    metrics: [eval_perplexity, state_bytes]       # keys of summary.json shown in the table, nested ones with dots
    checks:
      - name: perplexity, GaLore over AdamW
        arm: galore
        metric: eval_perplexity
        over_arm: adamw                           # a ratio, seed by seed; over_metric divides by another figure
        expected: 1.05
        tolerance: 0.05                           # relative; or at_most / at_least instead of the two
"""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from trainer.errors import UserError
from trainer.nearest import hint

ROOT = Path(__file__).resolve().parents[1]
"""Folder that holds trainer/, configs/ and recipes/: the checkout, or site-packages."""

RECIPES = ROOT / "recipes"


@dataclass(kw_only=True)
class Check:
    """One figure of a claim: `arm`'s `metric`, or its ratio to another arm or metric, averaged over the seeds."""

    name: str
    arm: str
    metric: str
    over_arm: str | None = None
    over_metric: str | None = None
    expected: float | None = None
    tolerance: float | None = None
    at_most: float | None = None
    at_least: float | None = None

    def problems(self, arms: Mapping[str, Any]) -> list[str]:
        found = [
            f"check {self.name!r}: no arm {arm!r}; known: {', '.join(arms)}"
            for arm in (self.arm, self.over_arm)
            if arm is not None and arm not in arms
        ]
        bounds = [self.expected is not None, self.at_most is not None, self.at_least is not None]
        if sum(bounds) != 1 or (self.expected is None) != (self.tolerance is None):
            found.append(f"check {self.name!r}: give expected and tolerance, or at_most, or at_least")
        return found

    def values(self, runs: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> list[float]:
        """Return the figure of every seed that has been measured; `runs` maps (arm, seed) to a summary."""
        over = self.over_arm is not None or self.over_metric is not None
        below = (self.over_arm or self.arm, self.over_metric or self.metric)
        found = []
        for seed in seeds:
            value = figure(runs.get((self.arm, seed), {}), self.metric)
            divisor = figure(runs.get((below[0], seed), {}), below[1]) if over else 1.0
            if value is not None and divisor:
                found.append(value / divisor)
        return found

    def holds(self, mean: float) -> bool:
        if self.expected is not None and self.tolerance is not None:
            return abs(mean - self.expected) <= self.tolerance * abs(self.expected)
        if self.at_most is not None:
            return mean <= self.at_most
        return self.at_least is not None and mean >= self.at_least

    @property
    def promise(self) -> str:
        """The claim as text."""
        if self.expected is not None and self.tolerance is not None:
            return f"{self.expected:.4g} ± {self.tolerance:.3g} of it"
        return f"at most {self.at_most:.4g}" if self.at_most is not None else f"at least {self.at_least:.4g}"


@dataclass(kw_only=True)
class Arm:
    """One of the ways of training that are compared."""

    overrides: list[str] = field(default_factory=list)
    after: str | None = None
    """An arm before it, whose exported weights this one reads (`model=hf`) in place of drawing its own."""
    ranks: int = 1

    def problems(self, name: str, before: Sequence[str]) -> list[str]:
        """Args: before: arms that are run earlier."""
        found = []
        if self.after is not None and self.after not in before:
            known = ", ".join(before) or "none"
            found.append(f"arm {name!r}: after: {self.after} is no arm before it; those are: {known}")
        if self.ranks < 1:
            found.append(f"arm {name!r}: ranks: {self.ranks} must be at least 1")
        return found


@dataclass(kw_only=True)
class Claim:
    """What a recipe promises, and the runs that show it."""

    claim: str
    arms: dict[str, Arm] = field(default_factory=dict)
    seeds: list[int] = field(default_factory=lambda: [0])
    metrics: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)

    def problems(self) -> list[str]:
        names = list(self.arms)
        found = [problem for check in self.checks for problem in check.problems(self.arms)]
        for place, name in enumerate(names):
            found += self.arms[name].problems(name, names[:place])
        if not self.arms or not self.seeds or not self.checks:
            found.append("needs at least one arm, one seed and one check")
        return found


@dataclass(frozen=True)
class Verdict:
    """A check held against what was measured."""

    check: Check
    values: list[float]
    complete: bool
    """Whether every seed was measured."""

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def spread(self) -> float | None:
        """Standard deviation over the seeds."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None

    @property
    def holds(self) -> bool:
        return self.complete and self.mean is not None and self.check.holds(self.mean)


@dataclass(frozen=True)
class Recipe:
    """A recipe folder that has been read."""

    name: str
    folder: Path
    claim: Claim

    def judge(self, runs: Mapping[tuple[str, int], Mapping[str, Any]], seeds: Sequence[int]) -> list[Verdict]:
        """Hold the summaries of `runs`, by (arm, seed), against every check."""
        found = []
        for check in self.claim.checks:
            values = check.values(runs, seeds)
            found.append(Verdict(check, values, len(values) == len(seeds)))
        return found


def figure(summary: Mapping[str, Any], key: str) -> float | None:
    """Return the number under a dotted key of a summary, None where it was not measured."""
    value: Any = summary
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def names() -> list[str]:
    """Return the recipes that come with the program."""
    return sorted(path.parent.name for path in RECIPES.glob("*/config.yaml"))


def find(name: str) -> Path:
    """Return the folder of a recipe, given its name or its path.

    Raises:
        UserError: there is no such recipe.
    """
    for folder in (RECIPES / name, Path(name).expanduser()):
        if name and (folder / "config.yaml").is_file():
            return folder.resolve()
    known = names()
    raise UserError(
        f"recipe={name}: no such recipe; {hint(name, known, prefix='recipe=')}Known: {', '.join(known)}; "
        "or give the path of a folder with a config.yaml"
    )


def overlay(folder: Path) -> dict[str, Any]:
    """Read a recipe's config.yaml, interpolations unresolved.

    Raises:
        UserError: the file is not a YAML mapping.
    """
    return mapping(folder / "config.yaml")


def mapping(path: Path) -> dict[str, Any]:
    """Read a YAML file that must hold a mapping, interpolations unresolved."""
    try:
        content = OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{path}: holds {type(content).__name__}, needs `key: value` lines")
    return {str(key): value for key, value in content.items()}


def with_arms(content: dict[str, Any]) -> dict[str, Any]:
    """Write an arm that is a list, of its overrides, as what it is short for."""
    arms = content.get("arms")
    if not isinstance(arms, dict):
        return content
    return content | {
        "arms": {name: {"overrides": arm} if isinstance(arm, list) else arm for name, arm in arms.items()}
    }


def read(name: str) -> Recipe:
    """Read a recipe with its claim.

    Raises:
        UserError: there is no such recipe, or its claim.yaml is missing or not of the form above.
    """
    folder = find(name)
    path = folder / "claim.yaml"
    if not path.is_file():
        raise UserError(f"{path}: no such file, so the recipe claims nothing; its form is in trainer/recipes.py")
    try:
        claim = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Claim), with_arms(mapping(path))))
    except OmegaConfBaseException as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{path}: {error.full_key or 'claim'}: {reason}; the form is in trainer/recipes.py") from error
    assert isinstance(claim, Claim)
    if problems := claim.problems():
        raise UserError("\n".join(f"{path}: {problem}" for problem in problems))
    return Recipe(folder.name, folder, claim)
