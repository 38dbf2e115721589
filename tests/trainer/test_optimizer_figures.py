"""What a run writes about its optimizer: how well subspaces fit, and what a low-bit codec left in full precision."""

from pathlib import Path

import pytest

from trainer.cli.compose import load
from trainer.metrics import read_metrics
from trainer.run import run

SMALL = [
    "model.layers=1", "model.hidden_size=64", "model.heads=2", "model.intermediate_size=96", "train.global_batch=2",
    "train.micro_batch=2", "data.sequence_length=32", "data.eval_rows=2", "train.eval_every=0", "checkpoint=last",
    "train.log_every=1",
]  # fmt: skip


def test_metrics_hold_energy_and_overlap_of_each_refresh_and_the_report_the_last(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(load([*SMALL, "optim=galore", "optim.update_proj_gap=2", "train.steps=5", f"run.dir={tmp_path}"]))
    told = {r["step"]: r["subspace"] for r in read_metrics(tmp_path / "metrics.jsonl") if "subspace" in r}
    assert list(told) == [1, 3, 5]  # with the refreshes, not in between
    assert [fit["refreshes"] for fit in told.values()] == [7, 14, 21]
    assert "overlap" not in told[1] and 0 < told[3]["overlap"]["min"] <= told[3]["overlap"]["median"] <= 1.0001
    assert all(0 < fit["captured"]["min"] <= fit["captured"]["median"] <= 1.0001 for fit in told.values())
    assert result.summary["subspace"] == told[5]
    captured = 100 * told[5]["captured"]["median"]
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("subspaces"))
    assert line.split()[1] == f"{captured:.0f}%" and "of the basis before" in line


def test_parameters_left_in_full_precision_are_told_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(load([*SMALL, "optim=adamw_8bit", "train.steps=2", f"run.dir={tmp_path}"]))
    told = [line for line in capsys.readouterr().out.splitlines() if "full precision" in line]
    assert told == [
        "* 3 of 12 parameters keep their states in full precision (vectors, small and odd shapes): 1.50 KiB"
    ]
