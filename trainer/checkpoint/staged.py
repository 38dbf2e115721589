"""torch.distributed.checkpoint's own planner, with host copies in the place of the tensors it plans for.

torch's `async_save` copies all that a rank has before there is a plan, so that of replicas every rank stages what one
of them writes; and where a rank fails to, the others wait for it. Here the plan comes first, in the background, and
exactly what this rank writes is copied. The files are those of a synchronous save.
"""

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import StorageMeta
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.tensor import DTensor

from offload.snapshot import Snapshot
from trainer.checkpoint.checkpoint import PER_RANK


class SmallFirstPlanner(DefaultSavePlanner):
    """Writes small tensors first, as torch's writer does on CUDA, so that a file's layout is the same on any device and
    in any mode."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        self.plan = replace(plan, items=sorted(plan.items, key=_bytes_of))
        return self.plan


def _bytes_of(item: WriteItem) -> int:
    assert item.tensor_data is not None, f"{item.index} is no tensor"
    return prod(item.tensor_data.size) * item.tensor_data.properties.dtype.itemsize


class StagedPlanner(SmallFirstPlanner):
    """Plans for tensors, then hands out copies of them, in the plan's order.

    Args:
        snapshot: begun when the plan is known.
        owned: dicts of the tensors, emptied then.
    """

    def __init__(self, snapshot: Snapshot, owned: Sequence[MutableMapping[str, Any]]) -> None:
        super().__init__()
        self._snapshot, self._owned = snapshot, list(owned)
        self._order: Iterator[WriteItem] = iter(())

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        self._owned.append(state_dict)  # torch's own copy of the dict
        super().set_up_planner(state_dict, storage_meta, is_coordinator)

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Start to copy what this rank is to write."""
        plan = super().finish_plan(new_plan)
        self._snapshot.begin([self.lookup_object(item.index) for item in plan.items])
        self._order = iter(plan.items)
        for tensors in (*self._owned, self.state_dict):
            tensors.clear()
        return plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        expected = next(self._order)
        assert expected.index == write_item.index, f"{write_item.index} is written before {expected.index}"
        return self._snapshot.take()


def staging_bytes(
    tensors: Mapping[str, Tensor], ranks: int, budget: int | None = None, *, holders: Mapping[str, int] | None = None
) -> int:
    """Host bytes that the copies of one of `ranks` ranks take: of what several ranks hold, each copies a share.

    Exact for one rank; of several, torch shares out whole tensors as evenly as it can.

    Args:
        holders: of the states of parameters that fewer than all ranks have whole: how many do, by name.
        budget: bytes at most, or those of the largest tensor where that is more; None for no limit.
    """
    known = holders or {}
    parts = [
        part_bytes(tensor, 1 if fnmatchcase(name, PER_RANK) else known.get(parameter_of(name), ranks))
        for name, tensor in tensors.items()
    ]
    return sum(parts) if budget is None else min(sum(parts), max(budget, *parts, 0))


def parameter_of(name: str) -> str:
    """The parameter whose state a tensor called `optim/<parameter>/<key>` is; else nothing."""
    return name.removeprefix("optim/").rpartition("/")[0] if name.startswith("optim/") else ""


def part_bytes(tensor: Tensor, holders: int) -> int:
    """Bytes of a tensor that one rank writes: its shard, or its share of what `holders` ranks hold."""
    if not isinstance(tensor, DTensor):
        return -(-tensor.nbytes // holders)
    mesh = tensor.device_mesh
    holders = prod(mesh.size(dim) for dim, place in enumerate(tensor.placements) if place.is_replicate())
    return -(-tensor.to_local().nbytes // holders)
