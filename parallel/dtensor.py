"""Sharded tensors: the local part out, what lies where, and what the ranks that share a tensor tell each other.

A `Layout` says it of one tensor: global shape, sharded dim, ranks. Of a plain tensor it says "whole", and what moves
data between ranks then does nothing, so that one code serves both. Shards are those of torch.chunk, as FSDP2 makes
them: equal up to the last ranks, which may have less or nothing. They must enter every collective all the same.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.placement_types import Placement

# Renamed in torch 2.13.
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, on the same storage; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def with_part(tensor: DTensor, part: Tensor) -> DTensor:
    """The same DTensor with other memory as this rank's part, on whatever device that is (`from_local` would copy it
    to the mesh's)."""
    return DTensor(part, tensor._spec, requires_grad=False)  # type: ignore[call-arg,no-any-return,no-untyped-call]


@dataclass(frozen=True)
class Layout:
    """Where the parts of one tensor are, seen from one rank."""

    shape: tuple[int, ...]
    """Global."""
    dim: int | None = None
    """The sharded dim; None: this rank has the whole tensor."""
    group: dist.ProcessGroup | None = None
    """The ranks that share it, in the order of their shards. None beside a `dim` of None only."""
    rank: int = 0
    """In the group, as `count`."""
    count: int = 1
    mesh: DeviceMesh | None = None
    axis: int = 0
    """The axis of the mesh that shards; the tensor is replicated over the others."""

    @classmethod
    def of(cls, tensor: Tensor, group: dist.ProcessGroup | None = None) -> "Layout":
        """Describe a plain tensor or a DTensor that is sharded over one axis of its mesh at most.

        Args:
            group: speak over this group instead of the mesh's own, such as in hooks that run while the mesh's own is
                busy; it must have the same ranks in the same order.

        Raises:
            ValueError: sums still outstanding (Partial), strided shards or two sharded axes.
        """
        if not isinstance(tensor, DTensor):
            return cls(tuple(tensor.shape))
        mesh, placements = tensor.device_mesh, tensor.placements
        sharded = [axis for axis, placement in enumerate(placements) if type(placement) is Shard]
        if len(sharded) > 1 or any(type(placement) not in (Shard, Replicate) for placement in placements):
            raise ValueError(
                f"a tensor of shape {tuple(tensor.shape)} is placed as {placements}: only Replicate() and one Shard() "
                "can be stepped; shard over one axis of the mesh (fully_shard, replicas on another axis)"
            )
        if not sharded or mesh.size(sharded[0]) == 1:
            return cls(tuple(tensor.shape), mesh=mesh)
        axis = sharded[0]
        placement = placements[axis]
        assert isinstance(placement, Shard)
        return cls(
            tuple(tensor.shape), placement.dim % tensor.dim(), group or mesh.get_group(axis),
            mesh.get_local_rank(axis), mesh.size(axis), mesh, axis,
        )  # fmt: skip

    def like(self, shape: Sequence[int], dim: int | None) -> "Layout":
        """The same ranks for a tensor of global `shape`, sharded on `dim`, or whole on each for None."""
        return replace(self, shape=tuple(shape), dim=None if self.whole else dim)

    @property
    def whole(self) -> bool:
        """Whether the ranks share nothing here: a plain tensor, or one rank alone."""
        return self.count == 1

    def span(self, size: int, rank: int | None = None) -> slice:
        """The part of a dim of `size` that a rank has, this one if not told."""
        each = -(-size // self.count)
        start = min((self.rank if rank is None else rank) * each, size)
        return slice(start, min(start + each, size))

    @property
    def mine(self) -> slice:
        """This rank's part of the sharded dim."""
        return slice(None) if self.dim is None else self.span(self.shape[self.dim])

    @property
    def local_shape(self) -> tuple[int, ...]:
        if self.dim is None:
            return self.shape
        size = self.mine.stop - self.mine.start
        return (*self.shape[: self.dim], size, *self.shape[self.dim + 1 :])

    def cut(self, tensor: Tensor) -> Tensor:
        """View of this rank's part of a tensor of the global shape."""
        if self.dim is None:
            return tensor
        return tensor.narrow(self.dim, self.mine.start, self.mine.stop - self.mine.start)

    def wrap(self, part: Tensor) -> Tensor:
        """This rank's part as a DTensor on the mesh, on the same storage; itself where nothing is sharded."""
        if self.dim is None or self.mesh is None:
            return part
        placements: list[Placement] = [Replicate()] * self.mesh.ndim
        placements[self.axis] = Shard(self.dim)
        stride = [math.prod(self.shape[i + 1 :]) for i in range(len(self.shape))]
        size = torch.Size(self.shape)
        return DTensor.from_local(part, self.mesh, placements, run_check=False, shape=size, stride=tuple(stride))

    def sum_(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place; the same bits on all of them."""
        if not self.whole:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def norms(self, *tensors: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Norms of the tensors that the ranks have parts of, in one sum, computed in `dtype`."""
        found = torch.stack([torch.linalg.vector_norm(tensor, dtype=dtype) for tensor in tensors])
        return found if self.whole else self.sum_(found.square_()).sqrt_()

    def max_(self, tensor: Tensor) -> Tensor:
        """The largest of the ranks, in place."""
        if not self.whole:
            dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self.group)
        return tensor

    def scatter(self, partial: Tensor) -> Tensor:
        """Sum partial results of the global shape over the ranks; each keeps its rows. For a `dim` of 0."""
        if self.whole:
            return partial
        assert self.dim == 0, "rows are scattered"
        each = -(-self.shape[0] // self.count)
        kept = partial.new_empty((each, *self.shape[1:]))
        reduce_scatter(kept, _with_rows(partial, each * self.count), group=self.group)
        return kept[: self.local_shape[0]]

    def gather(self, part: Tensor) -> Tensor:
        """The whole tensor from its parts on the ranks."""
        if self.dim is None:
            return part
        if self.dim == 1:
            return self.like(self.shape[1::-1] + self.shape[2:], 0).gather(part.transpose(0, 1)).transpose(0, 1)
        assert self.dim == 0, "rows or columns are gathered"
        each = -(-self.shape[0] // self.count)
        found = part.new_empty((each * self.count, *self.shape[1:]))
        all_gather(found, _with_rows(part, each), group=self.group)
        return found[: self.shape[0]]

    def move(self, part: Tensor, dim: int | None) -> Tensor:
        """This rank's part of the same tensor sharded on `dim`: rows for columns, or columns for rows.

        One all-to-all: a rank sends what it has once, and never holds more than its own parts.
        """
        if self.whole or dim == self.dim:
            return part
        assert self.dim is not None and dim is not None and self.dim + dim == 1, "rows and columns are exchanged"
        theirs = [self.span(self.shape[dim], rank) for rank in range(self.count)]
        sent = [part[span] if dim == 0 else part[:, span] for span in theirs]
        there = self.like(self.shape, dim)
        shapes = []
        for rank in range(self.count):
            span = self.span(self.shape[self.dim], rank)
            shape = list(there.local_shape)
            shape[self.dim] = span.stop - span.start
            shapes.append(shape)
        found = part.new_empty(math.prod(there.local_shape))
        dist.all_to_all_single(
            found, torch.cat([piece.reshape(-1) for piece in sent]),
            [math.prod(shape) for shape in shapes], [piece.numel() for piece in sent], group=self.group,
        )  # fmt: skip
        if self.dim == 0:  # rows of the sending ranks follow each other
            return found.view(there.local_shape)
        pieces = torch.split(found, [math.prod(shape) for shape in shapes])
        return torch.cat([piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)], dim=1)


WHOLE = Layout(())
"""Of a tensor that no other rank has a part of, whatever its shape."""


def _with_rows(tensor: Tensor, rows: int) -> Tensor:
    """Contiguous, with rows of zeros behind where there are fewer: collectives want equal parts."""
    if len(tensor) == rows:
        return tensor.contiguous()
    padded = tensor.new_zeros((rows, *tensor.shape[1:]))
    padded[: len(tensor)] = tensor
    return padded
