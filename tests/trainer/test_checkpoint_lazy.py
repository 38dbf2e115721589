"""Checkpoints beside training: the same bytes in every mode, waited for in time, and told of where they fail."""

import errno
import json
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import trainer.loop
from offload.snapshot import Snapshots
from parallel.launch import World
from tests.trainer import tiny
from trainer.checkpoint import CheckpointStore, files
from trainer.cli.compose import load
from trainer.errors import TrainingStopped, UserError
from trainer.gate import Gate
from trainer.metrics import read_metrics
from trainer.run import run
from trainer.saver import Saver
from trainer.schema import CheckpointConfig, OnFailure, SaveMode
from trainer.signals import Interrupted
from trainer.state import run_tensors, still

SLOW = 0.005
"""Seconds every copy is held back; a forward and backward of the tiny model are far shorter than all of them."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    rows = ({"text": f"document {i} says " + "abc xyz "[: i % 8] * (i % 7 + 3)} for i in range(60))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(autouse=True, scope="module")
def slow_copies() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Snapshots.__init__, "__kwdefaults__", {"delay": SLOW})
        patch.setattr(files.os, "fsync", lambda fd: None)
        yield


def overrides(text: Path, folder: Path, *more: str) -> list[str]:
    return [
        "data=jsonl", f"data.path={text}", f"data.cache_dir={text.parent / 'cache'}", "data.sequence_length=32",
        "data.eval_fraction=0.2", "model.hidden_size=32", "model.intermediate_size=48", "model.layers=2",
        "model.heads=4", "model.dropout=0.1", "train.steps=4", "train.global_batch=4", "train.micro_batch=2",
        "train.log_every=1", "train.eval_every=0", "checkpoint.every=1", "checkpoint.keep=0", f"run.dir={folder}",
        "run.device=cpu", "run.threads=1", *more,
    ]  # fmt: skip


METHODS = {
    "adamw": ["optim=adamw"],
    "in_backward": ["optim=apollo", "optim.rank=8", "optim.in_backward=true", "train.clip_by=parameter"],
    "int8": ["precision=int8_sr", "optim=qgalore", "optim.rank=8", "optim.update_proj_gap=2"],
    "low_bit": ["optim=adamw_8bit", "model.hidden_size=64", "model.intermediate_size=136"],
}


def content(folder: Path) -> dict[str, tuple[dict[str, str], dict[str, Any]]]:
    """Of each checkpoint the digests of its files, and where the run stood."""
    found = {}
    for path in sorted((folder / "checkpoints").glob("step_*")):
        manifest = json.loads((path / "manifest.json").read_text())
        meta = {key: value for key, value in manifest["meta"].items() if key not in ("seconds", "identity")}
        found[path.name] = ({file["name"]: file["sha256"] for file in manifest["files"]}, meta)
    return found


class Told:
    """A recorder that remembers."""

    def __init__(self) -> None:
        self.notices: list[str] = []
        self.warnings: list[str] = []
        self.shown: list[str] = []
        self.notice, self.warn, self.beside = self.notices.append, self.warnings.append, self.shown.append


def trained(folder: Path, mode: str, method: str, device: str = "cpu") -> dict[str, Any]:
    """Take four steps of a tiny model and save after each, without waiting for anything that need not be waited for."""
    world = World(device=torch.device(device))
    options = [*METHODS[method], "model.dropout=0.1", "train.global_batch=4", "train.micro_batch=2"]
    built = tiny.trainable(world, options)
    store, recorder = CheckpointStore(folder / "checkpoints", keep=0, verify=True), Told()
    cfg = CheckpointConfig(mode=SaveMode[mode], keep=0)
    saver = Saver(cfg, world, store, recorder, built.gate, timeout=60, saved_step=None)  # type: ignore[arg-type]
    for step in range(4):
        tiny.train(world, built, range(step, step + 1))
        saver.at_border()
        tensors = still(run_tensors(built.engine, 0, world.device), built.model)
        saver.save(step + 1, tensors, {"numbers": built.engine.numbers()}, last=False)
    saver.settle()
    return content(folder)


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.slow] if name in ("int8", "low_bit") else []) for name in METHODS],
)
def test_every_mode_writes_the_same_bytes(method: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights, states and generators of the step that was saved, though later steps run meanwhile."""
    expected = trained(tmp_path / "sync", "sync", method)
    assert len(expected) == 4 and len({str(digests) for digests, _ in expected.values()}) == 4
    assert trained(tmp_path / "async", "async", method) == expected
    assert trained(tmp_path / "lazy", "lazy", method) == expected
    monkeypatch.setattr(Gate, "open", lambda gate: None)
    assert trained(tmp_path / "unheld", "lazy", method) != expected, "a missing wait must show"


@pytest.mark.gpu
@pytest.mark.parametrize("method", ["adamw", "in_backward"])
def test_every_mode_writes_the_same_bytes_from_a_gpu(method: str, tmp_path: Path) -> None:
    torch.use_deterministic_algorithms(True)
    try:
        expected = trained(tmp_path / "sync", "sync", method, "cuda:0")
        assert trained(tmp_path / "async", "async", method, "cuda:0") == expected
        assert trained(tmp_path / "lazy", "lazy", method, "cuda:0") == expected
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.fixture(scope="module")
def runs(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An uninterrupted run, and a lazy one that was killed before the checkpoint of its last step was there."""
    return whole_and_resumed(text, tmp_path_factory.mktemp("runs"))


def whole_and_resumed(text: Path, folder: Path, *more: str) -> tuple[Path, Path]:
    whole, parts = folder / "whole", folder / "parts"
    run(load(overrides(text, whole, *more)))
    genuine = trainer.loop.train_step

    def stopping(built: Any, batch: Any, index: int, stop: int) -> Any:
        return genuine(built, batch, index, signal.SIGTERM if index == 2 else stop)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(trainer.loop, "train_step", stopping)
        run(load(overrides(text, parts, "checkpoint.mode=lazy", *more)))
    shutil.rmtree(parts / "checkpoints" / "step_00000003")  # of the signal, which is waited for in every mode
    run(load(overrides(text, parts, "checkpoint.mode=lazy", *more)))
    return whole, parts


@pytest.mark.gpu
def test_a_run_on_a_gpu_goes_on_from_a_lazy_checkpoint_as_if_nothing_had_happened(text: Path, tmp_path: Path) -> None:
    require_same_runs(whole_and_resumed(text, tmp_path, "run.device=cuda"))


def test_a_run_resumed_from_a_lazy_checkpoint_equals_the_uninterrupted_one(runs: tuple[Path, Path]) -> None:
    require_same_runs(runs)


def require_same_runs(runs: tuple[Path, Path]) -> None:
    whole, parts = (content(folder) for folder in runs)
    assert parts == whole and len(whole) == 4
    losses = [[r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r] for folder in runs]
    assert losses[0] == losses[1] and len(losses[0]) == 4


def test_seconds_waited_and_host_memory_are_reported_and_predicted(runs: tuple[Path, Path]) -> None:
    for folder in runs:
        records = [record for record in read_metrics(folder / "metrics.jsonl") if "loss" in record]
        waited = [record["step"] for record in records if "checkpoint_wait_seconds" in record]
        assert waited[0] == 2 and 4 in waited, "a wait is told with the step after it"
        assert json.loads((folder / "summary.json").read_text())["checkpoint_wait_seconds"] > 0
    host = json.loads((runs[1] / "memory.json").read_text())["host"]
    assert host["measured"] == host["predicted"] and host["measured"]["checkpoint"] > 10**5


@pytest.fixture
def making(tmp_path: Path) -> Iterator[Callable[..., tuple[Saver, Told, Gate]]]:
    """Makes savers in one folder, with what they tell and the gate they hold; all are at rest afterwards."""
    made = []

    def make(mode: str = "lazy", **more: Any) -> tuple[Saver, Told, Gate]:
        store = CheckpointStore(tmp_path, keep=0, verify=True)
        told, gate, cfg = Told(), Gate(), CheckpointConfig(mode=SaveMode[mode], keep=0, **more)
        recorder: Any = told
        made.append(Saver(cfg, World(), store, recorder, gate, timeout=60, saved_step=None))
        return made[-1], told, gate

    yield make
    for saver in made:
        saver.close()


def some(value: float) -> dict[str, Any]:
    return {f"model/{i}": torch.full((20,), float(value)) for i in range(4)}


def first_value(folder: Path, step: int) -> float:
    found = some(0.0)
    CheckpointStore(folder, keep=0, verify=True).open(folder / f"step_{step:08d}").load(found)
    assert len({float(x) for tensor in found.values() for x in tensor}) == 1, "a mix of two steps"
    return float(found["model/0"][0])


def test_one_save_at_a_time_and_a_second_says_that_it_waits(making: Any, tmp_path: Path) -> None:
    saver, told, gate = making()
    for step in (1, 2):
        saver.save(step, some(step), {}, last=False)
    assert told.notices[0] == "the checkpoint of step 1 is still being written; that of step 2 waits for it"
    assert told.notices[1].startswith(f"saved {tmp_path / 'step_00000001'} in ") and saver.saved_step == 1
    assert told.shown == ["saving step 1 (lazy)", "", "saving step 2 (lazy)"]
    saver.save(3, some(3), {}, last=True)
    assert saver.saved_step == 3 and [first_value(tmp_path, step) for step in (1, 2, 3)] == [1, 2, 3]


@pytest.mark.parametrize("mode", ["async", "lazy"])
def test_what_is_saved_is_what_was_there_when_it_was_asked_for(mode: str, making: Any, tmp_path: Path) -> None:
    saver, told, gate = making(mode)
    tensors, meta = some(1), {"data": {"position": 7}}
    values = list(tensors.values())
    saver.save(1, tensors, meta, last=False)
    meta["data"]["position"] = 8
    gate.open()
    for value in values:
        value.fill_(2.0)
    saver.settle()
    assert first_value(tmp_path, 1) == 1
    assert CheckpointStore(tmp_path, keep=0, verify=True).newest().meta == {"data": {"position": 7}}  # type: ignore[union-attr]


def disk_full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files, "write", refuse)


def test_a_full_disk_costs_one_checkpoint_and_is_told_at_the_next_border(
    making: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, told, gate = making()
    saver.save(1, some(1), {}, last=False)
    saver.settle()
    with monkeypatch.context() as patch:
        disk_full(patch)
        saver.save(2, some(2), {}, last=False)
        gate.open()
        while not told.warnings:
            saver.at_border()
    assert len(told.warnings) == 1 and saver.saved_step == 1
    assert "training goes on without a checkpoint of step 2" in told.warnings[0]
    assert "No space left on device" in told.warnings[0] and "MiB are free" in told.warnings[0]
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "latest", "step_00000001"}
    saver.save(3, some(3), {}, last=False)
    saver.settle()
    assert saver.saved_step == 3 and first_value(tmp_path, 1) == 1


def test_a_full_disk_stops_the_run_where_that_is_asked_for(making: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for mode in ("sync", "lazy"):
        saver, told, gate = making(mode, on_failure=OnFailure.stop)
        with (
            monkeypatch.context() as patch,
            pytest.raises(TrainingStopped, match=r"on_failure=stop: nothing was saved"),
        ):
            disk_full(patch)
            saver.save(1, some(1), {}, last=False)
            saver.settle()


def test_an_error_that_is_no_disks_ends_the_run_at_the_next_border(
    making: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    saver, told, gate = making()
    monkeypatch.setattr(CheckpointStore, "_begin", lambda *args: 1 / 0)
    saver.save(1, some(1), {}, last=False)
    gate.open()
    with pytest.raises(ZeroDivisionError):
        saver.settle()


def test_whatever_ends_a_run_a_save_under_way_is_finished(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = trainer.loop.train_step

    def failing(built: Any, batch: Any, index: int, stop: int) -> Any:
        if index == 2:
            raise ValueError("the third row is broken")
        return genuine(built, batch, index, stop)

    monkeypatch.setattr(trainer.loop, "train_step", failing)
    with pytest.raises(ValueError, match="third row"):
        run(load(overrides(text, tmp_path, "checkpoint.mode=lazy")))
    assert list(content(tmp_path)) == ["step_00000001", "step_00000002"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["checkpoint.mode=lasy"], "checkpoint.mode=lasy: .*lazy"),
        (["checkpoint.mode=lazy", "checkpoint.every=0"], "checkpoint.mode=lazy: has no effect with checkpoint.every=0"),
        (["checkpoint.host_gib=1"], "checkpoint.host_gib=1: has no effect with checkpoint.mode=sync"),
        (["checkpoint.mode=lazy", "checkpoint.host_gib=0"], "checkpoint.host_gib=0: must be above 0"),
        (["checkpoint.on_failure=retry"], "checkpoint.on_failure=retry: .*go_on"),
    ],
    ids=["mode", "never", "sync_budget", "no_budget", "on_failure"],
)
def test_options_that_cannot_be_are_refused(options: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(options)


def test_a_disk_without_room_for_one_checkpoint_is_refused_before_the_first_step(
    text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    free = SimpleNamespace(total=usage.total, used=usage.used, free=2**16)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(UserError, match=r"a checkpoint takes about .* 64.0 KiB are free.*run.dir=PATH"):
        run(load(overrides(text, tmp_path)))
