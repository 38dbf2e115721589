"""Ranks that die, stall, fail or never come: the others end in time, and one of them says which, where and why."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.ranks import fork_server, free_port
from tests.trainer.sabotage import command
from trainer.metrics import read_metrics

REPO = Path(__file__).parents[2]
WAIT = 15
"""Seconds a collective may wait here."""
LIMIT = 400
"""Seconds, on a busy machine, after which a job counts as hung."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " + "learn this " * (1 + i % 4)}) + "\n" for i in range(60)))
    return path


def asked(text: Path, folder: Path, *more: str) -> list[str]:
    return [
        *("data=jsonl", f"data.path={text}", f"data.cache_dir={text.parent / 'cache'}", "data.sequence_length=32"),
        *("data.eval_fraction=0.2", "model.hidden_size=32", "model.intermediate_size=48", "model.layers=1"),
        *("model.heads=2", "optim=adamw", "train.steps=6", "train.global_batch=4", "train.micro_batch=2"),
        *("train.log_every=1", "run.device=cpu", f"run.dir={folder}", "checkpoint.every=2"),
        *(f"parallel.timeout={WAIT}", *more),
    ]


def job(kind: str, text: Path, folder: Path, *more: str, ranks: tuple[int, ...] = (0, 1)) -> list[tuple[int, str]]:
    """Run two ranks, or those of `ranks` alone; return exit code and stderr of each."""
    overrides = asked(text, folder, *more)
    port, logs = free_port(), [folder.parent / f"{kind}.{rank}" for rank in ranks]
    places = [(dict(os.environ), rank, 2, port) for rank in ranks]
    started = [
        fork_server().Process(target=command, args=(place, kind, overrides, log), daemon=True)
        for place, log in zip(places, logs, strict=True)
    ]
    for process in started:
        process.start()
    deadline = time.monotonic() + LIMIT
    try:
        for rank, process in zip(ranks, started, strict=True):
            if kind == "stalls" and rank == 1:  # a launcher ends what is left when one rank has ended
                process.kill()
            process.join(deadline - time.monotonic())
            assert process.exitcode is not None, f"{kind}: rank {rank} has not ended after {LIMIT} s"
    finally:
        for process in started:
            process.kill()
    return [(int(str(process.exitcode)), log.read_text()) for process, log in zip(started, logs, strict=True)]


def steps(folder: Path) -> list[int]:
    return [r["step"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


def test_a_rank_killed_in_a_step_ends_the_job_and_the_next_start_goes_on(text: Path, tmp_path: Path) -> None:
    (code, errors), (killed, _) = job("killed_in_step", text, tmp_path / "run")
    assert (code, killed) == (3, -9), errors
    assert "rank 1 is gone" in errors and "step 3" in errors and "Traceback" not in errors
    assert [code for code, _ in job("nothing", text, tmp_path / "run")] == [0, 0]
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


@pytest.mark.slow
def test_a_rank_killed_while_saving_leaves_the_checkpoint_before(text: Path, tmp_path: Path) -> None:
    (code, errors), _ = job("killed_in_save", text, tmp_path / "run")
    assert code == 3 and "rank 1 is gone" in errors and "save" in errors and "Traceback" not in errors
    assert list((tmp_path / "run" / "checkpoints").glob("step_*")) == []
    assert [code for code, _ in job("nothing", text, tmp_path / "run", "train.steps=4")] == [0, 0]
    (code, errors), _ = job("killed_in_load", text, tmp_path / "run")
    assert code == 3 and "rank 1 is gone" in errors and "loading a checkpoint" in errors and "Traceback" not in errors
    assert [code for code, _ in job("nothing", text, tmp_path / "run")] == [0, 0]
    assert steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6]


def test_a_stalled_rank_is_named_with_step_and_phase(text: Path, tmp_path: Path) -> None:
    begin = time.monotonic()
    (code, errors), _ = job("stalls", text, tmp_path / "run")
    assert code == 3 and time.monotonic() - begin < LIMIT
    assert f"no answer within parallel.timeout={WAIT} s; rank 1 is not there" in errors
    assert "rank 1 on" in errors and "step 3, backward for" in errors and "Traceback" not in errors


def test_a_rank_that_fails_tells_why_and_the_other_repeats_it_in_one_line(text: Path, tmp_path: Path) -> None:
    (code, errors), (failed, own) = job("fails", text, tmp_path / "run")
    assert (code, failed) == (3, 1)
    assert "stowage: rank 1 failed in step 3, data: ValueError: the third row is broken" in errors
    assert "Traceback" not in errors and "Traceback" in own


@pytest.mark.slow
def test_a_rank_that_never_comes_is_missed(text: Path, tmp_path: Path) -> None:
    ((code, errors),) = job("nothing", text, tmp_path / "run", ranks=(0,))
    assert code == 3 and "rank 0 of 2 did not meet all the others" in errors and "Traceback" not in errors
    ((code, errors),) = job("nothing", text, tmp_path / "run", ranks=(1,))
    assert code == 3 and "rank 1 of 2 did not meet all the others" in errors and "Traceback" not in errors


@pytest.mark.slow
def test_a_loss_that_is_not_a_number_on_one_rank_leaves_the_step_out_on_all(text: Path, tmp_path: Path) -> None:
    results = job("nan", text, tmp_path / "run")
    assert [code for code, _ in results] == [0, 0], results
    records = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert records[-1]["skipped"] == 1 and records[-1]["step"] == 6


def torchrun(kind: str, overrides: list[str]) -> tuple[int, str]:
    """The same job as users start it: exit code and output of the launcher, which ends what is left of it."""
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "tests.trainer.sabotage", kind, *overrides],
        cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=LIMIT, check=False,
    )  # fmt: skip
    return done.returncode, done.stdout


@pytest.mark.slow
def test_under_torchrun_ranks_killed_in_a_save_and_in_a_load_end_the_job_and_nothing_is_lost(
    text: Path, tmp_path: Path
) -> None:
    overrides = asked(text, tmp_path / "run")
    code, output = torchrun("killed_in_save", overrides)
    assert code != 0 and "Signal 9 (SIGKILL)" in output, output
    assert steps(tmp_path / "run")[:2] == [1, 2]
    code, output = torchrun("nothing", [*overrides, "train.steps=4"])
    assert code == 0, output
    code, output = torchrun("killed_in_load", overrides)
    assert code != 0 and "Signal 9 (SIGKILL)" in output, output
    code, output = torchrun("nothing", overrides)
    assert code == 0 and steps(tmp_path / "run") == [1, 2, 3, 4, 5, 6], output
