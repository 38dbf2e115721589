"""Saved by two gloo processes, loaded by one, two and three; an error on one rank is an error on all.

The cases run in one set of three processes, started once (starting is what takes the time): each case is a function
named `case_*`, called on every process with its rank in the world and a folder of its own.
"""

import errno
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from tests.ranks import fork_server
from trainer.checkpoint import CheckpointSaveError, CheckpointStore, files
from trainer.errors import UserError

WORLD = 3
Groups = dict[int, dist.ProcessGroup]

whole = torch.arange(7 * 4, dtype=torch.float32).reshape(7, 4)  # 7 rows: uneven over 2 and over 3


def store_of(folder: Path, group: dist.ProcessGroup, warnings: list[str] | None = None, keep: int = 0) -> Any:
    return CheckpointStore(
        folder, keep=keep, verify=True, group=group, warn=[].append if warnings is None else warnings.append
    )


def tensors_on(rank: int) -> dict[str, Any]:
    return {
        "model": {f"layer.{i}": torch.full((40, 30), float(i)) for i in range(6)},
        f"rng/{rank}/cpu": torch.Generator().manual_seed(rank).get_state(),
    }


def case_save_on_two_load_on_one_two_and_three(rank: int, folder: Path, groups: Groups) -> None:
    if rank < 2:
        path = store_of(folder, groups[2]).save(4, tensors_on(rank), {"tokens": 99})
        sizes = [(path / f"__{r}_0.distcp").stat().st_size for r in (0, 1)]
        assert min(sizes) > 0.4 * max(sizes), f"replicated tensors are written once, by both in turn: {sizes}"
    dist.barrier()
    for size, group in groups.items():
        if rank >= size:
            continue
        found = store_of(folder, group).newest()
        assert found.world_size == 2 and found.meta == {"tokens": 99}
        asked = {"model": {f"layer.{i}": torch.zeros(40, 30) for i in range(6)}}
        name = f"rng/{rank}/cpu"
        assert (name in found.names()) == (rank < 2)
        if rank < 2:
            asked[name] = torch.zeros_like(torch.get_rng_state())
        found.load(asked)
        assert all(torch.equal(asked["model"][name], t) for name, t in tensors_on(rank)["model"].items())
        assert rank == 2 or torch.equal(asked[name], tensors_on(rank)[name])


def case_dtensors_are_resharded(rank: int, folder: Path, groups: Groups) -> None:
    meshes = {size: DeviceMesh("cpu", list(range(size))) for size in groups}
    if rank < 2:
        weight = distribute_tensor(whole, meshes[2], [Shard(0)])
        copied = distribute_tensor(whole + 1, meshes[2], [Replicate()])
        store_of(folder, groups[2]).save(1, {"sharded": weight, "copied": copied}, {})
    dist.barrier()
    for size, group in groups.items():
        if rank >= size:
            continue
        found = store_of(folder, group).newest()
        assert found.names()["sharded"].shape == (7, 4), "the global shape"
        for placement in (Shard(0), Shard(1), Replicate()):
            asked = {n: distribute_tensor(torch.zeros(7, 4), meshes[size], [placement]) for n in ("sharded", "copied")}
            found.load(asked)
            assert isinstance(asked["sharded"], DTensor)
            assert torch.equal(asked["sharded"].full_tensor(), whole)
            assert torch.equal(asked["copied"].full_tensor(), whole + 1)
        plain = {"sharded": torch.zeros(7, 4), "copied": torch.zeros(7, 4)}
        found.load(plain)
        assert torch.equal(plain["sharded"], whole)


def case_an_error_on_one_rank_is_raised_on_all(rank: int, folder: Path, groups: Groups) -> None:
    store = store_of(folder, groups[3])
    store.save(1, tensors_on(rank), {})
    for broken in range(WORLD):
        for name in ("create", "write", "sync", "close"):
            real = getattr(files, name)

            def fail(*args: Any) -> None:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

            if rank == broken:
                setattr(files, name, fail)
            try:
                store.save(2, tensors_on(rank), {})
            except CheckpointSaveError as e:
                assert e.errno == errno.ENOSPC and "step 2 was not saved: No space left on device" in str(e), str(e)
            else:
                raise AssertionError(f"rank {rank} did not hear of {name} failing on rank {broken}")
            finally:
                setattr(files, name, real)
            if rank == 0:  # which deletes the unfinished folder
                assert {p.name for p in folder.iterdir()} == {".lock", "latest", "step_00000001"}
            assert store.newest().step == 1
    store.save(2, tensors_on(rank), {})
    assert store.newest().step == 2


def case_wrong_tensors_on_one_rank_are_refused_on_all(rank: int, folder: Path, groups: Groups) -> None:
    store = store_of(folder, groups[3])
    wrong: Any = {"a": "text"} if rank == 1 else {"a": torch.zeros(1)}
    expect(TypeError if rank == 1 else RuntimeError, "a is a str", lambda: store.save(1, wrong, {}))
    store.save(1, {"a": torch.ones(2), "b": torch.ones(2)}, {})
    asked = {"a": torch.zeros(3 if rank == 2 else 2), "b": torch.zeros(2)}
    expect(UserError, "a: asked .3,. float32, found .2,. float32", lambda: store.newest().load(asked))
    assert not asked["a"].any() and not asked["b"].any(), "no rank's tensors were changed"
    expect(UserError, "b: not asked for", lambda: store.newest().load({"a": torch.zeros(2)}))
    store.newest().load({"b": torch.zeros(2)} if rank == 2 else {"a": torch.zeros(2)})  # together they ask for all


def case_all_ranks_fall_back_to_the_same_checkpoint(rank: int, folder: Path, groups: Groups) -> None:
    warnings: list[str] = []
    store = store_of(folder, groups[3], warnings, keep=3)
    for step in (1, 2, 3):
        path = store.save(step, {"a": torch.full((3,), float(step)), **tensors_on(rank)}, {})
    if rank == 0:
        for damaged, size in ((path / "__2_0.distcp", 10), (path.with_name("step_00000002") / "__1_0.distcp", 20)):
            os.truncate(damaged, size)
    dist.barrier()
    expect(UserError, "__2_0.distcp: 10 bytes instead of", lambda: store.open(path))
    found = store.newest()
    asked = {"a": torch.zeros(3)}
    found.load(asked, leave=("*",))
    assert found.step == 1 and asked["a"][0] == 1
    if rank == 0:
        assert "__2_0.distcp: 10 bytes" in warnings[0] and "__1_0.distcp: 20 bytes" in warnings[1]
        assert (folder / "step_00000003.bad-1").exists() and (folder / "step_00000002.bad-1").exists()
    else:
        assert not warnings


def case_a_folder_that_ranks_do_not_share_is_found(rank: int, folder: Path, groups: Groups) -> None:
    store_of(folder, groups[3]).check_writable()
    assert [p.name for p in folder.iterdir() if p.name.startswith(".probe")] == []
    dist.barrier()
    own = folder / f"node{rank}"
    expect(UserError, "what rank 0 writes there isn't seen by rank 1", store_of(own, groups[3]).check_writable)


def case_several_processes_without_their_group_are_refused(rank: int, folder: Path, groups: Groups) -> None:
    expect(ValueError, "checkpoints of 3 processes need their gloo group", lambda: store_of(folder, None))


def expect(kind: type[BaseException], text: str, work: Callable[[], Any]) -> None:
    with pytest.raises(kind, match=text):
        work()


CASES = {name.removeprefix("case_"): value for name, value in list(globals().items()) if name.startswith("case_")}


def process(rank: int, tmp: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{tmp}/rendezvous", rank=rank, world_size=WORLD)
    groups = {1: dist.new_group([0]), 2: dist.new_group([0, 1]), 3: dist.new_group([0, 1, 2])}
    files.os.fsync = lambda fd: None  # type: ignore[assignment]
    for name, case in CASES.items():
        outcome = Path(tmp) / f"{name}.{rank}"
        try:
            case(rank, Path(tmp) / "folders" / name, groups)
            outcome.write_text("ok")
        except BaseException:
            outcome.write_text(traceback.format_exc())
            break  # the others may now wait for us; they end with this process
        dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may wait for a process that broke off


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tmp = tmp_path_factory.mktemp("ranks")
    context = fork_server()
    processes = [context.Process(target=process, args=(rank, str(tmp))) for rank in range(WORLD)]
    for each in processes:
        each.start()
    deadline = time.monotonic() + 240
    for each in processes:
        each.join(timeout=max(0.0, deadline - time.monotonic()))
        each.kill()
    return tmp


@pytest.mark.parametrize("case", CASES)
def test_on_several_processes(case: str, outcomes: Path) -> None:
    for rank in range(WORLD):
        file = outcomes / f"{case}.{rank}"
        outcome = (
            file.read_text() if file.exists() else "did not finish: it waited for a rank, or an earlier case broke"
        )
        assert outcome == "ok", f"rank {rank}: {outcome}"
