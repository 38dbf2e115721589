"""Everything known about pairs and triples of values: run an array of combinations, chase what its rows left open."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.composition.axes import Combination
from tests.composition.cover import Array, Core, minimal, pairs_of, reduce_to_core, triples_of
from tests.composition.journal import Judge
from tests.composition.laboratory import Outcome


@dataclass
class Survey:
    """Outcomes by combination, and what follows for pairs and triples."""

    outcomes: dict[Combination, Outcome] = field(default_factory=dict)
    refusals: dict[Core, str] = field(default_factory=dict)
    """The fewest values that are refused together, with the reason."""
    impossible: list[Core] = field(default_factory=list)
    """Pairs and triples that no combination may hold."""

    @property
    def failures(self) -> dict[Combination, Outcome]:
        return {combination: outcome for combination, outcome in self.outcomes.items() if not outcome.passes}

    def equal(self) -> set[Core]:
        """Pairs and triples that some combination equal to its reference holds."""
        rows = [row for row, outcome in self.outcomes.items() if outcome.kind == "equal"]
        return set().union(*(held_by(row) for row in rows))


def held_by(row: Combination) -> set[Core]:
    return pairs_of(row) | triples_of(row)


def run(
    laboratory: Judge,
    rows: Iterable[Combination],
    tell: Callable[[str], None] = lambda line: None,
    until: float = math.inf,
) -> dict[Combination, Outcome]:
    """Judge `rows`, one after the other; none is begun after `until`, on the monotonic clock."""
    outcomes = {}
    for count, row in enumerate(rows, 1):
        began = time.monotonic()
        if began > until:
            tell(f"out of time before combination {count}")
            break
        outcomes[row] = laboratory.judge(row)
        tell(f"{count:4} {time.monotonic() - began:5.1f} s  {row}\n             {outcomes[row]}")
    return outcomes


def one_part(
    laboratory: Judge,
    fixed: Core,
    part: int,
    parts: int,
    tell: Callable[[str], None] = lambda line: None,
    until: float = math.inf,
) -> Survey:
    """Judge every `parts`-th row of the covering array, from number `part` on, the first being 1."""
    array = Array(fixed, triples=True)
    rows = list(array.rows())[part - 1 :: parts]
    return Survey(run(laboratory, rows, tell, until), array.refusals, array.impossible)


def all_pairs(
    laboratory: Judge,
    fixed: Core = frozenset(),
    tell: Callable[[str], None] = lambda line: None,
    until: float = math.inf,
) -> Survey:
    """Judge a covering array; then, for what was left open by a row refused only when it was built, that alone."""
    survey = one_part(laboratory, fixed, 1, 1, tell, until)
    refused = [row for row, outcome in survey.outcomes.items() if outcome.kind == "refused"]

    def problems(row: Combination) -> list[str]:
        if row not in survey.outcomes:
            survey.outcomes[row] = laboratory.judge(row)
        return [survey.outcomes[row].text] if survey.outcomes[row].kind == "refused" else []

    for row in refused:
        text = survey.outcomes[row].text
        survey.refusals[reduce_to_core(row, text, problems)] = text
    known = survey.equal()
    left = {core for row in [*survey.failures, *refused] for core in held_by(row)} - known
    for core in sorted(left, key=sorted):
        alone = [row for row in minimal(core | fixed) if not row.problems]
        survey.outcomes |= run(laboratory, [row for row in alone[:1] if row not in survey.outcomes], tell, until)
        tried = [row for row in alone if row in survey.outcomes]
        if not alone or (tried and all(survey.outcomes[row].kind == "refused" for row in tried)):
            survey.impossible.append(core)
    return survey
