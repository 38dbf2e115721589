"""ZeRO stage 1: whole weights and gradients on every rank, optimizer states for a share of the rows.

Gradients are summed as without sharding (DDP). The optimizer steps DTensors, each this rank's rows of a weight, in the
weight's own storage; then the ranks gather each other's rows. A weight's states are thus laid out as FSDP2 would have
them, and a checkpoint does not know the difference.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from parallel.config import ParallelConfig
from parallel.launch import World
from parallel.mesh import Grid
from parallel.replicate import Replicas
from parallel.spread import stored

MIB = 2**20

all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class RowStates(Replicas):
    def __init__(self, model: nn.Module, world: World, cfg: ParallelConfig, grid: Grid) -> None:
        super().__init__(model, world, cfg)
        self.grid = grid
        self.bucket_bytes = cfg.bucket_mib * MIB
        self.rows = {
            name: nn.Parameter(grid.wrap(own_rows(p.detach(), grid), p.shape))
            for name, p in self.trainable.items()
            if p.dim()  # a scalar has no rows: every rank steps it
        }

    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, self.rows.get(name, p)) for name, p in self.owner.named_parameters()]

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
    each = [-(-t.shape[0] // grid.count) * (t.numel() // max(t.shape[0], 1)) for t in tensors]
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
