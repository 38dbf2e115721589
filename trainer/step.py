"""What one optimizer step is: micro-batches forward and backward, one agreed decision, one update."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optim.schedule import multiplier
from parallel.collectives import any_rank
from trainer.build import Trainable
from trainer.data.batch import Batch, StepBatch
from trainer.loss import token_loss_sum
from trainer.precision import autocast


@dataclass(frozen=True)
class Stepped:
    """What came of a step."""

    loss: Tensor
    """This rank's share of the loss, fp32 or fp64 on the device: summed over ranks, the mean over targets."""
    norm: float
    """Global gradient norm before clipping."""
    applied: bool
    """False where a non-finite loss or gradient on any rank made all ranks skip the update."""
    stop: int
    """The signal any rank received, 0 without one."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a host batch to `device`."""
    if device.type == "cpu":
        return batch
    ids, labels, positions = (
        tensor.to(device, non_blocking=True) for tensor in (batch.input_ids, batch.labels, batch.position_ids)
    )
    return Batch(ids, labels, positions)


def micro_step(built: Trainable, batch: Batch, targets: int, last: bool) -> Tensor:
    """Forward and backward of one micro-batch; returns its share of the step's loss."""
    meter = built.meter
    with built.engine.accumulating(last):
        with meter.phase("forward"):
            with autocast(built.cfg.precision, built.world.device):
                # no attention_mask and no cache: transformers then keeps packed documents apart by their positions
                logits = built.engine.model(
                    input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
                ).logits
            loss = token_loss_sum(logits, batch.labels) / targets
        del logits  # else the logits of the forward would outlive their use in backward
        with meter.phase("backward"):
            built.engine.backward(loss)
    return loss.detach()


def read_both(norm: Tensor, loss: Tensor, usual: tuple[float, float]) -> tuple[float, float]:
    """Read two scalars at once; fake ones have no values, and a predicted step goes on with the `usual` ones."""
    both = torch.stack([norm, loss])
    if isinstance(both, FakeTensor):
        return usual
    first, second = both.tolist()
    return first, second


def train_step(built: Trainable, batch: StepBatch, step: int, stop: int) -> Stepped:
    """Take step number `step` (from 0).

    The loss is divided by the target count of the whole global batch before backward: a mean of means would weight
    short rows more, and differ between accumulation settings and rank counts.

    Args:
        stop: signal this rank has received; every rank learns of it in the same step.
    """
    cfg, engine, meter = built.cfg, built.engine, built.meter
    targets = max(batch.targets, 1)
    total = torch.zeros((), device=built.world.device)
    for index, micro in enumerate(batch.micros):
        moved = to_device(micro, built.world.device)
        total = total + micro_step(built, moved, targets, last=index == len(batch.micros) - 1)
    with meter.phase("clip"):
        norm = engine.gradient_norm()
        # The one device-to-host read of a step: the weights must not change before the numbers are known to be sound.
        norm_value, loss_value = read_both(norm.to(total.dtype), total, usual=(2 * cfg.train.clip_norm, 1.0))
        unsound = not (math.isfinite(norm_value) and math.isfinite(loss_value))
        unsound_anywhere, stop = any_rank(built.world, int(unsound), stop)
        if not unsound_anywhere and 0 < cfg.train.clip_norm < norm_value:
            engine.clip(cfg.train.clip_norm, norm)
    if not unsound_anywhere:
        with meter.phase("step"):
            engine.update(multiplier(cfg.schedule, step, cfg.train.steps))
    engine.clear_gradients()
    return Stepped(total, norm_value, not unsound_anywhere, stop)
