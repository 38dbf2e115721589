"""Bytes of a rank under every stage of ZeRO: as the formulas say, and as a plan predicts."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from parallel.launch import connected
from tests.parallel.sharded import BASE, make, on_each_rank, step_batch
from trainer.cli.compose import load
from trainer.plan import planned_config, predict
from trainer.step import train_step
from trainer.summary import adamw_share

STAGES = range(4)
OPTIONS = [
    *BASE, "precision=fp32", "model.hidden_size=64", "model.intermediate_size=128", "model.layers=4",
    "model.vocab_size=260", "data.packing=document",
]  # fmt: skip
GALORE = ["optim=galore", "optim.rank=8"]


def counted() -> list[tuple[dict[str, int], dict[str, int], int, int]]:
    """Of each stage: bytes by kind between steps and at the peak of the update, the peak of a steady step, and what a
    run of GaLore says plain AdamW's states would take."""
    found = []
    with connected(load(BASE).parallel, "cpu", 1) as world:
        for zero in STAGES:
            built = make([*OPTIONS, f"parallel.zero={zero}"], world)
            for step in range(2):
                with built.meter.count_step() as timeline:
                    train_step(built, step_batch(built.cfg, world, step), step, 0)
            galore: Any = SimpleNamespace(built=make([*OPTIONS, *GALORE, f"parallel.zero={zero}"], world))
            update = timeline.peak_by_phase["clip"].by_kind
            found.append((built.meter.held(), update, timeline.peak.total, adamw_share(galore)))
    return found


def test_bytes_of_a_rank_are_those_of_zeros_formulas_and_of_the_plan() -> None:
    """fp32 AdamW over N = 2 ranks: weights 4, gradients 4, states 8 bytes a parameter, whole or halved."""
    ranks = on_each_rank(2, counted)
    for zero in STAGES:
        cfg = load([*OPTIONS, f"parallel.zero={zero}"])
        plan = predict(cfg, planned_config(cfg), ranks=2, device=torch.device("cpu"))
        whole = 4 * plan.parameters
        for held, update, peak, share in (rank[zero] for rank in ranks):
            assert held["states"] == pytest.approx(2 * whole / (1 if zero == 0 else 2), rel=0.01), zero
            assert share == held["states"], f"zero={zero}: the final table's AdamW holds what AdamW does"
            assert held["weights"] == pytest.approx(whole / (1 if zero < 2 else 2), rel=0.01), zero
            assert update["gradients"] == pytest.approx(whole / (1 if zero < 2 else 2), rel=0.01), zero
            assert update["workspace"] < 0.02 * whole, f"zero={zero}: clipping holds nothing of the model's size"
            assert peak == pytest.approx(plan.steps["steady"].peak.total, rel=0.01), zero
