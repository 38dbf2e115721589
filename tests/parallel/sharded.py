"""Train a tiny model as a configuration says, on however many ranks there are, and return what came of it whole."""

import io
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel.launch import World, connected
from tests.ranks import on_ranks
from trainer.build import Trainable, make_trainable
from trainer.cli.compose import load
from trainer.data import IGNORE
from trainer.data.batch import Batch, StepBatch
from trainer.memory.count import StorageCounter
from trainer.model import build_model
from trainer.plan import planned_config
from trainer.state import seed_all
from trainer.step import train_step

VOCABULARY, LENGTH = 259, 16

BASE = [
    "model.hidden_size=16", "model.intermediate_size=36", "model.layers=2", "model.heads=4", "model.kv_heads=2",
    f"model.vocab_size={VOCABULARY}", f"data.sequence_length={LENGTH}", "train.steps=20", "train.global_batch=12",
    "train.micro_batch=1", "train.clip_norm=0.2", "schedule=constant", "optim=adamw", "optim.lr=0.01",
    "precision=fp64", "run.device=cpu", "run.threads=1",
]  # fmt: skip
"""Uneven on purpose: 259, 36 and 16 rows do not all split over 2, 3 or 4 ranks."""


@dataclass
class Outcome:
    """What training left, whole and on every rank the same."""

    losses: list[float]
    norms: list[float]
    first_gradients: dict[str, Tensor]
    weights: dict[str, Tensor]
    states: dict[str, Tensor]
    held: dict[str, int]
    """Bytes on this rank between steps."""
    more: dict[str, Any] = field(default_factory=dict)


def whole(tensor: Tensor) -> Tensor:
    """The global tensor, on every rank."""
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def most_held(work: Callable[[], Any]) -> int:
    """The most bytes alive at once that `work` made."""
    counter = StorageCounter(nn.Linear(1, 1), torch.optim.SGD([torch.zeros(1)]), torch.device("cpu"))
    with counter.counting():
        kept = work()
    del kept
    changes: dict[int, int] = {}
    for record in counter.records:
        if record.born > 0:
            changes[record.born] = changes.get(record.born, 0) + record.size
            if record.died is not None:
                changes[record.died] = changes.get(record.died, 0) - record.size
    held = most = 0
    for at in sorted(changes):
        held += changes[at]
        most = max(most, held)
    return most


def step_batch(cfg: Any, world: World, step: int) -> StepBatch:
    """This rank's rows of a global batch that depends on the step alone; some targets are left out."""
    generator = torch.Generator().manual_seed(step)
    shape = (cfg.train.global_batch, LENGTH)
    ids = torch.randint(0, VOCABULARY, shape, generator=generator)
    labels = torch.where(torch.rand(shape, generator=generator) < 0.2, IGNORE, ids.roll(-1, 1))
    positions = torch.arange(LENGTH).expand(shape)
    share = cfg.train.global_batch // world.process_count
    mine = slice(share * world.process_rank, share * (world.process_rank + 1))
    rows = Batch(ids[mine], labels[mine], positions[mine])
    return StepBatch(rows.split(cfg.train.micro_batch), targets=int((labels != IGNORE).sum()), first_sample=0)


def make(overrides: list[str], world: World) -> Trainable:
    """Build model, optimizer and engine."""
    cfg = load([*BASE, *overrides])
    model = build_model(cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=world.device, seed=0)
    return make_trainable(cfg, world, model)


TORCH = "torch.optim.AdamW"
"""In place of an override: step the same parameters with torch's own AdamW."""


def train(overrides: list[str], world: World, steps: int = 20) -> Outcome:
    """Train from scratch for some steps."""
    built = make([override for override in overrides if override != TORCH], world)
    if TORCH in overrides:
        groups = [{**group, "params": group["params"]} for group in built.optimizer.param_groups]
        kept = ("params", "lr", "betas", "eps", "weight_decay")
        torchs = torch.optim.AdamW([{key: group[key] for key in kept} for group in groups], fused=True)
        built.engine.optimizer = torchs  # type: ignore[attr-defined]
    seed_all(0, world.process_rank)
    losses, norms, first = [], [], {}
    update = built.engine.update

    def noting(multiplier: float) -> None:
        if not first:
            spread = built.engine.spread  # type: ignore[attr-defined]
            spread.before_update()
            first.update({n: whole(p.grad) for n, p in spread.named_parameters() if p.grad is not None})
        update(multiplier)

    built.engine.update = noting  # type: ignore[method-assign]
    for step in range(steps):
        stepped = train_step(built, step_batch(built.cfg, world, step), step, stop=0)
        assert stepped.applied
        losses.append(stepped.loss.item())
        norms.append(stepped.norm)
    tensors = {name: whole(tensor) for name, tensor in built.engine.tensors().items()}
    return Outcome(
        losses, norms, first,
        {name: t for name, t in tensors.items() if name.startswith("model/")},
        {name: t for name, t in tensors.items() if name.startswith("optim/")},
        built.meter.held(),
    )  # fmt: skip


def train_each(cases: list[list[str]], steps: int = 5) -> list[Outcome]:
    """Train every case one after the other in one process group."""
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        return [train(case, world, steps) for case in cases]


def packed(function: Callable[..., Any], *arguments: Any) -> bytes:
    """What a function returns, as bytes: tensors sent as such live in memory that ends with their process."""
    buffer = io.BytesIO()
    torch.save(function(*arguments), buffer)
    return buffer.getvalue()


def on_each_rank(count: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Return what `function` returns on each of `count` ranks, tensors included."""
    found = on_ranks(count, packed, function, *arguments)
    return [torch.load(io.BytesIO(each), weights_only=False) for each in found]
