"""What one optimizer step is: micro-batches forward and backward, one agreed decision, one update."""

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from optim.base import read
from optim.in_backward import InBackward
from optim.schedule import multiplier, scale_rates
from parallel.collectives import any_rank
from parallel.shard import reshard
from trainer.build import Trainable
from trainer.data.batch import Batch, StepBatch
from trainer.memory import format_bytes
from trainer.precision import autocast
from trainer.schema import ClipBy
from trainer.sequence import own_part


@dataclass(frozen=True)
class Stepped:
    """What came of a step."""

    loss: Tensor
    """This rank's share of the loss, fp32 or fp64 on the device: summed over ranks, the mean over targets."""
    norm: float | None
    """Global gradient norm before clipping; None where an update in backward has seen only projections of some."""
    applied: bool
    """False where a non-finite loss or gradient on any rank made all ranks skip the update, or parts of it."""
    stop: int
    """The signal any rank received, 0 without one."""
    left_out: tuple[str, ...] = ()
    """Parameters that an update in backward left out, as their gradients were not finite, while others stepped."""


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy a host batch to `device`."""
    if device.type == "cpu":
        return batch
    ids, labels, positions = (
        tensor.to(device, non_blocking=True) for tensor in (batch.input_ids, batch.labels, batch.position_ids)
    )
    return Batch(ids, labels, positions, share=batch.share)


def placed(built: Trainable, micro: Batch) -> Batch:
    """This rank's part of a micro-batch, on its device."""
    return to_device(own_part(micro, built.strategy), built.world.device)


def forward(built: Trainable, batch: Batch, targets: int) -> Tensor:
    """Return a micro-batch's share of the step's loss."""
    with built.meter.phase("forward"), autocast(built.cfg.precision, built.world.device):
        # no attention_mask and no cache: transformers then keeps packed documents apart by their positions
        run = partial(
            built.engine.model, input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False,
            **batch.extra,
        )  # fmt: skip
        return built.loss(run, batch.labels) / targets


def backward(built: Trainable, loss: Tensor) -> None:
    with built.meter.phase("backward"):
        built.engine.backward(loss)


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
    if built.in_backward is not None:
        return step_in_backward(built, built.in_backward, batch, step, stop)
    return step_at_once(built, batch, step, stop)


def step_at_once(built: Trainable, batch: StepBatch, step: int, stop: int) -> Stepped:
    """Make all gradients, decide, update."""
    cfg, engine, meter = built.cfg, built.engine, built.meter
    targets = max(batch.targets, 1)
    total = torch.zeros((), device=built.world.device)
    for index, micro in enumerate(batch.micros):
        with engine.accumulating(last=index == len(batch.micros) - 1):
            loss = forward(built, placed(built, micro), targets)
            backward(built, loss)
        total = total + loss.detach()
    with meter.phase("clip"):
        norm = engine.gradient_norm()
        # The one device-to-host read of a step: the weights must not change before the numbers are known to be sound.
        norm_value, loss_value = read_both(norm.to(total.dtype), total, usual=(2 * cfg.train.clip_norm, 1.0))
        unsound = not (math.isfinite(norm_value) and math.isfinite(loss_value))
        unsound_anywhere, stop = any_rank(built.world, int(unsound), stop)
        if not unsound_anywhere and 0 < cfg.train.clip_norm < norm_value:  # which no single norm exceeds
            if cfg.train.clip_by is ClipBy["parameter"]:
                engine.clip_each(cfg.train.clip_norm)
            else:
                engine.clip(cfg.train.clip_norm, norm)
    if not unsound_anywhere:
        built.gate.open()
        with meter.phase("step"):
            engine.update(multiplier(cfg.schedule, step, cfg.train.steps))
    engine.clear_gradients()
    return Stepped(total, norm_value, not unsound_anywhere, stop)


def step_in_backward(built: Trainable, updates: InBackward, batch: StepBatch, step: int, stop: int) -> Stepped:
    """Update while backward runs (`optim/in_backward.py`). What can be known is decided before the last backward.

    A loss that is not finite on any rank leaves the whole step out, and so does, with `two_pass`, a gradient that is
    not finite. Otherwise such a gradient is found when others have stepped already: it alone is left out, and named.
    """
    cfg, device = built.cfg, built.world.device
    targets = max(batch.targets, 1)
    total = torch.zeros((), device=device)
    for micro in batch.micros[:-1]:
        with built.engine.accumulating(last=False):
            loss = forward(built, placed(built, micro), targets)
            with updates.keep():
                backward(built, loss)
        total = total + loss.detach()
    last = placed(built, batch.micros[-1])
    with built.engine.accumulating(last=True):
        measured = measured_norm(built, updates, last, targets) if cfg.train.clip_by is ClipBy["two_pass"] else None
        loss = forward(built, last, targets)
        total = total + loss.detach()
        unsound = not (math.isfinite(measured or 0.0) and math.isfinite(read(total, usual=1.0)))
        unsound_anywhere, stop = any_rank(built.world, int(unsound), stop)
        if unsound_anywhere:
            updates.drop()
            reshard(built.model)  # no backward does it
            return Stepped(total, measured, False, stop)
        scale_rates(built.optimizer, multiplier(cfg.schedule, step, cfg.train.steps))
        with updates.update(built.gate.open) as found:
            backward(built, loss)
    norm = found.norm if measured is None else measured
    return Stepped(total, norm, not found.left_out, stop, tuple(found.left_out))


def measured_norm(built: Trainable, updates: InBackward, batch: Batch, targets: int) -> float:
    """Run forward and backward for the global norm of the gradients alone. Random numbers are drawn again later."""
    device = built.world.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []), updates.measure() as found:
        backward(built, forward(built, batch, targets))
    assert found.norm is not None, "a measuring pass sees whole gradients"
    return found.norm


def kept_notes(built: Trainable) -> list[str]:
    """Say what gradients take between the micro-steps of an update in backward, if there are several."""
    rows = built.cfg.train.global_batch // built.world.data_count
    micro_steps = rows // built.cfg.train.micro_batch
    if built.in_backward is None or micro_steps == 1:
        return []
    projected, whole = built.in_backward.kept_bytes()
    text = f"optim.in_backward with {micro_steps} micro-steps: between them "
    if projected:
        text += f"{format_bytes(projected)} of projected gradients (whole ones in steps that refresh a basis) and "
    text += f"{format_bytes(whole)} of whole gradients add up"
    if built.in_backward.needs_whole:
        text += f"; train.clip_by={built.cfg.train.clip_by.value} needs the norms of whole ones"
    return [text]
