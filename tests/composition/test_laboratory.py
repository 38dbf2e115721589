"""The laboratory sees what it is there to see."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.composition import journal
from tests.composition.axes import Combination
from tests.composition.case import Job
from tests.composition.cover import Array, meaningful_pairs, meaningful_triples
from tests.composition.journal import Journal
from tests.composition.laboratory import Laboratory, Outcome
from tests.composition.pool import Pool, worst
from tests.composition.survey import all_pairs, held_by, one_part


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory() as found:
        yield found


@pytest.mark.parametrize(
    "chosen, fault",
    [
        ({"ranks": 2, "optimizer": "sgd"}, "mean_of_gradients"),
        ({"ranks": 2, "optimizer": "sgd"}, "local_gradient_lost"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_wrong_gradient_differs(laboratory: Laboratory, chosen: dict[str, object], fault: str) -> None:
    outcome = laboratory.judge(Combination.of(**chosen), fault)
    assert outcome.kind == "differs", str(outcome)
    assert laboratory.judge(Combination.of(**chosen)).kind == "equal", "and without the mistake it is equal"


@pytest.mark.parametrize(
    "fault, said", [("raises_on_one_rank", "a mistake of rank 1"), ("dies_on_one_rank", "the process died")]
)
def test_a_rank_that_fails_is_named_and_the_next_combination_runs(
    laboratory: Laboratory, fault: str, said: str
) -> None:
    outcome = laboratory.judge(Combination.of(ranks=2), fault)
    assert outcome.kind == "crashed" and said in outcome.text
    assert laboratory.judge(Combination.of(ranks=2)).kind == "equal"


def test_a_hang_ends(tmp_path: Path) -> None:
    pool = Pool(2, seconds=5.0)
    try:
        found = worst(pool.run(Job((), fault="hangs")))
        assert found is not None and found.kind == "hung" and "no rank came back in 5 s" in found.text
    finally:
        pool.close()


def test_a_refusal_comes_before_the_first_step_with_its_reason(laboratory: Laboratory) -> None:
    outcome = laboratory.judge(Combination.of(optimizer="galore", refresh="random", ranks=2))
    assert outcome.kind == "refused" and "use optim.refresh=warm" in outcome.text


class Counting:
    """A judge that notes what it was asked."""

    def __init__(self) -> None:
        self.asked: list[Combination] = []

    def judge(self, combination: Combination) -> Outcome:
        self.asked.append(combination)
        return Outcome("equal", "", {"loss": 1e-12}, {"loss": 1e-9})


def test_a_survey_that_was_cut_off_goes_on_from_its_journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = Combination.of(ranks=2), Combination.of(ranks=3)
    judge = Counting()
    began = Journal(tmp_path, judge)
    assert began.judge(first) == began.judge(first) == judge.judge(first)
    next(tmp_path.glob("*.jsonl")).open("a").write('{"code": "cut o')
    again = Counting()
    goes_on = Journal(tmp_path, again)
    assert goes_on.judge(first) == judge.judge(first) and goes_on.judge(second).kind == "equal"
    assert again.asked == [second]
    monkeypatch.setattr(journal, "code", lambda: "of other code")
    assert Journal(tmp_path, again).known == {}


def test_parts_of_a_survey_are_the_whole_and_no_row_is_in_two(tmp_path: Path) -> None:
    free = ("zero", "ranks", "accumulation", "in_backward")
    fixed = frozenset((axis, name) for axis, name in Combination.of().items() if axis not in free)
    whole, judge = Counting(), Counting()
    all_pairs(whole, fixed)
    for part in (1, 2, 3):
        one_part(judge, fixed, part, 3)
    assert len(judge.asked) == len(set(judge.asked)) and set(judge.asked) == set(whole.asked)


def test_a_covering_array_covers_and_is_the_same_every_time() -> None:
    fixed = frozenset([("optimizer", "adamw"), ("precision", "fp64"), ("packing", "concat"), ("clip", "off")])
    array = Array(fixed, triples=True)
    rows = list(array.rows())
    covered = set().union(*(held_by(row) for row in rows))
    assert covered >= {*meaningful_pairs(fixed), *meaningful_triples(fixed)} - set(array.impossible)
    assert len(rows) < 0.2 * len(meaningful_pairs(fixed))
    assert rows == list(Array(fixed, triples=True).rows())


def test_what_is_refused_is_reduced_to_the_values_it_takes() -> None:
    array = Array(frozenset([("optimizer", "apollo"), ("refresh", "random"), ("precision", "fp64")]), strength=1)
    rows = list(array.rows())
    assert all(not row.problems for row in rows)
    core = frozenset([("optimizer", "apollo"), ("refresh", "random"), ("when", "lazy")])
    assert "random bases do not settle" in array.refusals[core]
    assert frozenset([("when", "lazy")]) in array.impossible
