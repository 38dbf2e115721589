"""A tiny LLaMA with grouped queries, trained for a few steps by any engine on rows that any rank count shares out."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from parallel.collectives import sum_over_ranks
from parallel.launch import World
from trainer.build import Trainable, make_trainable
from trainer.checkpoint.store import CheckpointStore
from trainer.cli.compose import load
from trainer.data.batch import Batch, StepBatch
from trainer.model import build_model, model_config
from trainer.state import restore, run_tensors, seed_all
from trainer.step import train_step

LENGTH, VOCABULARY = 16, 64
MODEL = [
    "model.hidden_size=32",
    "model.intermediate_size=52",
    "model.layers=2",
    "model.heads=4",
    "model.kv_heads=2",
    f"model.vocab_size={VOCABULARY}",
    "model.max_length=32",
    f"data.sequence_length={LENGTH}",
    "run.device=cpu",
    "precision=fp32",
    "schedule=constant",
    "train.global_batch=12",
    "train.micro_batch=1",
    "train.clip_norm=0.5",
    "train.steps=20",
]


def trainable(world: World, overrides: Sequence[str]) -> Trainable:
    """The tiny model under the engine and optimizer of `overrides`."""
    cfg = load([*MODEL, *overrides])
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})()
    config = model_config(cfg.model, tokenizer, VOCABULARY)
    model = build_model(cfg.model, config, weights=cfg.precision.weights, device=world.device, seed=0)
    seed_all(cfg.seed, world.process_rank)
    return make_trainable(cfg, world, model)


def step_batch(world: World, micro_batch: int, rows: int, step: int, length: int = LENGTH) -> StepBatch:
    """This rank's rows of step number `step`; a third of the targets is left out, unevenly over the rows."""
    generator = torch.Generator().manual_seed(1000 + step)
    ids = torch.randint(3, VOCABULARY, (rows, length + 1), generator=generator)
    labels = ids[:, 1:].clone()
    labels[torch.rand(labels.shape, generator=generator) < torch.linspace(0, 0.6, rows)[:, None]] = -100
    share = slice(world.data_rank * rows // world.data_count, (world.data_rank + 1) * rows // world.data_count)
    positions = torch.arange(length).expand(rows, length)
    mine = Batch(ids[share, :-1].contiguous(), labels[share].contiguous(), positions[share].contiguous())
    return StepBatch(mine.split(micro_batch), targets=int((labels != -100).sum()), first_sample=0)


def train(world: World, built: Trainable, steps: range) -> list[tuple[float, float, bool]]:
    """Take these steps; of each the loss, the gradient norm, and whether it was applied."""
    found = []
    for step in steps:
        batch = step_batch(world, built.cfg.train.micro_batch, built.cfg.train.global_batch, step)
        stepped = train_step(built, batch, step, 0)
        found.append((sum_over_ranks(world, stepped.loss).item(), stepped.norm, stepped.applied))
    return found


def store(world: World, folder: Path) -> CheckpointStore:
    return CheckpointStore(folder, keep=0, verify=True, group=world.control)


def save(world: World, built: Trainable, folder: Path, step: int) -> None:
    meta = {"optimizer_numbers": built.engine.numbers()}
    store(world, folder).save(step, run_tensors(built.engine, world.process_rank, world.device), meta)


def resume(world: World, built: Trainable, folder: Path, step: int) -> None:
    checkpoint = store(world, folder).open(folder / f"step_{step:08d}")
    restore(checkpoint, built.engine, seed=0, rank=world.process_rank, device=world.device)


def saved(folder: Path, step: int) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Every tensor of a checkpoint, whole, in this process, and the optimizer's numbers."""
    os.environ.setdefault("WORLD_SIZE", "1")
    checkpoint = CheckpointStore(folder, keep=0, verify=True).open(folder / f"step_{step:08d}")
    whole = {
        name: torch.empty(info.shape, dtype=info.dtype)
        for name, info in checkpoint.names().items()
        if not name.startswith("rng/")
    }
    checkpoint.load(whole)
    return whole, checkpoint.meta["optimizer_numbers"]
