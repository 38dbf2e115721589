"""Few combinations that hold every pair of values: a covering array, found greedily and the same every time.

With strength 1 every value alone, with 3 every triple; TRIPLES are those that are held besides.

What the configuration check refuses is no use in an array, for nothing else in such a row is tried. A refused row is
reduced to its core - the values that it takes to be refused - and no later row contains one. A pair that has no place
in any row is refused itself.
"""

import functools
import itertools
import random
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TypeVar

from tests.composition.axes import AXES, BY_NAME, Axis, Combination, applies

Choice = tuple[str, str]
"""An axis and the name of a value."""
T = TypeVar("T")
Core = frozenset[Choice]

TRIPLES = (
    ("zero", "in_backward", "accumulation"),
    ("zero", "in_backward", "clip"),
    ("zero", "accumulate", "accumulation"),
    ("zero", "offload", "in_backward"),
    ("zero", "precision", "embeddings"),
    ("zero", "activations", "blocks"),
    ("zero", "sequence", "engine"),
    ("zero", "checkpoint", "resume"),
    ("sequence", "activations", "accumulation"),
    ("offload", "checkpoint", "resume"),
)
"""Axes whose code meets three at a time: what is cut, when it is summed and stepped, and what lies elsewhere meanwhile.
(Every optimizer under every stage on every number of ranks is in `test_stages.py`.)"""

TRIES = 6
"""Candidates for each row that cover much, and that are plain; the one with most new pairs is taken."""


def pairs_of(combination: Combination, strength: int = 2) -> set[Core]:
    return {frozenset(pair) for pair in itertools.combinations(combination.items(), strength)}


def triples_of(combination: Combination) -> set[Core]:
    """What it holds of TRIPLES."""
    return {frozenset((axis, combination[axis]) for axis in axes) for axes in TRIPLES}


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
    return _meaningful(itertools.combinations(BY_NAME, strength), fixed)


@functools.cache
def meaningful_triples(fixed: Core = frozenset()) -> list[Core]:
    """Triples of values of the axes of TRIPLES that some optimizer has the options for, `fixed` values given."""
    return _meaningful(TRIPLES, fixed)


def _meaningful(groups: Iterable[tuple[str, ...]], fixed: Core) -> list[Core]:
    taken = dict(fixed)
    choices = {
        axis.name: [(axis.name, value.name) for value in axis.values if taken.get(axis.name, value.name) == value.name]
        for axis in AXES
    }
    found = (frozenset(core) for axes in groups for core in itertools.product(*(choices[axis] for axis in axes)))
    return [core for core in found if optimizers_for(core | fixed)]


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
    """Grows row by row. `refusals` holds the core of everything that was refused, with the reason.

    Args:
        triples: hold TRIPLES too.
    """

    def __init__(self, fixed: Core = frozenset(), strength: int = 2, *, triples: bool = False) -> None:
        self.fixed, self.strength, self.draw = fixed, strength, random.Random(0)
        wanted = meaningful_pairs(fixed, strength) + (meaningful_triples(fixed) if triples else [])
        self.uncovered = dict.fromkeys(wanted)  # ordered, unlike a set
        self.impossible: list[Core] = []
        self.refusals: dict[Core, str] = {}
        self._refused: dict[Choice, list[Core]] = defaultdict(list)
        """The cores of `refusals` by each of their values."""

    def rows(self) -> Iterator[Combination]:
        """Yield rows until everything wanted is covered or found impossible."""
        while self.uncovered:
            row = self._next_row()
            if row is not None:
                self.cover(row)
                yield row

    def cover(self, row: Combination) -> None:
        for core in pairs_of(row, self.strength) | triples_of(row):
            self.uncovered.pop(core, None)

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
                    self._refuse(reduce_to_core(row, problem, lambda combination: combination.problems), problem)
        if len(self.refusals) == known:
            del self.uncovered[pair]
            self.impossible.append(pair)
        return None

    def _refuse(self, core: Core, problem: str) -> None:
        if core not in self.refusals:
            self.refusals[core] = problem
            for choice in core:
                self._refused[choice].append(core)

    def _complete(self, chosen: dict[str, str], *, plain: bool) -> Combination | None:
        """Choose for each open axis, in random order, a value that is in no refused core: one that covers most, which
        may leave nothing for another axis, or the default where `plain`."""
        if self._is_refused(chosen):
            return None
        for axis in self._shuffled([axis for axis in AXES if axis.name not in chosen]):
            gains: list[tuple[int, float, str]] = []
            for value in axis.values:
                choice = (axis.name, value.name)
                if applies((value,), chosen["optimizer"]) and not self._hits(chosen, choice):
                    new = int(value is axis.values[0]) if plain else self._new(choice, chosen)
                    exact = axis.name == "precision" and value is axis.values[0]  # the strictest, and quickest
                    gains.append((new, exact + self.draw.random(), value.name))
            if not gains:
                return None
            chosen[axis.name] = max(gains)[2]
        row = Combination.of(**chosen)
        return row if row.is_meaningful() and not self._is_refused(chosen) else None

    def _new(self, choice: Choice, chosen: dict[str, str]) -> int:
        few = [frozenset([choice, *others]) for others in itertools.combinations(chosen.items(), self.strength - 1)]
        axes = [[axis for axis in triple if axis != choice[0]] for triple in TRIPLES if choice[0] in triple]
        few += [
            frozenset([choice, (one, chosen[one]), (other, chosen[other])])
            for one, other in axes
            if one in chosen and other in chosen
        ]
        return sum(core in self.uncovered for core in few)

    def _gain(self, row: Combination) -> int:
        return sum(core in self.uncovered for core in pairs_of(row, self.strength) | triples_of(row))

    def _hits(self, chosen: dict[str, str], choice: Choice) -> bool:
        """Whether `choice` makes of `chosen` something that contains a refused core."""
        items = {*chosen.items(), choice}
        return any(core <= items for core in self._refused[choice])

    def _is_refused(self, chosen: dict[str, str]) -> bool:
        return any(self._hits(chosen, choice) for choice in chosen.items())

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
