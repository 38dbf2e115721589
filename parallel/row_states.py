"""ZeRO stage 1: whole weights and gradients on every rank, optimizer states for a share of the rows.

Gradients add up in DDP's buckets; in the last micro-step each bucket is reduced and scattered, and a rank is left with
the sums of its own rows (what it holds of the other rows is its own share of them, which nobody reads). The optimizer
steps DTensors, each this rank's rows of a weight, in the weight's own storage; then the ranks gather each other's rows.
So a rank sends the model's bytes twice a step, as DDP does. A weight's states are laid out as FSDP2 would have them,
and a checkpoint does not know the difference.

Owners of whole matrices would send as much of gradients and weights, and save what a low-rank method sends beside them
(`optim/subspace.py`: r values a row or column of a matrix, or nothing with `basis_copies`). Elementwise methods save
nothing by them, and one large embedding would unbalance the ranks: rows it is, for all.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel

from parallel.config import ParallelConfig
from parallel.dtensor import all_gather, reduce_scatter
from parallel.launch import World
from parallel.mesh import REPLICATE, Grid
from parallel.replicate import Replicas
from parallel.spread import norms_of, stored

MIB = 2**20


class RowStates(Replicas):
    def __init__(self, model: nn.Module, world: World, cfg: ParallelConfig, grid: Grid) -> None:
        self.grid = grid
        super().__init__(model, world, cfg)
        self.bucket_bytes = cfg.bucket_mib * MIB
        self.rows = {
            name: nn.Parameter(grid.wrap(own_rows(p.detach(), grid), p.shape))
            for name, p in self.trainable.items()
            if p.dim()  # a scalar has no rows: every rank steps it
        }

    def _sum_in(self, wrapped: DistributedDataParallel) -> None:
        wrapped.register_comm_hook(self.grid, sum_own_rows)

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, self.rows.get(name, p)) for name, p in self.owner.named_parameters()]

    def gradients(self) -> list[Tensor]:
        return [own_rows(grad, self.grid) if grad.dim() else grad for grad in super().gradients()]

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
        weights = [self.trainable[name].detach() for name, rows in self.rows.items() if rows.grad is not None]
        stepped = [plain for weight in weights for plain in stored(weight)]
        gather_rows(sorted(stepped, key=lambda plain: str(plain.dtype)), self.grid, self.bucket_bytes)
        for rows in self.rows.values():
            rows.grad = None


def own_rows(tensor: Tensor, grid: Grid) -> Tensor:
    """View of this rank's rows of a whole tensor."""
    return tensor[grid.rows(tensor.shape[0])]


def sum_own_rows(grid: Grid, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum over the ranks this rank's rows of each gradient of a bucket, and whole those that have no rows.

    What is sent is a copy of the bucket, its rows in the order of the ranks that own them. On CUDA, backward runs on
    meanwhile; host memory has no streams that would bound how many copies wait.
    """
    buffer, gradients = bucket.buffer(), bucket.gradients()
    scalars, cut = [g for g in gradients if not g.dim()], [g for g in gradients if g.dim()]
    each = rows_sizes(cut, grid)
    sent = buffer.new_zeros((grid.count, sum(each)))
    for index, parts in enumerate(sent):
        for grad, part in zip(cut, torch.split(parts, each), strict=True):
            theirs = grad[grid.rows(grad.shape[0], index)]
            part[: theirs.numel()].copy_(theirs.reshape(-1))
    summed = sent.new_empty(sum(each))

    def take(_: object = None) -> Tensor:
        if summed.is_cuda and not isinstance(summed, FakeTensor):
            summed.record_stream(torch.cuda.current_stream())  # that of the future, not the one it was made on
        for grad, part in zip(cut, torch.split(summed, each), strict=True):
            mine = own_rows(grad, grid)
            mine.copy_(part[: mine.numel()].view(mine.shape))
        return buffer

    work = reduce_scatter(summed, sent.view(-1), group=grid.shards, async_op=True)
    alone = grid.mesh.ndim == 1 and not scalars
    if buffer.is_cuda and alone:
        taken: torch.futures.Future[Tensor] = work.get_future().then(take)
        return taken
    work.wait()
    if grid.mesh.ndim > 1:
        dist.all_reduce(summed, group=grid.mesh.get_group(REPLICATE))
    for grad in scalars:
        for axis in range(grid.mesh.ndim):
            dist.all_reduce(grad, group=grid.mesh.get_group(axis))
    done: torch.futures.Future[Tensor] = torch.futures.Future()
    done.set_result(take())
    return done


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
