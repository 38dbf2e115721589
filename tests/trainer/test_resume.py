"""A run that was interrupted and resumed is, bit for bit, the run that was not."""

import errno
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import trainer.loop
from tests.ranks import on_ranks
from trainer.checkpoint import files
from trainer.cli.compose import load
from trainer.errors import TrainingStopped, UserError
from trainer.folder import differences, identity
from trainer.metrics import read_metrics
from trainer.run import run
from trainer.signals import Interrupted

REPO = Path(__file__).parents[2]
STEPS = 20
OPTIMIZERS = {"adamw": ["optim.lr=0.003"], "galore": ["optim.rank=8", "optim.update_proj_gap=5", "optim.lr=0.01"]}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Some documents, few enough that 20 steps cross epochs."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    with path.open("w") as file:
        for index in range(60):
            file.write(
                json.dumps({"text": f"document {index} says " + "abc xyz "[: index % 8] * (index % 7 + 3)}) + "\n"
            )
    return path


def overrides(text: Path, folder: Path, optimizer: str, *more: str) -> list[str]:
    return [
        "data=jsonl",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "data.sequence_length=32",
        "data.eval_fraction=0.2",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.layers=2",
        "model.heads=4",
        "model.dropout=0.1",
        f"optim={optimizer}",
        *OPTIMIZERS[optimizer],
        f"train.steps={STEPS}",
        "train.global_batch=12",
        "train.micro_batch=2",
        "train.log_every=1",
        "train.eval_every=10",
        "checkpoint.every=0",
        "checkpoint.keep=0",
        f"run.dir={folder}",
        "run.device=cpu",
        "run.threads=1",
        *more,
    ]


def stopping_at(step: int, number: int = signal.SIGTERM) -> Callable[..., Any]:
    """A train_step that receives a signal while it computes step `step`."""
    genuine = trainer.loop.train_step

    def train_step(built: Any, batch: Any, index: int, stop: int) -> Any:
        stepped = genuine(built, batch, index, stop)
        if index + 1 == step:
            os.kill(os.getpid(), number)
        return stepped

    return train_step


def losses(folder: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every logged step."""
    return [(r["step"], r["loss"], r["grad_norm"]) for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def final_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of the last checkpoint: weights, states, generators."""
    from trainer.checkpoint.store import CheckpointStore

    checkpoint = CheckpointStore(folder / "checkpoints", keep=0, verify=True).newest()
    assert checkpoint is not None and checkpoint.step == STEPS
    tensors = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in checkpoint.names().items()}
    checkpoint.load(tensors)
    return tensors | {"meta": torch.tensor([checkpoint.meta["tokens"], checkpoint.meta["data"]["position"]])}


@pytest.mark.usefixtures("without_figures")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_at_7_and_13_equals_uninterrupted(
    text: Path, tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(load(overrides(text, tmp_path / "whole", optimizer)))
    for stop in (7, 13):
        with monkeypatch.context() as patch:
            patch.setattr(trainer.loop, "train_step", stopping_at(stop))
            with pytest.raises(Interrupted) as ended:
                run(load(overrides(text, tmp_path / "parts", optimizer)))
        # the signal arrives during step `stop` and is agreed on within the next one
        assert ended.value.exit_code == 143 and f"step {stop + 1} of {STEPS}" in str(ended.value)
    run(load(overrides(text, tmp_path / "parts", optimizer)))
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    whole, parts = final_tensors(tmp_path / "whole"), final_tensors(tmp_path / "parts")
    assert whole.keys() == parts.keys()
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []


@pytest.mark.usefixtures("without_figures")
def test_a_lost_generator_state_would_be_noticed(text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with dropout on, resuming without the generators gives other losses."""
    import trainer.state

    run(load(overrides(text, tmp_path / "whole", "adamw")))
    monkeypatch.setattr(trainer.state, "set_random", lambda *_: None)
    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop, "train_step", stopping_at(7))
        with pytest.raises(Interrupted):
            run(load(overrides(text, tmp_path / "parts", "adamw")))
    run(load(overrides(text, tmp_path / "parts", "adamw")))
    assert losses(tmp_path / "parts") != losses(tmp_path / "whole")


def resumed(asked: list[str], stop: int | None) -> None:
    """On every rank: train, up to an interruption at `stop` where one is given."""
    if stop is None:
        run(load(asked))
        return
    if os.environ.get("RANK") == "1":  # one rank alone gets the signal; all stop
        trainer.loop.train_step = stopping_at(stop)
    with pytest.raises(Interrupted):
        run(load(asked))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_saved_on_2_ranks_goes_on_on_1_and_3(text: Path, tmp_path: Path, optimizer: str) -> None:
    """Same samples in the same order, losses within fp32 rounding (dropout is drawn per rank: off here)."""
    asked = [a for a in overrides(text, tmp_path / "two", optimizer) if "dropout" not in a]
    on_ranks(2, resumed, asked, 7)
    for ranks in (1, 3):
        subprocess.run(["cp", "-r", str(tmp_path / "two"), str(tmp_path / f"then{ranks}")], check=True)
    alone = [a.replace("/two", "/alone") for a in asked]
    run(load(alone))
    run(load([a.replace("/two", "/then1") for a in asked]))
    on_ranks(3, resumed, [a.replace("/two", "/then3") for a in asked], None)
    expected = losses(tmp_path / "alone")
    for ranks in (1, 3):
        found = losses(tmp_path / f"then{ranks}")
        assert [step for step, *_ in found] == list(range(1, STEPS + 1))
        assert [loss for _, loss, _ in found] == pytest.approx([loss for _, loss, _ in expected], rel=1e-5)
        position = final_tensors(tmp_path / f"then{ranks}")["meta"]
        assert torch.equal(position, final_tensors(tmp_path / "alone")["meta"])


def test_resuming_with_other_options_is_refused_with_their_names(text: Path, tmp_path: Path) -> None:
    run(load(overrides(text, tmp_path / "run", "adamw", "train.steps=2")))
    for change, named in [("seed=1", "seed: saved 0, asked 1"), ("model.layers=1", "model.layers: saved 2, asked 1")]:
        with pytest.raises(UserError, match=named):
            run(load(overrides(text, tmp_path / "run", "adamw", change)))
    with pytest.raises(UserError, match="optim.name: saved adamw, asked galore"):
        run(load(overrides(text, tmp_path / "run", "galore")))


def test_options_newer_than_a_checkpoint_had_their_defaults_when_it_was_saved() -> None:
    now = identity(load([]))["state"]
    before = {key: value for key, value in now.items() if key != "model.softmax_every"}
    assert differences(before, now) == []
    assert differences(before, now | {"model.softmax_every": 2}) == ["model.softmax_every: saved None, asked 2"]


def test_changed_text_under_the_same_name_is_refused(text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(text.read_bytes())
    run(load(overrides(copy, tmp_path / "run", "adamw", "train.steps=2")))
    copy.write_bytes(text.read_bytes() + b'{"text": "one more document"}\n')
    with pytest.raises(UserError, match="has changed since"):
        run(load(overrides(copy, tmp_path / "run", "adamw")))


def poisoned(steps: set[int]) -> Callable[..., Any]:
    """A gradient_norm that finds a NaN in some steps (counted from 0), in the gradients themselves."""
    from trainer.engines.torch_engine import TorchEngine

    genuine, calls = TorchEngine.gradient_norm, iter(range(10**6))

    def gradient_norm(engine: TorchEngine) -> torch.Tensor:
        if next(calls) in steps:
            grad = engine.spread.gradients()[3]
            grad.view(-1)[0] = float("nan")
        return genuine(engine)

    return gradient_norm


def test_a_non_finite_step_changes_nothing_and_is_counted(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.engines.torch_engine import TorchEngine

    monkeypatch.setattr(TorchEngine, "gradient_norm", poisoned({2}))
    updates = []
    genuine = TorchEngine.update
    monkeypatch.setattr(TorchEngine, "update", lambda engine, m: (updates.append(m), genuine(engine, m)))
    monkeypatch.setattr("trainer.summary.prediction", lambda run, warn: {})  # which takes steps too, on fake tensors
    result = run(load(overrides(text, tmp_path / "run", "galore", "train.steps=6")))
    assert result.summary["skipped"] == 1 and len(updates) == 5
    assert all(bool(torch.isfinite(t).all()) for n, t in latest_weights(tmp_path / "run").items())


def latest_weights(folder: Path) -> dict[str, torch.Tensor]:
    from trainer.checkpoint.store import CheckpointStore

    checkpoint = CheckpointStore(folder / "checkpoints", keep=0, verify=True).newest()
    assert checkpoint is not None
    names = {n: i for n, i in checkpoint.names().items() if n.startswith("model/")}
    tensors = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in names.items()}
    checkpoint.load(tensors, leave=("*",))
    return tensors


def test_too_many_non_finite_steps_stop_with_exit_3_and_keep_the_last_good_checkpoint(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from trainer.engines.torch_engine import TorchEngine

    monkeypatch.setattr(TorchEngine, "gradient_norm", poisoned(set(range(8, 20))))
    asked = overrides(text, tmp_path / "run", "adamw", "train.max_skipped=3", "checkpoint.every=4")
    with pytest.raises(TrainingStopped, match="last good checkpoint is step 8") as ended:
        run(load(asked))
    assert ended.value.exit_code == 3
    weights = latest_weights(tmp_path / "run")
    assert all(bool(torch.isfinite(t).all()) for t in weights.values())


@pytest.mark.parametrize(
    "number, signals",
    [
        (signal.SIGTERM, 1),
        (signal.SIGINT, 2),
        pytest.param(signal.SIGINT, 1, marks=pytest.mark.slow),
        pytest.param(signal.SIGTERM, 2, marks=pytest.mark.slow),
    ],
)
def test_the_process_itself_exits_128_plus_signal_and_a_second_signal_ends_it_at_once(
    text: Path, tmp_path: Path, number: int, signals: int
) -> None:
    asked = overrides(text, tmp_path / "run", "adamw", "train.steps=100000")
    process = subprocess.Popen(
        [sys.executable, "-m", "trainer", *asked],
        cwd=REPO,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:  # until it trains
        if line.strip()[:1].isdigit() and " " in line and not line.strip().startswith("0/"):
            break
    if signals == 2:
        process.send_signal(signal.SIGSTOP)  # the first waits, the second follows later: no step in between
        process.send_signal(number)
        process.send_signal(signal.SIGCONT)
        time.sleep(1.3)
    process.send_signal(number)
    output, errors = process.communicate(timeout=240)
    if signals == 1:
        assert process.returncode == 128 + number, errors
        assert "go on with: stowage train" in output and "all saved" in errors
    else:
        assert process.returncode in (-number, 128 + number)


def full_disk_at(steps: set[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the disk full for the checkpoints of some steps."""
    genuine = files.sync_folder

    def sync_folder(path: Path) -> None:
        if any(f"step_{step:08d}.tmp" in str(path) for step in steps):
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        genuine(path)

    monkeypatch.setattr(files, "sync_folder", sync_folder)


def test_a_full_disk_costs_one_checkpoint_and_no_training(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    full_disk_at({4}, monkeypatch)
    run(load(overrides(text, tmp_path / "run", "adamw", "train.steps=6", "checkpoint.every=2")))
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").glob("step_*")) == [
        "step_00000002",
        "step_00000006",
    ]
    assert "training goes on without a checkpoint of step 4" in capsys.readouterr().out


def test_a_full_disk_at_the_end_stops_with_exit_3_and_says_what_is_saved(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full_disk_at({6}, monkeypatch)
    with pytest.raises(TrainingStopped, match="step 6 could not be saved, step 4 is the newest saved") as ended:
        run(load(overrides(text, tmp_path / "run", "adamw", "train.steps=6", "checkpoint.every=2")))
    assert ended.value.exit_code == 3


def test_a_folder_with_nothing_but_damaged_checkpoints_is_not_begun_anew(text: Path, tmp_path: Path) -> None:
    asked = overrides(text, tmp_path / "run", "adamw", "train.steps=2")
    run(load(asked))
    manifest = tmp_path / "run" / "checkpoints" / "step_00000002" / "manifest.json"
    manifest.write_bytes(manifest.read_bytes()[:-20])
    for _ in range(2):  # also once the damaged one has been set aside
        with pytest.raises(UserError, match="step_00000002.*none can be used"):
            run(load(asked))


def test_a_finished_run_started_again_says_so_and_keeps_its_figures(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = overrides(text, tmp_path / "run", "adamw", "train.steps=3")
    first = run(load(asked)).summary
    again = run(load(asked)).summary
    assert "all 3 steps are done already" in capsys.readouterr().out
    assert (again["eval_loss"], again["tokens"]) == (first["eval_loss"], first["tokens"])
