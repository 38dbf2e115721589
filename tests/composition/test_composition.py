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
    # after a run of DeepSpeed's ZeRO-3 in the same process, whose `linear` was left in place of torch's
    Combination.of(ranks=2, zero=3, blocks="lean", activations="int8", packing="best_fit"),
    # what was known of a matrix was learned while it had no values: torch's kernel stepped beyond its states
    Combination.of(optimizer="galore", ranks=2, zero=2, engine="deepspeed", precision="fp32"),
    # a refresh stepped by exact products, and by rounded ones where shards cut the projected side
    Combination.of(optimizer="galore", side="reverse_std", products="bf16", ranks=2, zero=3),
]
"""Combinations that once went wrong."""


def test_each_value_in_some_combination(laboratory: Laboratory) -> None:
    rows = [*Array(strength=1).rows(), *FOUND]  # not as parameters: finding them takes seconds at every collection
    judge({row: outcome for row, outcome in run(laboratory, rows, print).items() if outcome.kind != "equal"})


def judge(failures: dict[Combination, Outcome]) -> None:
    assert not failures, "\n".join(f"{row}: {outcome}" for row, outcome in failures.items())


@pytest.mark.slow
def test_all_pairs_of_values(laboratory: Laboratory) -> None:
    survey = all_pairs(laboratory, tell=print)
    assert len(survey.equal() & set(meaningful_pairs())) >= 0.95 * len(meaningful_pairs())
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
