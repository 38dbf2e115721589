"""Everything known about pairs of values: run an array of combinations, and chase what its rows left open."""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from tests.composition.axes import Combination
from tests.composition.cover import Array, Core, minimal, pairs_of, reduce_to_core
from tests.composition.laboratory import Laboratory, Outcome


@dataclass
class Survey:
    """Outcomes by combination, and what follows for pairs."""

    outcomes: dict[Combination, Outcome] = field(default_factory=dict)
    refusals: dict[Core, str] = field(default_factory=dict)
    """The fewest values that are refused together, with the reason."""
    refused_pairs: list[Core] = field(default_factory=list)
    """Pairs that no combination may hold."""

    @property
    def failures(self) -> dict[Combination, Outcome]:
        return {combination: outcome for combination, outcome in self.outcomes.items() if not outcome.passes}

    def equal_pairs(self) -> set[Core]:
        """Pairs that some combination equal to its reference holds."""
        rows = [row for row, outcome in self.outcomes.items() if outcome.kind == "equal"]
        return set().union(*(pairs_of(row) for row in rows))


def run(
    laboratory: Laboratory,
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


def all_pairs(
    laboratory: Laboratory,
    fixed: Core = frozenset(),
    tell: Callable[[str], None] = lambda line: None,
    until: float = math.inf,
) -> Survey:
    """Judge a covering array; then, for each pair left open by a row refused only when it was built, the pair alone."""
    array = Array(fixed)
    survey = Survey(run(laboratory, array.rows(), tell, until), array.refusals, array.impossible)
    refused = [row for row, outcome in survey.outcomes.items() if outcome.kind == "refused"]

    def problems(row: Combination) -> list[str]:
        if row not in survey.outcomes:
            survey.outcomes[row] = laboratory.judge(row)
        return [survey.outcomes[row].text] if survey.outcomes[row].kind == "refused" else []

    for row in refused:
        text = survey.outcomes[row].text
        survey.refusals[reduce_to_core(row, text, problems)] = text
    known = survey.equal_pairs()
    left = {pair for row in [*survey.failures, *refused] for pair in pairs_of(row)} - known
    for pair in sorted(left, key=sorted):
        alone = [row for row in minimal(pair | fixed) if not row.problems]
        survey.outcomes |= run(laboratory, [row for row in alone[:1] if row not in survey.outcomes], tell, until)
        tried = [row for row in alone if row in survey.outcomes]
        if not alone or (tried and all(survey.outcomes[row].kind == "refused" for row in tried)):
            survey.refused_pairs.append(pair)
    return survey
