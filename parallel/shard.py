"""ZeRO stages 2 and 3: weights, gradients and states cut into rows, by torch's FSDP2.

Blocks, embedding and head are gathered and reduced each as a unit; what is left (the last norm, a tied embedding) is
one more. Gradients are added up in fp32 at least, and summed, never averaged.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

from parallel.config import Accumulate, ParallelConfig
from parallel.dtensor import local
from parallel.mesh import Grid
from parallel.spread import Spread


class Shards(Spread):
    """Each rank holds rows of every parameter, as DTensors; they take the place of the model's own.

    A model may come without storage (on the meta device), each parameter with this rank's rows as attribute `rows`.

    Args:
        blocks: the layers of the model, in the order they run.
        ends: embedding and head, if they share no weight.
        compute: dtype of gathered weights in blocks and head; None: as stored. The embedding is gathered as stored, so
            that the residual stream keeps its precision.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        ends: Sequence[nn.Module],
        cfg: ParallelConfig,
        grid: Grid,
        compute: torch.dtype | None = None,
    ) -> None:
        drawn = take_rows(model)
        reduce = torch.promote_types(next(model.parameters()).dtype, torch.float32)
        stored = MixedPrecisionPolicy(reduce_dtype=reduce, cast_forward_inputs=False)
        cast = MixedPrecisionPolicy(param_dtype=compute, reduce_dtype=reduce, cast_forward_inputs=False)
        again = cfg.zero == 3
        for block in blocks:
            fully_shard(block, mesh=grid.mesh, mp_policy=cast, reshard_after_forward=again)
        for module in ends:
            embeds = isinstance(module, nn.Embedding)
            # A head's backward follows its forward at once: resharding it in between would gather it twice for nothing.
            fully_shard(
                module, mesh=grid.mesh, mp_policy=stored if embeds else cast, reshard_after_forward=again and embeds
            )
            if embeds:
                module.set_unshard_in_backward(False)  # type: ignore[operator]  # its gradient needs no weight
        fully_shard(model, mesh=grid.mesh, mp_policy=stored, reshard_after_forward=False)
        if drawn:
            put_rows(model, drawn, grid)
        for unit in units(model):
            unit.set_gradient_divide_factor(1.0)
            unit.set_force_sum_reduction_for_comms(True)  # else gloo is asked for a scaled sum, which it lacks
        super().__init__(model)
        self.grid = grid
        self._root: FSDPModule = model  # type: ignore[assignment]
        self._local = cfg.accumulate is Accumulate.local
        self._kept = not again
        self._replicas = cfg.replicas > 1

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        if self._kept:  # no weight changes between micro-steps, so stage 2 gathers once for all of them
            self._root.set_reshard_after_backward(last)
        if self._local:
            self._root.set_requires_gradient_sync(last)
        elif self._replicas:
            self._root.set_requires_all_reduce(last)
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        return [local(p.grad) for p in self.trainable.values() if p.grad is not None]

    def whole_norms(self, norms: Tensor) -> Tensor:
        squares = norms.square()
        dist.all_reduce(squares, group=self.grid.shards)
        return squares.sqrt()


def units(model: nn.Module) -> list[FSDPModule]:
    """Modules whose parameters are gathered together; none where the model is not sharded."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def take_rows(model: nn.Module) -> dict[str, Tensor]:
    """Take from parameters that have no storage the rows they carry as attribute `rows`."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            found[name] = parameter.rows  # type: ignore[attr-defined]
            del parameter.rows  # type: ignore[attr-defined]
    return found


def put_rows(model: nn.Module, drawn: dict[str, Tensor], grid: Grid) -> None:
    """Make each sharded parameter of no storage one of the rows drawn for it."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}

    def put(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor
        return grid.wrap(drawn.pop(names[id(tensor)]), tensor.shape)

    model._apply(put)  # type: ignore[no-untyped-call]  # FSDP2 takes note of what comes through here, as from `to_empty`


def reshard(model: nn.Module) -> None:
    """Free the weights gathered for a forward that no backward follows."""
    for unit in units(model):
        unit.reshard()
