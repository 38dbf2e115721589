"""Few combinations that hold every pair of values: a covering array, found greedily and the same every time.

With strength 1 every value alone, with 3 every triple.

What the configuration check refuses is no use in an array, for nothing else in such a row is tried. A refused row is
reduced to its core - the values that it takes to be refused - and no later row contains one. A pair that has no place
in any row is refused itself.
"""

import functools
import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tests.composition.axes import AXES, BY_NAME, Axis, Combination, applies

Choice = tuple[str, str]
"""An axis and the name of a value."""
T = TypeVar("T")
Core = frozenset[Choice]

TRIES = 6
"""Candidates for each row that cover much, and that are plain; the one with most new pairs is taken."""


def pairs_of(combination: Combination, strength: int = 2) -> set[Core]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), strength)}


def values_of(core: Core) -> tuple:  # type: ignore[type-arg]
    return tuple(BY_NAME[axis][name] for axis, name in core)


def optimizers_for(core: Core) -> list[str]:
    """Optimizers that have the options of all values of `core`."""
    chosen = dict(core)
    names = [chosen["optimizer"]] if "optimizer" in chosen else [value.name for value in BY_NAME["optimizer"].values]
    return [name for name in names if applies(values_of(core), name)]


def minimal(core: Core) -> Iterator[Combination]:
    """Combinations with the values of `core` and nothing else but defaults, one for each optimizer that has them."""
    for name in optimizers_for(core):
        yield Combination.of(**{"optimizer": name, **dict(core)})


@functools.cache
def meaningful_pairs(fixed: Core = frozenset(), strength: int = 2) -> list[Core]:
    """Pairs of values of two axes that some optimizer has the options for, `fixed` values given."""
    taken = dict(fixed)
    choices = [
        [(axis.name, value.name) for value in axis.values if taken.get(axis.name, value.name) == value.name]
        for axis in AXES
    ]
    pairs = (frozenset(p) for few in itertools.combinations(choices, strength) for p in itertools.product(*few))
    return [pair for pair in pairs if optimizers_for(pair | fixed)]


Problems = Callable[[Combination], Sequence[str]]


def reduce_to_core(row: Combination, problem: str, problems: Problems, keep: Core = frozenset()) -> Core:
    """The values of `row` that it takes to be refused by `problem`: put one back to its default and it is not, or,
    where the problem names an option that has its default, give that another value."""
    found = row
    for axis in reversed(AXES):
        plainer = found.but(**{axis.name: axis.values[0].name})
        if (axis.name, row[axis.name]) not in keep and plainer != found and plainer.is_meaningful():
            found = plainer if problem in problems(plainer) else found
    core = frozenset(
        (axis.name, found[axis.name])
        for axis in AXES
        if found[axis.name] != axis.values[0].name
        or (is_named(axis, problem) and any(problem not in problems(other) for other in neighbours(found, axis)))
    )
    # a default may be refused for the same reason as what the row has in its place: then that belongs to the core
    replaced = frozenset((axis, row[axis]) for axis, name in core if row[axis] != name)
    return reduce_to_core(row, problem, problems, keep | replaced) if replaced else core


def is_named(axis: Axis, problem: str) -> bool:
    """Whether `problem` may be about `axis`: it names it or an option of it, or there is none to be named."""
    options = [override.split("=")[0] for value in axis.values for override in value.overrides]
    return not options or any(name in problem for name in (axis.name, *options) if name != "optim")


def neighbours(combination: Combination, axis: Axis) -> Iterator[Combination]:
    """The combinations that differ from it in `axis` alone."""
    for value in axis.values:
        other = combination.but(**{axis.name: value.name})
        if other != combination and other.is_meaningful():
            yield other


class Array:
    """Grows row by row. `refusals` holds the core of everything that was refused, with the reason."""

    def __init__(self, fixed: Core = frozenset(), strength: int = 2) -> None:
        self.fixed, self.strength, self.draw = fixed, strength, random.Random(0)
        self.uncovered = dict.fromkeys(meaningful_pairs(fixed, strength))  # ordered, unlike a set
        self.impossible: list[Core] = []
        self.refusals: dict[Core, str] = {}

    def rows(self) -> Iterator[Combination]:
        """Yield rows until every pair is covered or found impossible."""
        while self.uncovered:
            row = self._next_row()
            if row is not None:
                self.cover(row)
                yield row

    def cover(self, row: Combination) -> None:
        for pair in pairs_of(row, self.strength):
            self.uncovered.pop(pair, None)

    def _next_row(self) -> Combination | None:
        """A row with the first uncovered pair and as many others as a few tries find; None if there is no such row."""
        pair, known = next(iter(self.uncovered)), len(self.refusals)
        for optimizer in self._shuffled(optimizers_for(pair | self.fixed)):
            start = {**dict(self.fixed), **dict(pair), "optimizer": optimizer}
            tries = [self._complete(dict(start), plain=count >= TRIES) for count in range(2 * TRIES)]
            found = [row for row in tries if row is not None]
            for row in sorted(found, key=self._gain, reverse=True):
                if not row.problems:
                    return row
                for problem in row.problems:
                    core = reduce_to_core(row, problem, lambda combination: combination.problems)
                    self.refusals.setdefault(core, problem)
        if len(self.refusals) == known:
            del self.uncovered[pair]
            self.impossible.append(pair)
        return None

    def _complete(self, chosen: dict[str, str], *, plain: bool) -> Combination | None:
        """Choose for each open axis, in random order, a value that is in no refused core: one that covers most, which
        may leave nothing for another axis, or the default where `plain`."""
        for axis in self._shuffled([axis for axis in AXES if axis.name not in chosen]):
            gains: list[tuple[int, float, str]] = []
            for value in axis.values:
                if applies((value,), chosen["optimizer"]) and not self._hits(chosen | {axis.name: value.name}):
                    choice = (axis.name, value.name)
                    new = int(value is axis.values[0]) if plain else self._new(choice, list(chosen.items()))
                    exact = axis.name == "precision" and value is axis.values[0]  # the strictest, and quickest
                    gains.append((new, exact + self.draw.random(), value.name))
            if not gains:
                return None
            chosen[axis.name] = max(gains)[2]
        row = Combination.of(**chosen)
        return row if self._allowed(row) else None

    def _new(self, choice: Choice, chosen: list[Choice]) -> int:
        few = itertools.combinations(chosen, self.strength - 1)
        return sum(frozenset([choice, *others]) in self.uncovered for others in few)

    def _gain(self, row: Combination) -> int:
        return sum(pair in self.uncovered for pair in pairs_of(row, self.strength))

    def _hits(self, chosen: dict[str, str]) -> bool:
        items = set(chosen.items())
        return any(core <= items for core in self.refusals)

    def _allowed(self, row: Combination) -> bool:
        return row.is_meaningful() and not self._hits(dict(row.items()))

    def _shuffled(self, things: Sequence[T]) -> list[T]:
        return self.draw.sample(list(things), len(things))


def product(axes: Iterable[str], fixed: Core = frozenset()) -> Iterator[Combination]:
    """Every meaningful combination of the values of `axes`, the other axes fixed or at their defaults."""
    open_axes = [BY_NAME[name] for name in axes if name not in dict(fixed)]
    for names in itertools.product(*([value.name for value in axis.values] for axis in open_axes)):
        row = Combination.of(**dict(fixed), **dict(zip((axis.name for axis in open_axes), names, strict=True)))
        if row.is_meaningful():
            yield row


def drawn(count: int, seed: int, fixed: Core = frozenset()) -> Iterator[Combination]:
    """Random combinations, each meaningful; what the check refuses may be among them."""
    draw = random.Random(seed)
    while count:
        chosen = {axis.name: draw.choice(axis.values).name for axis in AXES} | dict(fixed)
        row = Combination.of(**chosen)
        if row.is_meaningful():
            count -= 1
            yield row
