"""ZeRO stage 0: every rank holds all weights; gradients are summed as backward produces them (DDP)."""

import inspect
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import GradBucket
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from parallel.config import ParallelConfig
from parallel.launch import World
from parallel.spread import Spread, stored

# Renamed in torch 2.13. Buffers are constants of the model (rotary frequencies), equal everywhere from the start.
OPTIONS = inspect.signature(DistributedDataParallel.__init__).parameters
BUFFER_SYNC = "forward_sync_buffers" if "forward_sync_buffers" in OPTIONS else "broadcast_buffers"


def sum_gradients(group: dist.ProcessGroup | None, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    """Sum a bucket over the ranks. DDP's own hook averages, but our losses are already divided by the global count."""
    work = dist.all_reduce(bucket.buffer(), group=group, async_op=True)
    summed: torch.futures.Future[Tensor] = work.get_future().then(lambda done: done.value()[0])
    return summed


class Replicas(Spread):
    """Every rank holds rank 0's weights; gradients are summed in buckets, which `.grad` views."""

    def __init__(self, model: nn.Module, world: World, cfg: ParallelConfig) -> None:
        super().__init__(model)
        self._world, self._bucket_mib = world, cfg.bucket_mib
        # DDP would send weights made of others (codes and scales) by their values, and round them again.
        coded = any(is_traceable_wrapper_subclass(p) for p in model.parameters())
        if coded:
            send_weights(model, world)
        self._wrap(agree=not (coded or is_fake(model)))

    def renew(self) -> None:
        self._wrap(agree=False)

    def _wrap(self, *, agree: bool) -> None:
        """Make the buckets; `agree` takes over rank 0's weights."""
        world = self._world
        wrapped = DistributedDataParallel(
            self.owner,
            device_ids=[world.device.index] if world.device.type == "cuda" else None,
            **{BUFFER_SYNC: False},  # type: ignore[arg-type]
            gradient_as_bucket_view=True,
            bucket_cap_mb=self._bucket_mib,
            process_group=world.gradients,
            init_sync=agree,
        )
        self._sum_in(wrapped)
        self.model: DistributedDataParallel = wrapped

    def _sum_in(self, wrapped: DistributedDataParallel) -> None:
        """Say how the buckets of `wrapped` are summed."""
        wrapped.register_comm_hook(self._world.gradients, sum_gradients)

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Sum over the ranks in the `last` micro-step alone."""
        return nullcontext() if last else self.model.no_sync()


class SameWeights(Spread):
    """Every rank begins with rank 0's weights; whoever updates sums the gradients itself (`optim.in_backward`)."""

    def __init__(self, model: nn.Module, world: World) -> None:
        super().__init__(model)
        send_weights(model, world)


def send_weights(model: nn.Module, world: World) -> None:
    """Give every rank rank 0's weights, as they are stored."""
    if is_fake(model):
        return
    for parameter in model.parameters():
        for plain in stored(parameter.detach()):
            dist.broadcast(plain, group=world.gradients, group_src=0)


def is_fake(model: nn.Module) -> bool:
    """Whether the weights are pretended and have no values to agree on."""
    return any(isinstance(plain, FakeTensor) for plain in stored(next(model.parameters())))
