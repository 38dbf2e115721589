"""Start and end the processes' connection: who am I, which device is mine, how do we talk.

Started by torchrun, `accelerate launch` or nothing at all: the environment variables RANK, WORLD_SIZE and
LOCAL_RANK decide. One process needs no process group and makes none.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore

from parallel.config import EngineName, ParallelConfig


@dataclass(frozen=True)
class World:
    """The processes of this run, seen from one of them."""

    process_rank: int = 0
    process_count: int = 1
    local_rank: int = 0
    device: torch.device = torch.device("cpu")
    control: dist.ProcessGroup | None = None
    """gloo group for small host-side agreement, so that it never queues behind gradients; None when alone."""
    gradients: dist.ProcessGroup | None = None
    """Group that sums gradients; None: the default one."""
    sequence_degree: int = 1
    """Neighbouring ranks that share each row (`parallel.sequence`)."""

    @property
    def leads(self) -> bool:
        """Whether this process prints and writes the run folder."""
        return self.process_rank == 0

    @property
    def data_rank(self) -> int:
        """Which of the different shares of the rows this rank reads, with those it shares each row with."""
        return self.process_rank // self.sequence_degree

    @property
    def data_count(self) -> int:
        """How many different shares of the rows there are."""
        return self.process_count // self.sequence_degree

    @property
    def sequence_rank(self) -> int:
        """Which part of each row is this rank's."""
        return self.process_rank % self.sequence_degree

    def barrier(self) -> None:
        """Wait for every process (host side)."""
        if self.control is not None:
            dist.barrier(group=self.control)


def another_group(world: World, timeout: float) -> dist.ProcessGroup | None:
    """Return a gloo group of all ranks for one thread beside the training; None when alone. All ranks make it together.

    Args:
        timeout: seconds a collective in it may take.
    """
    return None if world.control is None else dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))


def sharing_ranks(world: World) -> list[list[int]]:
    """Process ranks by the rows they share: neighbours, `sequence_degree` of them."""
    degree = world.sequence_degree
    return [list(range(base, base + degree)) for base in range(0, world.process_count, degree)]


def sequence_group(world: World, timeout: float) -> dist.ProcessGroup | None:
    """Return a gloo group of the ranks that share this one's rows; None where it has whole rows. All ranks make theirs
    together.

    Args:
        timeout: seconds a collective in it may take.
    """
    if world.sequence_degree == 1:
        return None
    mine, _ = dist.new_subgroups_by_enumeration(  # type: ignore[no-untyped-call]
        sharing_ranks(world), timeout=timedelta(seconds=timeout), backend="gloo"
    )
    return mine  # type: ignore[no-any-return]


class RanksMissing(RuntimeError):
    """Not every rank came to the start.

    Attributes:
        speaks: whether this rank is the one to say so: rank 0, or every one that does not reach it.
    """

    def __init__(self, text: str, *, speaks: bool) -> None:
        super().__init__(text)
        self.speaks = speaks


def launched_rank() -> tuple[int, int, int, int]:
    """Return (rank, world size, local rank, local world size) as the launcher set them; (0, 1, 0, 1) without one."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        return 0, 1, 0, 1
    rank = int(os.environ["RANK"])
    return rank, count, int(os.environ.get("LOCAL_RANK", rank)), int(os.environ.get("LOCAL_WORLD_SIZE", count))


def cpu_threads(local_count: int) -> int:
    """Cores of this machine shared out over its processes, at least one each.

    torchrun sets OMP_NUM_THREADS=1 where the user set nothing, which leaves most cores idle.
    """
    return max(1, len(os.sched_getaffinity(0)) // local_count)


def missing_text(rank: int, count: int, timeout: float, error: Exception) -> str:
    """Say that this rank met too few others, or none that keeps them together."""
    where = f"{os.environ.get('MASTER_ADDR', '?')}:{os.environ.get('MASTER_PORT', '?')}"
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return (
        f"rank {rank} of {count} did not meet all the others at {where} within parallel.timeout={timeout:g} s "
        f"({reason}). Start every rank with the same command, and see that this address can be reached from each."
    )


@contextmanager
def connected(cfg: ParallelConfig, device: str, threads: int | None = None) -> Iterator[World]:
    """Join the other processes for the length of the context.

    Args:
        device: `auto`, `cpu` or `cuda`; each process takes the CUDA device of its local rank.
        threads: CPU threads of this process; None shares the cores out.
    """
    rank, count, local_rank, local_count = launched_rank()
    torch.set_num_threads(threads or cpu_threads(local_count))
    on_cuda = device == "cuda" or (device == "auto" and torch.cuda.is_available())
    place = torch.device("cuda", local_rank) if on_cuda else torch.device("cpu")
    if on_cuda:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, before the first product; cuBLAS's own
        torch.cuda.set_device(place)  # default lets products that share a stream differ between runs
    if count == 1 and cfg.engine is EngineName.torch:
        yield World(device=place)
        return
    timeout = timedelta(seconds=cfg.timeout)
    # The libraries want a process group of one, too; it meets nobody, so it needs no address.
    alone: dict[str, Any] = {"store": HashStore(), "rank": 0, "world_size": 1} if count == 1 else {}
    try:
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_cuda else "gloo", timeout=timeout, **alone)
        control = None if alone else dist.new_group(backend="gloo", timeout=timeout)
    except (dist.DistStoreError, dist.DistNetworkError, dist.DistBackendError, RuntimeError) as error:
        text = missing_text(rank, count, cfg.timeout, error)
        raise RanksMissing(text, speaks=rank == 0 or "connect" in str(error).lower()) from error
    try:
        yield World(rank, count, local_rank, place, control, sequence_degree=cfg.degree(count))
    finally:
        dist.destroy_process_group()
