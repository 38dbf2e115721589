"""Agreement between processes, named by what it means. All host side, on the control group; no-ops when alone."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.launch import World


def sum_over_ranks(world: World, values: Tensor) -> Tensor:
    """Return the element-wise sum of every rank's `values`, in float64 on the host."""
    total = values.detach().to("cpu", torch.float64)
    if world.control is not None:
        total = total.clone()
        dist.all_reduce(total, group=world.control)
    return total


def any_rank(world: World, *flags: int) -> list[int]:
    """Return for each flag the largest value any rank gave: whoever raises it raises it for all."""
    if world.control is None:
        return list(flags)
    raised = torch.tensor(flags, dtype=torch.int64)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=world.control)
    agreed: list[int] = raised.tolist()
    raised.untyped_storage().resize_(0)  # gloo's thread may hold the tensor a moment longer: a step's bytes are exact
    return agreed


def from_leader(world: World, value: Any) -> Any:
    """Return rank 0's `value` on every rank; any picklable object."""
    return value if world.control is None else from_first(world.control, value)


def from_first(group: dist.ProcessGroup, value: Any) -> Any:
    """Return on every rank of a gloo `group` the value of its first one; any picklable object."""
    box = [value]
    dist.broadcast_object_list(box, group=group, group_src=0)
    return box[0]


def gather_objects(world: World, value: Any) -> list[Any]:
    """Return every rank's `value`, in rank order, on every rank."""
    if world.control is None:
        return [value]
    box: list[Any] = [None] * world.process_count
    dist.all_gather_object(box, value, group=world.control)
    return box
