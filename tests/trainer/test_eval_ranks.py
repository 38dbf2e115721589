"""`stowage eval` on several ranks: they share the text, and with parallel.zero=3 the weights, of which none has all."""

import json
from pathlib import Path

import pytest

from tests.parallel.sharded import most_held
from tests.ranks import on_ranks
from trainer.cli import main as cli
from trainer.cli.compose import load
from trainer.evaluate import Evaluation, evaluate_run
from trainer.run import run

METHODS = {"fp32": ["optim=adamw", "precision=fp32"], "int8": ["optim=adamw", "precision=int8_sr"]}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Of one process each, two steps long. Five held-out rows do not split evenly over two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    texts = ({"text": f"row {i} " + "learn this " * (1 + i % 4)} for i in range(60))
    (folder / "text.jsonl").write_text("".join(json.dumps(each) + "\n" for each in texts))
    with pytest.MonkeyPatch.context() as patch:  # as `without_figures`
        patch.setattr("trainer.summary.prediction", lambda run, warn: {})
        patch.setattr("trainer.summary.draw", lambda run, folder, warn, predicted=None: None)
        for name, method in METHODS.items():
            train(folder, name, method)
    return {name: folder / name for name in METHODS}


def train(folder: Path, name: str, method: list[str]) -> None:
    overrides = [
        "data=jsonl", f"data.path={folder / 'text.jsonl'}", f"data.cache_dir={folder / 'cache'}", "data.eval_rows=5",
        "data.sequence_length=16", "data.eval_fraction=0.2", "model.hidden_size=32", "model.intermediate_size=80",
        "model.layers=16", "model.heads=2", "train.steps=2", "train.global_batch=2", "train.micro_batch=1",
        "train.eval_every=0", "run.device=cpu", f"run.dir={folder / name}", *method,
    ]  # fmt: skip
    run(load(overrides))


def evaluated(folder: Path, overrides: list[str]) -> tuple[Evaluation, int]:
    """What was found, and the most bytes that this rank held at once."""
    found: list[Evaluation] = []
    most = most_held(lambda: found.append(evaluate_run(folder, overrides, None)))
    return found[0], most


@pytest.mark.parametrize("method", ["fp32", pytest.param("int8", marks=pytest.mark.slow)])
def test_ranks_that_share_weights_find_what_one_process_finds(method: str, runs: dict[str, Path]) -> None:
    alone, whole = evaluated(runs[method], [])
    for one, most in on_ranks(2, evaluated, runs[method], ["parallel.zero=3"]):
        assert one.targets == alone.targets and one.loss == pytest.approx(alone.loss, rel=1e-6)
        assert most < 0.75 * whole, f"{most} bytes at once, one process held {whole}"


def test_one_process_is_told_that_it_shares_weights_with_nobody(
    runs: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["eval", str(runs["fp32"]), "parallel.zero=3"]) == 2
    assert "nobody to share weights with" in capsys.readouterr().err
