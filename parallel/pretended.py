"""A process group of any size in one process, for what depends on the group's size and not on what others send."""

import torch
import torch.distributed as dist
from torch import Tensor


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
