"""Processes that stay: one process group for many combinations, begun anew after a crash or a hang."""

import functools
import gc
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from typing import Any

import torch.distributed as dist
from torch.distributed.tensor import debug

from tests.composition.case import Job, Report, run_job
from tests.ranks import enter, fork_server, free_port

SECONDS = 120.0
"""A combination takes about a second; one that takes this long waits for something that will not come."""
GRACE = 3.0
"""Seconds the other ranks may take to end once one has crashed: those left wait for it in a collective."""


def work(environment: dict[str, str], rank: int, count: int, port: int, jobs: Connection) -> None:
    """One process of a pool: join the group as under torchrun, then do jobs until there are no more."""
    enter(environment, rank, count, port)
    from parallel import mesh
    from parallel.config import ParallelConfig
    from parallel.launch import connected
    from trainer.checkpoint import files

    files.os.fsync = lambda fd: None  # type: ignore[assignment]  # no power cut is tried here, and disks are slow
    with connected(ParallelConfig(timeout=SECONDS), "cpu", 1) as world, suppress(EOFError):  # the other end is gone
        kept = groups()
        mesh.init_device_mesh = functools.cache(functools.partial(mesh_that_stays, mesh.init_device_mesh, kept))  # type: ignore[attr-defined]
        while True:
            report = run_job(jobs.recv(), world)
            forget_groups(kept)
            jobs.send(report)


def groups() -> list[dist.ProcessGroup]:
    """The process groups there are, in the order they were made."""
    return list(dist.distributed_c10d._world.pg_map)


def mesh_that_stays(make: Any, kept: list[dist.ProcessGroup], *args: Any, **options: Any) -> Any:
    """Make a mesh whose groups are kept: DTensor remembers, by an equal mesh, how it communicated on another before."""
    before = groups()
    made = make(*args, **options)
    kept += [group for group in groups() if group not in before]
    return made


def forget_groups(kept: Sequence[dist.ProcessGroup]) -> None:
    """End the groups that a combination made (rings, writers of checkpoints), as the end of its run would.

    Each has threads that wake a hundred times a second: those of a hundred combinations take all cores there are.
    """
    gc.collect()  # a model lies in cycles with its hooks, and holds its mesh
    if hasattr(debug, "_clear_sharding_prop_cache"):  # what torch remembers of an equal mesh names the groups it had
        debug._clear_sharding_prop_cache()
    for group in groups():
        if group not in kept:
            dist.destroy_process_group(group)


class Pool:
    """`count` ranks that do one job at a time.

    They are forked from a server that has imported everything, so that a new set takes a fraction of a second.
    """

    def __init__(self, count: int, seconds: float = SECONDS) -> None:
        self.count, self.seconds = count, seconds
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []

    def run(self, job: Job) -> list[Report]:
        """Return the reports of all ranks, in order. After a crash or a hang the processes are replaced."""
        if not self._processes:
            self._start()
        reports: list[Report | None] = [None] * self.count
        with suppress(BrokenPipeError):
            for pipe in self._pipes:
                pipe.send(job)
        deadline = time.monotonic() + self.seconds
        while (left := [pipe for pipe, report in zip(self._pipes, reports, strict=True) if report is None]) and (
            ready := wait(left, max(0.0, deadline - time.monotonic()))
        ):
            for pipe in ready:
                rank = self._pipes.index(pipe)  # type: ignore[arg-type]
                reports[rank] = received(pipe)  # type: ignore[arg-type]
                if reports[rank].kind != "done":  # type: ignore[union-attr]
                    deadline = min(deadline, time.monotonic() + GRACE)
        hung = "waits for another rank" if any(reports) else f"no rank came back in {self.seconds:g} s"
        found = [report or Report("hung", hung) for report in reports]
        if any(report.kind not in ("done", "refused") for report in found) or len({r.kind for r in found}) > 1:
            self.close()
        return found

    def _start(self) -> None:
        context = fork_server()
        port = free_port()
        for rank in range(self.count):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(dict(os.environ), rank, self.count, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)

    def close(self) -> None:
        """End the processes, those that hang too."""
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._pipes = [], []


def received(pipe: Connection) -> Report:
    try:
        report: Report = pipe.recv()
    except (EOFError, ConnectionError):
        return Report("died", "the process died")
    return report


class Pools:
    """A pool of each size, begun on use. As a context: ended afterwards."""

    def __init__(self) -> None:
        self._pools: dict[int, Pool] = {}

    def __enter__(self) -> "Pools":
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self._pools.values():
            pool.close()

    def run(self, count: int, job: Job) -> list[Report]:
        return self._pools.setdefault(count, Pool(count)).run(job)


def worst(reports: Sequence[Report]) -> Report | None:
    """The report that explains why the job was not done, others being the consequence; None if all is well."""
    bad = [report for report in reports if report.kind != "done"]
    return min(bad, key=lambda report: ("died", "crashed", "refused", "hung").index(report.kind), default=None)
