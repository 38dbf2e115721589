"""A checkpoint goes on at another rank count and another stage of ZeRO, as if nothing had happened."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.launch import connected
from tests.parallel.sharded import BASE, make, on_each_rank, step_batch, train_each, whole
from trainer.checkpoint.store import CheckpointStore
from trainer.cli.compose import load
from trainer.state import restore, run_tensors
from trainer.step import train_step

STEPS = 2
Chain = list[tuple[int, int, list[str]]]
CHAIN: Chain = [(1, 0, []), (2, 3, []), (3, 1, []), (1, 0, [])]
LONG: Chain = [(1, 0, []), (2, 1, []), (4, 3, ["parallel.replicas=2"]), (4, 3, []), (3, 2, []), (1, 0, [])]
"""Ranks, stage and more options of each part of a run. 36, 16 and 8 rows do not all split over 3 ranks."""


def named(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Weights and states, whole: random number generators are each rank's own."""
    return {name: whole(tensor) for name, tensor in tensors.items() if not name.startswith("rng/")}


def go_on(folder: Path, overrides: list[str], begin: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Load what `folder` holds, if anything; train some steps; save. Returns what was loaded and what was saved."""
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        store = CheckpointStore(folder, keep=0, verify=True, group=world.control)
        built = make(overrides, world)
        rank, device = world.process_rank, world.device
        checkpoint = store.newest()
        if checkpoint is not None:
            assert checkpoint.step == begin
            restore(checkpoint, built.engine, seed=0, rank=rank, device=device)
        loaded = named(built.engine.tensors())
        for step in range(begin, begin + STEPS):
            assert train_step(built, step_batch(built.cfg, world, step), step, stop=0).applied
        meta = {"optimizer_numbers": built.engine.numbers()}
        store.save(begin + STEPS, run_tensors(built.engine, rank, device), meta)
        return loaded, named(built.engine.tensors())


@pytest.mark.parametrize("optimizer", ["adamw"])
def test_a_run_goes_on_at_another_rank_count_and_stage(optimizer: str, tmp_path: Path) -> None:
    follow(CHAIN, optimizer, tmp_path)


@pytest.mark.slow
def test_a_run_goes_on_at_any_rank_count_and_stage(tmp_path: Path) -> None:
    follow(LONG, "adamw", tmp_path)


def follow(chain: Chain, optimizer: str, folder: Path) -> None:
    """Train part by part, and compare with the same steps in one process without a stop."""
    options = [f"optim={optimizer}", "optim.lr=0.01"]
    (wanted,) = train_each([options], steps=STEPS * len(chain))
    saved: dict[str, Tensor] = {}
    for part, (count, zero, more) in enumerate(chain):
        overrides = [*options, f"parallel.zero={zero}", *more]
        ranks = on_each_rank(count, go_on, folder, overrides, part * STEPS)
        for loaded, _ in ranks:
            assert all(torch.equal(loaded[name], saved[name]) for name in saved), f"part {part}: loaded is not saved"
        saved = ranks[0][1]
    for name, tensor in {**wanted.weights, **wanted.states}.items():
        assert torch.allclose(saved[name], tensor, rtol=1e-9, atol=1e-12), name
