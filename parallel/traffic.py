"""What a rank sends: every collective that it enters, by kind, in the bytes that ring algorithms send for it.

Of N ranks, for n bytes of the whole tensor (all ranks' parts together):

    all_reduce              2 n (N - 1) / N
    reduce_scatter            n (N - 1) / N
    all_gather                n (N - 1) / N
    all_to_all              what is for others
    broadcast, reduce         n (N - 1) / N, the mean of ranks: all but one pass it on
    send                      n

A library may send otherwise (gloo reduces and scatters by an all-reduce); these are the figures that stages and methods
are compared by. Seen are the operators that torch dispatches, so DDP, FSDP2, DeepSpeed and our own alike.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

KINDS = {
    "allreduce": "all_reduce", "all_reduce": "all_reduce", "reduce_scatter": "reduce_scatter",
    "allgather": "all_gather", "all_gather": "all_gather", "alltoall": "all_to_all", "all_to_all": "all_to_all",
    "broadcast": "broadcast", "send": "send", "reduce": "reduce", "gather": "gather", "scatter": "scatter",
}  # fmt: skip
"""Kinds of operators, by how the names of torch's begin; of several beginnings the first counts."""


class Traffic(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Context that counts.

    Args:
        apart: a group whose collectives are not counted, such as that of host-side agreement.
    """

    def __init__(self, apart: dist.ProcessGroup | None = None) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._apart = None if apart is None else apart.group_name
        self._sent: dict[str, float] = {}
        self.calls: Counter[str] = Counter()
        self.largest: Counter[str] = Counter()
        """Bytes of the largest whole tensor of a collective, by kind."""

    @property
    def sent(self) -> Counter[str]:
        """Bytes by kind."""
        return Counter({kind: round(size) for kind, size in self._sent.items()})

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace in ("c10d", "_c10d_functional"):
            self._note(func.__name__.partition(".")[0].lstrip("_"), args, alone=func.namespace == "_c10d_functional")
        return func(*args, **(kwargs or {}))

    def _note(self, operator: str, args: Any, *, alone: bool) -> None:
        """Count one collective; `alone`: its arguments hold what goes in, and not what comes out."""
        kind = next((KINDS[begin] for begin in KINDS if operator.startswith(begin)), None)
        group = group_of(args)
        if kind is None or group is None or group.group_name == self._apart:
            return
        count = group.size()
        whole = max(sum(tensor.nbytes for tensor in tensors(arg)) for arg in args)
        if kind == "all_gather" and alone:
            whole *= count
        sent = float(whole if kind == "send" else whole * (count - 1) / count)
        if kind == "all_reduce":
            sent *= 2
        if kind == "all_to_all":
            sent = float(to_others(args, group, whole))
        self.calls[kind] += 1
        self._sent[kind] = self._sent.get(kind, 0.0) + sent
        self.largest[kind] = max(self.largest[kind], whole)


def to_others(args: Any, group: dist.ProcessGroup, whole: int) -> int:
    """Bytes of an all-to-all that do not stay here: by the sizes of the parts where there are any, else all alike."""
    splits = [arg for arg in args if isinstance(arg, list) and arg and isinstance(arg[0], int)]
    if not splits:
        return round(whole * (group.size() - 1) / group.size())
    sent = args[1]  # of output, input, group, the parts received, the parts sent
    rows = sum(splits[-1])
    there: int = sent.nbytes * (rows - splits[-1][group.rank()]) // max(rows, 1)
    return there


def group_of(args: Any) -> dist.ProcessGroup | None:
    """The group among the arguments of a collective, given as itself or by name; None for what waits and the like."""
    for arg in args:
        if isinstance(arg, torch.ScriptObject) and "ProcessGroup" in str(arg._type()):  # type: ignore[attr-defined]
            return dist.ProcessGroup.unbox(arg)
        if isinstance(arg, str) and arg in dist.distributed_c10d._world.pg_names.values():
            return next(group for group, name in dist.distributed_c10d._world.pg_names.items() if name == arg)
    return None


def tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for each in value:
            yield from tensors(each)
