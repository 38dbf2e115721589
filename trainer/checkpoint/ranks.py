"""Work of several processes in which an error on one is an error on all, so that nobody waits for ever."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException

from trainer.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class _Failure:
    """An exception in a form that always travels."""

    rank: int
    kind: str  # "user", "os" or "other"
    text: str
    errno: int | None = None
    filename: str | None = None

    def to_exception(self) -> Exception:
        if self.kind == "user":
            return UserError(self.text)
        if self.kind == "os":
            return OSError(self.errno, f"{self.text} (rank {self.rank})", self.filename)
        return RuntimeError(f"rank {self.rank}: {self.text}")


class Ranks:
    """The processes of a group; without a group, this process alone.

    Args:
        group: a gloo group (objects travel through host memory).
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        if group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            raise ValueError(f"checkpoints of {dist.get_world_size()} processes need their gloo group, got None")
        self.group = group
        self.rank = dist.get_rank(group) if group is not None else 0
        self.size = dist.get_world_size(group) if group is not None else 1

    def all(self, work: Callable[[], T]) -> list[T]:
        """Run `work` on every rank; return all results, by rank, on every rank."""
        mine, error = self._attempt(work)
        gathered: list[Any] = [mine] * self.size
        if self.group is not None:
            dist.all_gather_object(gathered, mine, group=self.group)
        _raise_first(gathered, mine, error)
        return gathered

    def first(self, work: Callable[[], T]) -> T:
        """Run `work` on rank 0 alone; return its result on every rank."""
        mine, error = self._attempt(work) if self.rank == 0 else (None, None)
        sent: list[Any] = [mine]
        if self.group is not None:
            dist.broadcast_object_list(sent, src=dist.get_global_rank(self.group, 0), group=self.group)
        _raise_first(sent, mine, error)
        return sent[0]  # type: ignore[no-any-return]

    def _attempt(self, work: Callable[[], T]) -> tuple[T | _Failure, BaseException | None]:
        try:
            return work(), None
        except BaseException as e:  # an interrupt too: the others must hear of it before it goes on
            error, rank = e, self.rank
            while isinstance(error, CheckpointException) and error.failures:
                rank = min(error.failures)  # torch raises one exception on all ranks for what went wrong on any
                error = error.failures[rank][0]
            failure = _to_failure(error, rank)
            return failure, error if rank == self.rank else failure.to_exception()


def _to_failure(error: BaseException, rank: int) -> _Failure:
    if isinstance(error, UserError):
        return _Failure(rank, "user", str(error))
    if isinstance(error, OSError):
        filename = None if error.filename is None else str(error.filename)
        return _Failure(rank, "os", error.strerror or str(error), error.errno, filename)
    return _Failure(rank, "other", f"{type(error).__name__}: {error}")


def _raise_first(results: list[Any], mine: Any, error: BaseException | None) -> None:
    """Raise the lowest rank's failure, on that rank as it was; an interrupt of this rank stays one."""
    first = next((result for result in results if isinstance(result, _Failure)), None)
    if error is not None and (mine == first or not isinstance(error, Exception)):
        raise error
    if first is not None:
        raise first.to_exception()
