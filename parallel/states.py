"""ZeRO stage 1: whole weights and gradients on every rank, optimizer states for a share of them.

Gradients add up in DDP's buckets; in the last micro-step each bucket is reduced and scattered, and a rank is left with
the sums of its own share (what it holds of the others' is its own part of their sums, which nobody reads). The
optimizer steps that share, in the weight's own storage; then the ranks gather each other's. So a rank sends the model's
bytes twice a step, as DDP does.

A tensor is cut into rows: the optimizer steps a DTensor, its states are laid out as FSDP2 would have them, and all
ranks have shares of the same size. Or it has one owner, which steps it as one process would (`owners`): for matrices
whose method takes them as wholes, and would have to send something beside gradient and weight of each row. Either way a
checkpoint does not know the difference.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.collectives import gather_objects
from parallel.config import ParallelConfig
from parallel.dtensor import all_gather, reduce_scatter
from parallel.launch import World
from parallel.mesh import REPLICATE, Grid
from parallel.owners import Owners
from parallel.replicate import Replicas
from parallel.spread import norms_of, stored

MIB = 2**20


class CutStates(Replicas):
    """Each rank steps its rows of most tensors, and whole those that it owns.

    Args:
        chosen: the parameters that are stepped whole, and by whom.
    """

    def __init__(self, model: nn.Module, world: World, cfg: ParallelConfig, grid: Grid, chosen: Owners) -> None:
        self.grid, self.owners, self._why = grid, dict(chosen.of), chosen.why
        super().__init__(model, world, cfg)
        self.holders = dict.fromkeys(self.owners, cfg.replicas)
        self.bucket_bytes = cfg.bucket_mib * MIB
        self.rows = {
            name: nn.Parameter(grid.wrap(own_rows(p.detach(), grid), p.shape))
            for name, p in self.trainable.items()
            if p.dim() and name not in self.owners  # a scalar has no rows: every rank steps it
        }

    def _sum_in(self, wrapped: DistributedDataParallel) -> None:
        owner_of = {id(p): self.owners[name] for name, p in self.trainable.items() if name in self.owners}
        wrapped.register_comm_hook(Shares(self.grid, owner_of), sum_own_share)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [
            (name, self.rows.get(name, p))
            for name, p in self.owner.named_parameters()
            if self.owners.get(name, self.grid.index) == self.grid.index
        ]

    def remarks(self) -> list[str]:
        return [self._why] if self._why else []

    def of_all(self, values: dict[str, Any]) -> dict[str, Any]:
        if not self.owners:
            return values
        known: dict[str, Any] = {}
        for each in gather_objects(self._world, values):
            known |= each
        return {name: known[name] for name, _ in self.owner.named_parameters() if name in known}

    def gradients(self) -> list[Tensor]:
        return [self._share(name, p.grad) for name, p in self.trainable.items() if p.grad is not None]

    def _share(self, name: str, grad: Tensor) -> Tensor:
        if name in self.owners:
            return grad if self.owners[name] == self.grid.index else grad.new_empty(0)
        return own_rows(grad, self.grid) if grad.dim() else grad

    def gradient_norms(self) -> Tensor:
        cut = torch.tensor([grad.dim() > 0 for grad in super().gradients()])
        norms = norms_of(self.gradients())
        squares = norms.square()
        dist.all_reduce(squares, group=self.grid.shards)
        return torch.where(cut.to(norms.device), squares.sqrt(), norms)

    def before_update(self) -> None:
        for name, rows in self.rows.items():
            grad = self.trainable[name].grad
            rows.grad = None if grad is None else self.grid.wrap(own_rows(grad, self.grid), grad.shape)

    def after_update(self) -> None:
        weights = {name: p.detach() for name, p in self.trainable.items() if p.grad is not None}
        stepped = [plain for name in self.rows if name in weights for plain in stored(weights[name])]
        gather_rows(sorted(stepped, key=lambda plain: str(plain.dtype)), self.grid, self.bucket_bytes)
        for rows in self.rows.values():
            rows.grad = None
        owned = [(weights[name], owner) for name, owner in self.owners.items() if name in weights]
        hand_out([(plain, owner) for weight, owner in owned for plain in stored(weight)], self.grid)


@dataclass(frozen=True)
class Shares:
    """Whose the gradients of a bucket are: rows of all ranks but where there is an owner, by id of the parameter."""

    grid: Grid
    owner_of: Mapping[int, int]


def own_rows(tensor: Tensor, grid: Grid) -> Tensor:
    """View of this rank's rows of a whole tensor."""
    return tensor[grid.rows(tensor.shape[0])]


def sum_own_share(shares: Shares, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum over the ranks, of each gradient of a bucket, this rank's rows, or the whole where this rank owns it or it
    has no rows.

    What is sent of rows is a copy of the bucket, in the order of the ranks that they are of. On CUDA, backward runs on
    meanwhile; host memory has no streams that would bound how many copies wait.
    """
    grid, buffer, gradients = shares.grid, bucket.buffer(), bucket.gradients()
    owners = [shares.owner_of.get(id(p)) for p in bucket.parameters()]
    owned = [(g, owner) for g, owner in zip(gradients, owners, strict=True) if owner is not None]
    left = [g for g, owner in zip(gradients, owners, strict=True) if owner is None]
    scalars, cut = [g for g in left if not g.dim()], [g for g in left if g.dim()]
    works = [dist.reduce(grad, group=grid.shards, group_dst=owner, async_op=True) for grad, owner in owned]
    each = rows_sizes(cut, grid)
    summed = buffer.new_empty(sum(each))
    if cut:
        works.append(reduce_scatter(summed, by_rank(cut, each, grid), group=grid.shards, async_op=True))

    def take(_: object = None) -> Tensor:
        if summed.is_cuda and not isinstance(summed, FakeTensor):
            summed.record_stream(torch.cuda.current_stream())  # that of the future, not the one it was made on
        for grad, part in zip(cut, torch.split(summed, each) if cut else (), strict=True):
            mine = own_rows(grad, grid)
            mine.copy_(part[: mine.numel()].view(mine.shape))
        return buffer

    alone = grid.mesh.ndim == 1 and not scalars
    if buffer.is_cuda and alone:  # works of one group end in the order they were begun
        taken: torch.futures.Future[Tensor] = works[-1].get_future().then(take)
        return taken
    for work in works:
        work.wait()
    if grid.mesh.ndim > 1:
        for mine in [summed] * bool(cut) + [grad for grad, owner in owned if owner == grid.index]:
            dist.all_reduce(mine, group=grid.mesh.get_group(REPLICATE))
    for grad in scalars:
        for axis in range(grid.mesh.ndim):
            dist.all_reduce(grad, group=grid.mesh.get_group(axis))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(take())
    return done


def by_rank(gradients: Sequence[Tensor], each: Sequence[int], grid: Grid) -> Tensor:
    """One flat copy: of each rank in turn its rows of all gradients, `each` values of one, what is missing zeros."""
    sent = gradients[0].new_zeros((grid.count, sum(each)))
    for index, parts in enumerate(sent):
        for grad, part in zip(gradients, torch.split(parts, list(each)), strict=True):
            theirs = grad[grid.rows(grad.shape[0], index)]
            part[: theirs.numel()].copy_(theirs.reshape(-1))
    return sent.view(-1)


@torch.no_grad()
def hand_out(tensors: Sequence[tuple[Tensor, int]], grid: Grid) -> None:
    """Overwrite each whole tensor with its owner's, in place."""
    works = [dist.broadcast(plain, group=grid.shards, group_src=owner, async_op=True) for plain, owner in tensors]
    for work in works:
        work.wait()


def rows_sizes(tensors: Sequence[Tensor], grid: Grid) -> list[int]:
    """Values of the largest share of each tensor's rows, which every rank sends of it: the last may have fewer rows."""
    return [-(-t.shape[0] // grid.count) * (t.numel() // max(t.shape[0], 1)) for t in tensors]


@torch.no_grad()
def gather_rows(tensors: list[Tensor], grid: Grid, bucket_bytes: int) -> None:
    """Overwrite in each whole tensor the rows of other ranks with theirs.

    Several tensors travel together, in buffers of about `bucket_bytes` (one of this rank's rows besides), or of one
    tensor's size where that is larger.
    """
    bucket: list[Tensor] = []
    for tensor in tensors:
        if bucket and (tensor.dtype != bucket[0].dtype or sum(t.nbytes for t in (*bucket, tensor)) > bucket_bytes):
            _gather_bucket(bucket, grid)
            bucket = []
        bucket.append(tensor)
    if bucket:
        _gather_bucket(bucket, grid)


def _gather_bucket(tensors: list[Tensor], grid: Grid) -> None:
    each = rows_sizes(tensors, grid)
    sent = tensors[0].new_empty(sum(each))
    for tensor, part in zip(tensors, torch.split(sent, each), strict=True):
        mine = own_rows(tensor, grid)
        part[: mine.numel()].copy_(mine.reshape(-1))  # the last ranks may have fewer rows; what is behind is not read
    received = sent.new_empty(grid.count * sent.numel())
    all_gather(received, sent, group=grid.shards)
    for index, parts in enumerate(received.view(grid.count, -1)):
        if index == grid.index:
            continue
        for tensor, part in zip(tensors, torch.split(parts, each), strict=True):
            theirs = tensor[grid.rows(tensor.shape[0], index)]
            theirs.copy_(part[: theirs.numel()].view(theirs.shape))
