"""Every combination equals one process or is refused with a reason: a few in the quick suite, all pairs in the slow."""

import os
import random
from collections.abc import Iterator

import pytest

from optim import registry
from tests.composition import document
from tests.composition.axes import AXES, BY_NAME, Combination
from tests.composition.cover import Array, drawn, meaningful_pairs
from tests.composition.laboratory import Laboratory, Outcome
from tests.composition.survey import all_pairs, run


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with Laboratory() as found:
        yield found


FOUND = [
    # the norm of the step before was in no checkpoint
    Combination.of(ranks=2, clip="previous", in_backward="yes", resume="again"),
    # DeepSpeed's hooks hand on an alias of what the head returns, which was taken for a model that scales its logits
    Combination.of(ranks=2, zero=3, engine="deepspeed", precision="fp32", loss="chunked"),
    # the trial forward, whether documents are kept apart, ran without autocast over weights gathered in bf16
    Combination.of(ranks=2, zero=3, precision="bf16", packing="concat"),
    # blocks were tried out on weights that a sharded model has yet to get
    Combination.of(ranks=2, zero=3, blocks="lean"),
]
"""Combinations that once went wrong."""
OPEN = frozenset([("optimizer", "torchao_adamw_fp8"), ("activations", "fp8")])
"""Differs in bf16_sr with zero=3 on one rank, 4 micro-steps and the update in backward: weights end 5.3 times their
way apart (limit 0.7), from first gradients 7e-4 apart. Why is not known. A crash or an ignored option still fails."""


def test_each_value_in_some_combination(laboratory: Laboratory) -> None:
    rows = [*Array(strength=1).rows(), *FOUND]  # not as parameters: finding them takes seconds at every collection
    wrong = {row: outcome for row, outcome in run(laboratory, rows, print).items() if outcome.kind != "equal"}
    wrong = {row: outcome for row, outcome in wrong.items() if outcome.kind != "differs" or not pairs(row) >= OPEN}
    assert not wrong, "\n".join(f"{row}: {outcome}" for row, outcome in wrong.items())


def judge(failures: dict[Combination, Outcome]) -> None:
    """Fail for what crashes, ignores an option or differs in exact arithmetic; expect no better yet of the rest, which
    docs/composition.md lists: narrow formats that drift beyond their limit, and 8-bit activations under lean blocks."""
    known = {
        row
        for row, outcome in failures.items()
        if outcome.kind == "differs"
        and (row["precision"] != "fp64" or (row["activations"] in ("int8", "fp8") and row["blocks"] == "lean"))
    }
    unknown = {row: outcome for row, outcome in failures.items() if row not in known}
    assert not unknown, "\n".join(f"{row}: {outcome}" for row, outcome in unknown.items())
    if known:
        pytest.xfail(f"{len(known)} combinations drift further than allowed, such as {next(iter(known))}")


def pairs(row: Combination) -> set[tuple[str, str]]:
    return {(axis.name, row[axis.name]) for axis in AXES}


@pytest.mark.slow
def test_all_pairs_of_values(laboratory: Laboratory) -> None:
    survey = all_pairs(laboratory, tell=print)
    assert len(survey.equal_pairs()) >= 0.95 * len(meaningful_pairs())
    judge(survey.failures)


@pytest.mark.slow
def test_random_combinations(laboratory: Laboratory) -> None:
    seed = int(os.environ.get("COMPOSITION_SEED") or random.randrange(10**6))
    print(f"COMPOSITION_SEED={seed}")
    outcomes = run(laboratory, drawn(12, seed), print)
    judge({row: outcome for row, outcome in outcomes.items() if not outcome.passes})


def test_every_axis_has_a_default_that_asks_for_nothing_special() -> None:
    for axis in AXES:
        assert len({value.name for value in axis.values}) == len(axis.values), axis.name
        assert axis.about, axis.name
    assert Combination.of().reference == Combination.of()
    assert Combination.of(ranks=3, optimizer="galore").reference == Combination.of(optimizer="galore")
    assert Combination.of(clip="two_pass", in_backward="yes").reference == Combination.of(clip="global")


def test_every_optimizer_is_on_the_axis() -> None:
    assert [value.name for value in BY_NAME["optimizer"].values] == registry.names()


def test_the_document_lists_the_axes() -> None:
    text = document.PATH.read_text()
    old = [line for line in document.axis_table() if line not in text]
    assert not old, "write it anew: python -m tests.composition --docs"
