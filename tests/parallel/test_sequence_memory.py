"""A rank that shares rows keeps its share of the activations. Counted on the fake tensors of `stowage plan`."""

import pytest
import torch

from trainer.cli.plan import load
from trainer.plan import Plan, planned_config, predict
from trainer.plan_report import headline

CPU = torch.device("cpu")
LENGTH = 1024
MODEL = [
    "model.hidden_size=64", "model.intermediate_size=136", "model.layers=4", "model.heads=8", "model.kv_heads=4",
    f"model.max_length={LENGTH}", f"data.sequence_length={LENGTH}",
    "train.global_batch=1", "train.micro_batch=1", "run.device=cpu", "optim=sgd",
]  # fmt: skip


def plan(ranks: int, *overrides: str) -> Plan:
    cfg = load([*MODEL, *overrides], ranks)
    return predict(cfg, planned_config(cfg), ranks=ranks, device=CPU)


def kept(found: Plan) -> int:
    """Most bytes of activations in a steady step."""
    timeline = found.steps["steady"]
    return max(timeline.at(i)["activations"] for i in range(len(timeline)))


@pytest.mark.parametrize(
    "kind, model",
    [
        ("ulysses", "model.linear=none"),
        ("ring", "model.linear=none"),
        ("lightseq", "model.linear=none"),
        ("lasp2", "model.linear=gated"),
    ],
)
def test_activations_of_a_rank_are_its_share(kind: str, model: str) -> None:
    """Whole rows keep a mask between documents besides, which split ones do without; states are a few per cent."""
    alone = kept(plan(1, "activations.lean=true", model))
    two, four = (kept(plan(ranks, "activations.lean=true", f"parallel.sequence={kind}", model)) for ranks in (2, 4))
    assert two < alone / (1.9 if kind == "lasp2" else 2)
    assert abs(4 * four / (2 * two) - 1) < 0.1


def test_selective_recomputation_keeps_nothing_of_what_is_within_linear_attention() -> None:
    """With every second product of blocks of tokens it would be 0.72 of all."""
    whole, selected = (kept(plan(1, "model.linear=basic", f"activations={fate}")) for fate in ("keep", "selective"))
    assert selected < whole / 2


def test_what_attention_leaves_is_predicted_where_recomputed_blocks_hold_it() -> None:
    """Of each block but the last, whose backward is when there is most: an output of 64 values and 8 sums a token."""
    asked = "activations=recompute", "parallel.sequence=lightseq"
    held, ran_again = kept(plan(4, *asked)), kept(plan(4, *asked, "activations.attention=recompute"))
    assert held - ran_again == 3 * (64 + 8) * 4 * LENGTH // 4


def test_a_plan_says_how_many_ranks_share_rows() -> None:
    cfg = load([*MODEL, "parallel.sequence=lightseq", "parallel.sequence_degree=2", "train.global_batch=4"], 4)
    said = headline(cfg, Plan(parameters=1, ranks=4, device="cpu", steps={})).plain
    assert "a step of each 2 ranks that share rows: 2 micro-steps of 1 sequence of 1024" in said


def test_a_step_is_predicted_with_what_is_sharded_and_recomputed() -> None:
    whole = plan(4, "activations=recompute", "parallel.zero=3", "train.global_batch=4").peak
    split = plan(4, "activations=recompute", "parallel.zero=3", "parallel.sequence=usp").peak
    assert split.by_kind["weights"] == whole.by_kind["weights"]
    assert split.by_kind["activations"] < whole.by_kind["activations"] / 3
