"""A process group of any size in one process, for what depends on the group's size and not on what others send."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.config import ParallelConfig


class Ended(dist.Work):
    """A collective that has ended, and left its tensors as they were."""

    def __init__(self, tensors: list[Tensor]) -> None:
        super().__init__()
        self._tensors = tensors

    def wait(self, timeout: object = None) -> bool:  # type: ignore[override]
        return True

    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_result(self._tensors)
        return future


class PretendedGroup(dist.ProcessGroup):
    """Rank 0 of `count` ranks, of which no other exists. It sums, as far as sizes and lifetimes go, and no more.

    DDP makes its buckets and views as in a real group of that size. The group is registered nowhere, so that a
    process may have a real one beside it.
    """

    def __init__(self, count: int) -> None:
        super().__init__(0, count)  # type: ignore[call-arg]  # the stub lacks this overload

    def allreduce(self, tensors: list[Tensor], opts: object = None) -> Ended:  # type: ignore[override]
        return Ended(tensors)

    def getBackendName(self) -> str:
        return "pretended"


@contextmanager
def pretended_ranks(cfg: ParallelConfig, count: int) -> Iterator[None]:
    """Be rank 0 of `count` for what asks torch's default group, as meshes do; where nothing is sharded, do nothing.

    Collectives end at once and leave their tensors as they were.

    Raises:
        RuntimeError: this process belongs to a real group, beside which torch allows no other default.
    """
    if cfg.zero == 0 or count == 1:
        yield
        return
    if dist.is_initialized():
        raise RuntimeError("ranks that share shards cannot be pretended among real ones; use `stowage plan`")
    from torch.testing._internal.distributed.fake_pg import FakeStore  # torch has it in its tests alone

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=count)
    try:
        yield
    finally:
        dist.destroy_process_group()
