"""Held-out loss by position: the buckets, their losses by every kind of loss, and what a run writes of them."""

import json
import math
from pathlib import Path

import pytest
import torch
from matplotlib.image import imread

from parallel.launch import World
from tests.trainer.tiny import LENGTH, VOCABULARY, step_batch, trainable
from trainer.by_position import Buckets, buckets_of
from trainer.cli.compose import load
from trainer.data.batch import Batch
from trainer.display.position_plot import plot_by_position
from trainer.errors import UserError
from trainer.evaluate import evaluate, evaluate_run
from trainer.metrics import read_metrics
from trainer.run import run


@pytest.mark.parametrize(
    ("first", "length", "names"),
    [
        (512, 16384, ["0-511", "512-1023", "1024-2047", "2048-4095", "4096-8191", "8192-16383"]),
        (4, 10, ["0-3", "4-7", "8-9"]),
        (4, 8, ["0-3", "4-7"]),
        (1, 3, ["0-0", "1-1", "2-2"]),
    ],
)
def test_buckets_double_up_to_the_end_of_a_row(first: int, length: int, names: list[str]) -> None:
    buckets = Buckets(first, length)
    assert (buckets.names, len(buckets)) == (names, len(names))
    positions = torch.arange(length)[None]
    found = buckets.groups(Batch(positions, positions, positions)).of[0].tolist()
    spans = [range(*(int(end) for end in name.split("-"))) for name in names]
    assert found == [group for group, span in enumerate(spans) for _ in range(len(span) + 1)]


def packed(rows: Batch) -> Batch:
    positions = torch.cat([torch.arange(5), torch.arange(LENGTH - 5)]).expand(len(rows), -1).contiguous()
    return Batch(rows.input_ids, rows.labels, positions)


@pytest.mark.parametrize("kind", ["chunked", "plain", "torch"])
def test_losses_by_position_are_those_of_the_targets_there(kind: str) -> None:
    built = trainable(World(), [f"loss={kind}", "precision=fp64"])
    batches = [packed(micro) for micro in step_batch(World(), 3, 12, step=0).micros]
    found = evaluate(built.model, built.loss, batches, World(), built.cfg.precision, buckets=Buckets(4, LENGTH))
    losses: dict[str, list[float]] = {"0-3": [], "4-7": [], "8-15": []}
    built.model.eval()
    for batch in batches:
        with torch.no_grad():
            logits = built.model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False).logits
        flat = torch.nn.functional.cross_entropy(logits.view(-1, VOCABULARY), batch.labels.view(-1), reduction="none")
        for loss, label, at in zip(flat, batch.labels.view(-1), batch.position_ids.view(-1), strict=True):
            if label != -100:
                losses["0-3" if at < 4 else "4-7" if at < 8 else "8-15"].append(float(loss))
    for name, each in losses.items():
        assert found.by_position[name]["loss"] == pytest.approx(sum(each) / len(each), rel=1e-9)
        assert found.by_position[name]["perplexity"] == pytest.approx(math.exp(sum(each) / len(each)), rel=1e-9)
        assert found.by_position[name]["targets"] == len(each)
    together = [loss for each in losses.values() for loss in each]
    assert found.loss == pytest.approx(sum(together) / len(together), rel=1e-9)
    whole = evaluate(built.model, built.loss, batches, World(), built.cfg.precision)
    assert (whole.by_position, whole.loss) == ({}, pytest.approx(found.loss, rel=1e-12))


def test_a_bucket_without_targets_is_left_out() -> None:
    built = trainable(World(), [])
    batches = [packed(micro) for micro in step_batch(World(), 3, 12, step=0).micros]
    for batch in batches:
        batch.labels[batch.position_ids >= 8] = -100
    found = evaluate(built.model, built.loss, batches, World(), built.cfg.precision, buckets=Buckets(4, LENGTH))
    assert list(found.by_position) == ["0-3", "4-7"]


def test_one_bucket_is_refused_and_none_is_the_default() -> None:
    assert buckets_of(load([]).train.eval_by_position, 256) is None
    with pytest.raises(UserError, match=r"into one bucket; use train\.eval_by_position=16"):
        load(["train.eval_by_position=256"])


def test_a_run_writes_and_draws_the_first_and_the_last_and_eval_extends_the_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i} " + "learn this " * 9}) + "\n" for i in range(40)))
    folder = tmp_path / "run"
    overrides = [
        "data=jsonl", f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", "data.sequence_length=32",
        "data.eval_fraction=0.2", "model.hidden_size=32", "model.intermediate_size=48", "model.layers=1",
        "model.heads=2", "model.max_length=32", "optim=adamw", "train.steps=2", "train.global_batch=4",
        "train.micro_batch=4", "train.eval_by_position=8", "run.device=cpu", f"run.dir={folder}",
    ]  # fmt: skip
    summary = run(load(overrides)).summary
    records = [record for record in read_metrics(folder / "metrics.jsonl") if "eval_by_position" in record]
    assert [record["step"] for record in records] == [0, 2]
    assert list(records[0]["eval_by_position"]) == ["0-7", "8-15", "16-31"]
    assert records[0]["eval_by_position"] == summary["eval_by_position_first"]
    assert records[1]["eval_by_position"] == summary["eval_by_position"]
    assert imread(folder / "plots" / "loss_by_position.png").shape[:2] == (900, 1600)
    said = capsys.readouterr().out
    assert "by position" in said and "loss_by_position.png" in said

    assert evaluate_run(folder, [], None).by_position == summary["eval_by_position"]
    assert "by position" in capsys.readouterr().out
    longer = ["data.sequence_length=64", "model.rope.type=yarn", "model.rope.factor=2"]
    found = evaluate_run(folder, longer, None, as_json=True)
    printed = json.loads(capsys.readouterr().out)
    assert list(printed["eval_by_position"]) == ["0-7", "8-15", "16-31", "32-63"]
    assert printed["eval_loss"] == found.loss
    with pytest.raises(UserError, match="at most 32 tokens"):
        evaluate_run(folder, longer[:1], None)


def test_nothing_is_drawn_of_nothing(tmp_path: Path) -> None:
    plot_by_position([{"step": 0, "eval_loss": 3.0}], tmp_path / "plot.png")
    assert not (tmp_path / "plot.png").exists()
