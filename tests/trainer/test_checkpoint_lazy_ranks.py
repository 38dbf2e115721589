"""Saves in the background of several ranks: shared out, agreed on, and never waited for in vain."""

import errno
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.snapshot import Snapshots
from parallel.collectives import gather_objects, sum_over_ranks
from parallel.config import ParallelConfig
from parallel.launch import World, another_group, connected
from tests.ranks import on_ranks
from trainer.checkpoint import CheckpointSaveError, CheckpointStore, Saving, files
from trainer.checkpoint.staged import staging_bytes

RANKS = 2
SHAPES = {"model/a": (40, 8), "model/b": (30, 8), "model/c": (7,), "optim/a/step": ()}


def replicas(step: int) -> dict[str, Any]:
    return {name: torch.full(shape, float(step)) for name, shape in SHAPES.items()}


def start(world: World, group: Any, folder: Path, step: int, snapshots: Snapshots) -> tuple[Saving, dict[str, Any]]:
    store = CheckpointStore(folder, keep=0, verify=True, group=group)
    tensors = replicas(step)
    own = {f"rng/{world.process_rank}/cpu": torch.arange(16, dtype=torch.uint8)}
    return Saving(store, step, {**tensors, **own}, {"step": step}, snapshots.now(), world.device), tensors


def shares_and_failures(folder: Path) -> dict[str, Any]:
    """Save twice while this thread sums over the ranks, the second time with a disk that refuses rank 1."""
    files.os.fsync = lambda fd: None  # type: ignore[assignment]
    with connected(ParallelConfig(timeout=60), "cpu", 1) as world:
        group, snapshots = another_group(world, 60), Snapshots(world.device, delay=0.01)
        saving, tensors = start(world, group, folder, 1, snapshots)
        for _ in range(20):  # would meet the save's own collectives, were the group the same
            assert sum_over_ranks(world, torch.ones(3)).tolist() == [2.0] * 3
        saving.wait()
        for tensor in tensors.values():
            tensor.fill_(-1.0)
        saving.result()
        copied = gather_objects(world, snapshots.peak)
        errors = []
        for what in ("write", "copy"):
            with pytest.MonkeyPatch.context() as patch:
                if world.process_rank == 1:
                    refuse_to(what, patch)
                saving, _ = start(world, group, folder, 2, snapshots)
                saving.wait()
                with pytest.raises(CheckpointSaveError) as error:
                    saving.result()
                errors.append(str(error.value))
        saving, _ = start(world, group, folder, 3, snapshots)
        saving.result()
        found = CheckpointStore(folder, keep=0, verify=True, group=world.control).newest()
        assert found is not None and found.step == 3
        first = CheckpointStore(folder, keep=0, verify=True, group=world.control).open(folder / "step_00000001")
        loaded = replicas(0)
        first.load(loaded)
        return {
            "copied": copied,
            "errors": errors,
            "values": {float(x) for tensor in loaded.values() for x in tensor.flatten()},
            "steps": sorted(path.name for path in folder.iterdir() if path.name.startswith("step_")),
        }


def refuse_to(what: str, patch: pytest.MonkeyPatch) -> None:
    def full(fd: int, data: memoryview) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    def no_memory(*_: Any, **__: Any) -> None:
        raise MemoryError

    if what == "write":
        patch.setattr(files, "write", full)
    else:
        patch.setattr("offload.pool.HostPool.take", no_memory)


def test_ranks_share_the_copies_and_learn_of_each_others_failures(tmp_path: Path) -> None:
    found = on_ranks(RANKS, shares_and_failures, tmp_path, timeout=120)
    whole = sum(tensor.nbytes for tensor in replicas(0).values()) + RANKS * 16
    assert sum(found[0]["copied"]) == whole, "what both ranks hold is copied by one of them"
    assert max(found[0]["copied"]) < 0.7 * whole
    for each in found:
        assert each["steps"] == ["step_00000001", "step_00000003"] and each["values"] == {1.0}
        full, memory = each["errors"]
        assert "step 2 was not saved: No space left on device" in full
        assert "step 2 was not saved: no host memory for a copy" in memory and "checkpoint.mode=sync" in memory
    assert "(rank 1)" in found[0]["errors"][0] and "(rank 1)" in found[0]["errors"][1]


def test_what_is_planned_for_a_rank_is_its_share() -> None:
    tensors = {**replicas(0), "rng/0/cpu": torch.zeros(16, dtype=torch.uint8)}
    held = sum(tensor.nbytes for tensor in replicas(0).values())
    assert staging_bytes(tensors, 1) == held + 16
    assert staging_bytes(tensors, 2) == held // 2 + 16
    owned = {"optim/mlp.a/exp_avg": torch.zeros(8), "optim/mlp.b/exp_avg": torch.zeros(8)}
    assert staging_bytes(owned, 4, holders={"mlp.a": 1}) == 32 + 8, "nobody shares what one rank alone has"
    assert staging_bytes(tensors, 1, budget=1500) == 1500
    assert staging_bytes(tensors, 1, budget=100) == 40 * 8 * 4, "a tensor is copied whole"
