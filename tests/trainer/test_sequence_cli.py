"""`parallel.sequence` from the command line: mistakes told at once; a run, its evaluation and its resumption."""

import json
from contextlib import redirect_stdout
from pathlib import Path

import pytest

from tests.ranks import on_ranks
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.evaluate import evaluate_run
from trainer.metrics import read_metrics
from trainer.run import run


@pytest.mark.parametrize(
    ("ranks", "overrides", "said"),
    [
        (1, ["parallel.sequence=ring"], "one process has nobody to share a row with"),
        (4, ["parallel.sequence=ring", "parallel.sequence_degree=3"], "use parallel.sequence_degree=2 or 4"),
        (4, ["parallel.sequence_degree=2"], "has no effect with parallel.sequence=none"),
        (4, ["parallel.sequence=ring", "parallel.sequence_degree=1"], "splits nothing; use 2 or more"),
        (4, ["parallel.sequence=ring", "parallel.ulysses_degree=2"], "or use parallel.sequence=usp"),
        (4, ["parallel.sequence=lightseq", "parallel.ulysses_degree=2"], "or use parallel.sequence=usp"),
        (4, ["parallel.sequence=usp", "parallel.ulysses_degree=3"], "does not divide the 4 ranks"),
        (8, ["parallel.sequence=usp", "parallel.sequence_degree=4", "parallel.ulysses_degree=3"], "must divide"),
        (4, ["parallel.sequence=ring", "parallel.sequence_degree=2", "train.global_batch=9"], "x 2 ranks"),
        (2, ["parallel.sequence=lasp2"], "model=llama_tiny has none; use parallel.sequence=ring"),
        (1, ["parallel.sequence=lasp2", "model.linear=basic"], "one process has nobody to share a row with"),
        (4, ["parallel.sequence=ring", "data.sequence_length=7"], "use data.sequence_length=8 or more"),
        (4, ["parallel.sequence=ulysses", "data.sequence_length=3"], "use data.sequence_length=4 or more"),
    ],
)
def test_a_degree_that_does_not_fit_is_told_with_one_that_does(
    ranks: int, overrides: list[str], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    with pytest.raises(UserError) as refusal:
        load(overrides)
    assert said in str(refusal.value)


def overrides(folder: Path, *more: str) -> list[str]:
    return [
        "data=jsonl", f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder / 'cache'}",
        "data.sequence_length=33", "data.eval_fraction=0.2", "data.packing=concat", "model.hidden_size=32",
        "model.intermediate_size=48", "model.layers=1", "model.heads=2", "optim=adamw", "precision=fp64",
        "train.steps=4", "train.global_batch=4", "train.micro_batch=4", "train.log_every=1", "train.eval_every=0",
        "train.eval_by_position=8", "run.device=cpu", "checkpoint.every=2", *more,
    ]  # fmt: skip


def train(asked: list[str], said: Path) -> None:
    """Ranks fork from a server that keeps the output of whoever started it: what they print is led to `said`."""
    with said.open("a") as file, redirect_stdout(file):
        run(load(asked))


def loss_of(folder: Path) -> float:
    return evaluate_run(folder, [], None).loss


@pytest.fixture
def split(tmp_path: Path) -> Path:
    """A run of two ranks, stopped after two of four steps."""
    texts = ({"text": f"row {i} " + "learn this " * (1 + i % 4)} for i in range(60))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps(each) + "\n" for each in texts))
    folder = tmp_path / "split"
    asked = overrides(tmp_path, f"run.dir={folder}", "parallel.sequence=ring", "train.steps=2", "schedule=constant")
    on_ranks(2, train, asked, tmp_path / "said")
    return folder


def test_a_run_says_what_it_costs_and_is_evaluated_by_one_process(split: Path) -> None:
    said = " ".join((split.parent / "said").read_text().split())
    assert "2 ranks share each row, 17 of 33 tokens here; a layer sends" in said
    last, alone = read_metrics(split / "metrics.jsonl")[-1], evaluate_run(split, [], None)
    assert alone.loss == pytest.approx(last["eval_loss"], rel=1e-9)
    assert list(alone.by_position) == ["0-7", "8-15", "16-31", "32-32"]
    for name, figures in alone.by_position.items():
        assert figures == pytest.approx(last["eval_by_position"][name], rel=1e-9)


@pytest.mark.slow
def test_two_ranks_evaluate_and_one_goes_on_as_if_never_split(split: Path, tmp_path: Path) -> None:
    assert on_ranks(2, loss_of, split) == pytest.approx([loss_of(split)] * 2, rel=1e-9)
    for name in ("split", "alone"):
        run(load(overrides(tmp_path, f"run.dir={tmp_path / name}", "schedule=constant")))
    ends = [read_metrics(tmp_path / name / "metrics.jsonl")[-1] for name in ("split", "alone")]
    assert ends[0]["step"] == ends[1]["step"] == 4
    assert ends[0]["eval_loss"] == pytest.approx(ends[1]["eval_loss"], rel=1e-9)
