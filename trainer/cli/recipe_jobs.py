"""Processes of a recipe's runs, one after the other or some at a time."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from trainer.errors import TrainingStopped, UserError
from trainer.signals import Interrupted

POLL = 0.05
"""Seconds between two looks at the processes."""


@dataclass(frozen=True)
class Job:
    """One run, or another command that its recipe needs."""

    name: str
    arguments: list[str]
    ranks: int = 1
    """Processes, started by torchrun where there are several."""
    needs: Path | None = None
    """What another job leaves, before which this one does not begin."""
    log: Path | None = None
    """Takes what it prints; None: this process's own terminal."""
    done: Callable[[float], None] = lambda seconds: None
    """Called with its seconds once it has ended well."""


def run_jobs(jobs: Sequence[Job], at_once: int = 1) -> None:
    """Do each job in a fresh process, in order, `at_once` at a time; signals are passed on, so that all save.

    Raises:
        UserError, TrainingStopped, Interrupted: as the first run that does not finish. The others were asked to save.
    """
    waiting, running = list(jobs), dict[subprocess.Popen[bytes], tuple[Job, float]]()
    failed: tuple[Job, int] | None = None
    with passing_on(running):
        while waiting or running:
            while len(running) < at_once and failed is None and (job := ready(waiting, running)) is not None:
                waiting.remove(job)
                print(job.name, flush=True)
                running[start(job)] = job, time.monotonic()
            for process in [process for process in running if process.poll() is not None]:
                job, began = running.pop(process)
                if process.returncode == 0:
                    job.done(time.monotonic() - began)
                elif failed is None:
                    failed, waiting = (job, process.returncode), []
                    for other in running:
                        other.send_signal(signal.SIGTERM)
            time.sleep(POLL)
    if failed is not None:
        raise ending(*failed)


def ready(waiting: list[Job], running: "dict[subprocess.Popen[bytes], tuple[Job, float]]") -> Job | None:
    """Return the first job that can begin; None where all wait for one that is running."""
    found = next((job for job in waiting if job.needs is None or job.needs.exists()), None)
    assert found or running or not waiting, f"nobody is to leave {waiting[0].needs}"
    return found


def start(job: Job) -> "subprocess.Popen[bytes]":
    several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={job.ranks}"] if job.ranks > 1 else []
    command = [sys.executable, *several, "-m", "trainer", *job.arguments]
    if job.log is None:
        return subprocess.Popen(command)
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with job.log.open("ab") as file:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT)


@contextmanager
def passing_on(running: "dict[subprocess.Popen[bytes], tuple[Job, float]]") -> Iterator[None]:
    """Hand Ctrl-C and SIGTERM to the runs, which save and end; this process ends when they have."""

    def forward(number: int, frame: FrameType | None) -> None:
        for process in list(running):
            process.send_signal(number)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def ending(job: Job, code: int) -> Exception:
    """What a run's exit code means for the recipe. torchrun has one for all failures."""
    code = 128 - code if code < 0 else code  # ended by a signal
    said = f"; what it said is in {job.log}" if job.log is not None else ""
    what = f"a run of the recipe ended with exit code {code}: {' '.join(job.arguments)}{said}"
    if code == 2:
        return UserError(what)
    if code in (130, 143):
        return Interrupted(code - 128, what)
    return TrainingStopped(what)
