"""A process group of any size in one process, for what depends on the group's size and not on what others send."""

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future


class PretendedGroup(dist.ProcessGroup):
    """Rank 0 of `count` ranks, of which no other exists: a sum ends at once and leaves every tensor as it is.

    DDP makes its buckets and views as in a real group of that size. The group is registered nowhere, so that a
    process may have a real one beside it.
    """

    def __init__(self, count: int) -> None:
        super().__init__(0, count)

    def allreduce(self, tensors: list[Tensor], opts: dist.AllreduceOptions | None = None) -> dist.Work:  # type: ignore[override]
        done: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        done.set_result(tensors)
        return _create_work_from_future(done)

    def getBackendName(self) -> str:
        return "pretended"
