"""Which rank shares shards with which: a line of shards, or `replicas` such lines side by side.

Ranks that are near each other (of one machine, as launchers number them) share one set of shards; replicas are the
outer dimension, as their traffic is the smaller.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from parallel.config import ParallelConfig
from parallel.launch import World

REPLICATE, SHARD = "replicate", "shard"
"""Names of the mesh's axes."""


@dataclass(frozen=True)
class Grid:
    """Ranks as a mesh of (replicas x shards), or of shards alone where there is one replica."""

    mesh: DeviceMesh

    @property
    def shards(self) -> dist.ProcessGroup:
        """Ranks that hold one model together."""
        return self.mesh.get_group(SHARD)

    @property
    def count(self) -> int:
        """Into how many shards a tensor is cut."""
        return self.mesh.size(self.mesh.ndim - 1)

    @property
    def index(self) -> int:
        """Which of the shards is this rank's."""
        return self.mesh.get_local_rank(SHARD)

    @property
    def placements(self) -> tuple[Placement, ...]:
        """Where a tensor cut into rows lies."""
        return (Replicate(),) * (self.mesh.ndim - 1) + (Shard(0),)

    def rows(self, count: int, index: int | None = None) -> slice:
        """Rows of a tensor of `count` that shard `index` (default: this rank's) holds: torch.chunk's, perhaps none."""
        return shard_rows(count, self.count, self.index if index is None else index)

    def wrap(self, rows: Tensor, shape: torch.Size) -> DTensor:
        """This rank's `rows` of a contiguous tensor of global `shape`, as a DTensor that shares their storage."""
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(rows, self.mesh, self.placements, run_check=False, shape=shape, stride=stride)


def shard_rows(count: int, shards: int, index: int) -> slice:
    """Rows `index` of `shards` gets of `count`: ceil(count / shards) each while there are any left."""
    each = -(-count // shards)
    return slice(min(each * index, count), min(each * (index + 1), count))


@dataclass(frozen=True)
class Share:
    """Which rows of every tensor are this rank's, known without talking to the others."""

    count: int
    index: int

    def rows(self, count: int) -> slice:
        return shard_rows(count, self.count, self.index)

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy of this rank's rows of a whole tensor."""
        return tensor[self.rows(tensor.shape[0])].clone()

    def read(self, stored: Any, shape: Sequence[int]) -> Tensor:
        """This rank's rows of a tensor of `shape` in a file, of which `stored` gives any slice."""
        rows: Tensor = stored[self.rows(shape[0])]
        return rows


def share_of(world: World, cfg: ParallelConfig) -> Share | None:
    """What this rank holds of the weights; None where that is all of them."""
    count = world.process_count // cfg.replicas
    return Share(count, world.process_rank % count) if cfg.zero > 1 and count > 1 else None


def make_grid(world: World, cfg: ParallelConfig) -> Grid:
    """Arrange the ranks. Every rank calls it."""
    shards = world.process_count // cfg.replicas
    shape, names = ((shards,), (SHARD,)) if cfg.replicas == 1 else ((cfg.replicas, shards), (REPLICATE, SHARD))
    with unset_fake_temporarily():  # a mesh reads its own tensor of ranks
        return Grid(init_device_mesh(world.device.type, shape, mesh_dim_names=names))


def another_group_of_shards(world: World, cfg: ParallelConfig) -> dist.ProcessGroup:
    """A second group of the ranks that hold one model together, for who speaks while the mesh's own is busy. Every rank
    calls it."""
    shards = world.process_count // cfg.replicas
    lines = [list(range(first, first + shards)) for first in range(0, world.process_count, shards)]
    groups = [dist.new_group(line, timeout=timedelta(seconds=cfg.timeout)) for line in lines]
    own: dist.ProcessGroup = groups[world.process_rank // shards]
    return own
