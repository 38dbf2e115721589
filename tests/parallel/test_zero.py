"""Training under every stage of ZeRO is training in one process: same losses, gradients, norms, weights, states."""

import warnings

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.launch import World
from parallel.place import spread_text
from tests.parallel.sharded import BASE, TORCH, Outcome, on_each_rank, train_each
from trainer.cli.compose import load
from trainer.errors import UserError

STAGES = [f"parallel.zero={zero}" for zero in range(4)]
VARIANTS = {
    "plain": [],
    "tied": ["model.tie_embeddings=true"],
    "recompute": ["activations=recompute"],
    "sgd": ["optim=sgd", "optim.lr=0.1"],
}
"""What is compared with the same in one process."""
LAYOUTS = {
    "local accumulation": ["parallel.zero=3", "parallel.accumulate=local"],
    "local accumulation, stage 2": ["parallel.zero=2", "parallel.accumulate=local"],
}
"""What is compared with the plain run in one process."""


def largest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest difference of any value, as part of the largest value of its tensor."""
    assert found.keys() == wanted.keys()
    return max(((found[k] - wanted[k]).abs().max() / wanted[k].abs().max()).item() for k in wanted)


def assert_equal(found: list[Outcome], wanted: Outcome, bound: float, what: str) -> None:
    for rank, one in enumerate(found):
        where = f"{what}, rank {rank} of {len(found)}"
        assert largest(one.first_gradients, wanted.first_gradients) < bound, where
        assert largest(one.weights, wanted.weights) < bound, where
        assert largest(one.states, wanted.states) < bound, where
        assert one.norms == pytest.approx(wanted.norms, rel=bound), where
    summed = [sum(each) for each in zip(*(one.losses for one in found), strict=True)]
    assert summed == pytest.approx(wanted.losses, rel=bound), what


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    found = dict(zip(VARIANTS, train_each(list(VARIANTS.values())), strict=True))
    assert min(found["plain"].norms) > 0.2, "clipping must be at work in every step"
    return found


@pytest.mark.parametrize("count", [2, 3, pytest.param(4, marks=pytest.mark.slow)])
def test_every_stage_trains_as_one_process_does(count: int, alone: dict[str, Outcome]) -> None:
    """fp64, AdamW with clipping and accumulation, rows that do not split evenly."""
    cases = {f"plain, {stage}": [stage] for stage in STAGES[1:]}
    if count == 2:
        cases = {f"{name}, {stage}": [*VARIANTS[name], stage] for name in VARIANTS for stage in STAGES[1:]}
    cases |= LAYOUTS
    if count == 4:
        cases |= {f"replicas, {stage}": [stage, "parallel.replicas=2"] for stage in STAGES[1:]}
        cases["replicas, local"] = ["parallel.zero=3", "parallel.replicas=2", "parallel.accumulate=local"]
    ranks = on_each_rank(count, train_each, list(cases.values()))
    for index, what in enumerate(cases):
        wanted = alone.get(what.partition(",")[0], alone["plain"])
        assert_equal([rank[index] for rank in ranks], wanted, 1e-9, what)


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3, 4))])
def test_fp32_drifts_no_further_than_torchs_own_adamw_under_the_same_sharding(count: int) -> None:
    """Summing micro-batches in another order changes the last digits of a gradient, and Adam divides by its size."""
    ours, torchs = train_each([["precision=fp32"], ["precision=fp32", TORCH]])
    cases = [["precision=fp32", stage, *more] for stage in STAGES for more in ([], [TORCH])]
    ranks = on_each_rank(count, train_each, cases)
    for index, stage in enumerate(STAGES):
        sharded, reference = ranks[0][2 * index], ranks[0][2 * index + 1]
        assert largest(sharded.first_gradients, ours.first_gradients) < 1e-5, stage
        drift, usual = largest(sharded.weights, ours.weights), largest(reference.weights, torchs.weights)
        assert drift <= 1.1 * usual + 1e-6, f"{stage}: {drift}, torch's {usual}"


def test_bf16_products_under_sharding_are_those_of_autocast_but_for_norm_weights() -> None:
    """FSDP2 gathers a block's weights in bf16, its norms' included, which autocast leaves in fp32. A norm's weight is
    1 at first, so the first loss is the same; afterwards bf16's own rounding is as large."""
    (wanted,) = train_each([["precision=bf16"]])
    ranks = on_each_rank(2, train_each, [["precision=bf16", stage] for stage in STAGES])
    for index, stage in enumerate(STAGES):
        losses = [sum(each) for each in zip(*(rank[index].losses for rank in ranks), strict=True)]
        assert losses[0] == pytest.approx(wanted.losses[0], rel=1e-6), stage
        assert losses == pytest.approx(wanted.losses, rel=2e-3), stage
        assert ranks[0][index].weights["model/lm_head.weight"].dtype is torch.float32
        assert ranks[0][index].first_gradients["lm_head.weight"].dtype is torch.float32
        assert largest(ranks[0][index].first_gradients, wanted.first_gradients) < 0.02, stage


def test_one_process_has_nothing_to_shard(alone: dict[str, Outcome]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        (found,) = train_each([["parallel.zero=3"]], steps=2)
    assert found.losses == alone["plain"].losses[:2]


@pytest.mark.parametrize(
    "overrides, ranks, message",
    [
        (["parallel.zero=4"], 1, r"parallel\.zero=4: must be 0, 1, 2 or 3"),
        (["parallel.zero=0", "parallel.replicas=2"], 1, r"parallel\.replicas=2: has no effect with parallel\.zero=0"),
        (["parallel.zero=1", "parallel.accumulate=sharded"], 1, r"accumulate=sharded.*use parallel\.zero=2 or 3"),
        (["parallel.zero=3", "parallel.replicas=3"], 4, r"replicas=3: does not split 4 ranks.*replicas=1 or 2"),
        (["parallel.zero=3", "parallel.replicas=4"], 4, r"replicas=4: does not split 4 ranks.*replicas=1 or 2"),
        (["parallel.zero=3", "parallel.replicas=2"], 1, r"replicas=2.*torchrun to start several"),
    ],
    ids=str,
)
def test_what_would_have_no_effect_is_refused(
    overrides: list[str], ranks: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError, match=message):
        load([*BASE, *overrides])


def test_a_run_says_what_is_cut_over_which_ranks() -> None:
    assert spread_text(World(), ParallelConfig()) is None
    assert "nobody to share with" in str(spread_text(World(), ParallelConfig(zero=3)))
    text = str(spread_text(World(process_count=4), ParallelConfig(zero=3, replicas=2)))
    assert "weights cut in rows over 2 ranks, 2 times (FSDP2)" in text
