"""Mistakes made on purpose, to see that the laboratory sees them. Each is a context on one rank."""

import os
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch._C._distributed_c10d import GradBucket

from parallel.launch import World


@contextmanager
def mean_of_gradients(world: World) -> Iterator[None]:
    """DDP averages, as without our hook: gradients are smaller by the number of ranks."""
    from parallel import replicate

    with mock.patch.object(replicate, "sum_gradients", averaged):
        yield


def averaged(group: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    torch.distributed.all_reduce(bucket.buffer().div_(torch.distributed.get_world_size(group)), group=group)
    done: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


@contextmanager
def seed_by_rank(world: World) -> Iterator[None]:
    """Stochastic rounding draws differently on each rank: replicas part."""
    from optim import rounding

    real = rounding.seed_of
    with mock.patch.object(rounding, "seed_of", lambda *args: real(*args) ^ world.process_rank):
        yield


@contextmanager
def local_gradient_lost(world: World) -> Iterator[None]:
    """Rank 1 sees another loss than its own."""
    from trainer import step

    real, factor = step.forward, 1.0 + 1e-6 * world.process_rank
    with mock.patch.object(step, "forward", lambda *args, **options: real(*args, **options) * factor):
        yield


@contextmanager
def raises_on_one_rank(world: World) -> Iterator[None]:
    from trainer import loop

    def fail(*args: Any) -> None:
        raise RuntimeError("a mistake of rank 1")

    with mock.patch.object(loop, "train_step", fail) if world.process_rank == 1 else nullcontext():
        yield


@contextmanager
def dies_on_one_rank(world: World) -> Iterator[None]:
    if world.process_rank == 1:
        os._exit(1)
    yield


@contextmanager
def hangs(world: World) -> Iterator[None]:
    time.sleep(600)
    yield


Fault = Callable[[World], AbstractContextManager[None]]
FAULTS: dict[str, Fault] = {
    fault.__name__: fault
    for fault in (
        mean_of_gradients,
        seed_by_rank,
        local_gradient_lost,
        raises_on_one_rank,
        dies_on_one_rank,
        hangs,
    )
}
