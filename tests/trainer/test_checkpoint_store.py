"""What a checkpoint gives back, what stays in the folder, and what the user is told."""

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from trainer.checkpoint import CheckpointSaveError, CheckpointStore, TensorInfo, store
from trainer.errors import UserError


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "checkpoints"


def open_store(folder: Path, keep: int = 0, warnings: list[str] | None = None) -> CheckpointStore:
    told = [] if warnings is None else warnings
    return CheckpointStore(folder, keep=keep, verify=True, warn=told.append)


def tensors_of(seed: int) -> dict[str, Any]:
    return {"weight": torch.full((3, 5), float(seed))}


def value_of(checkpoint: Any) -> float:
    loaded = {"weight": torch.zeros(3, 5)}
    checkpoint.load(loaded)
    return float(loaded["weight"][0, 0])


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {".lock", "latest"}


def bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def test_every_dtype_and_shape_comes_back_bit_by_bit_in_place(folder: Path) -> None:
    generator = torch.Generator().manual_seed(1)
    torch.rand(7, generator=generator)
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.uint8, torch.int32]
    dtypes += [torch.int64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64]
    raw = torch.randint(0, 2, (1000,), dtype=torch.uint8, generator=generator)
    saved: dict[str, torch.Tensor] = {}
    for dtype in dtypes:
        for shape in ((), (1,), (7, 3), (0, 4), (2, 1, 5)):
            count = torch.Size(shape).numel() * dtype.itemsize
            saved[f"{dtype}.{shape}".replace("torch.", "")] = raw[:count].clone().view(dtype).reshape(shape)
    saved["nan with a payload"] = torch.tensor([0x7FC12345, -0x400001], dtype=torch.int32).view(torch.float32)
    saved["transposed"] = torch.arange(12.0).reshape(3, 4).t()
    saved["part of a larger storage"] = torch.arange(100.0)[10:20:2]
    saved["rng/0/cpu"] = generator.get_state()
    saved["needs a gradient"] = torch.nn.Parameter(torch.rand(4))
    found = open_store(folder).open(open_store(folder).save(12, {"of": saved}, {}))
    assert found.names() == {f"of.{name}": TensorInfo(tuple(t.shape), t.dtype) for name, t in saved.items()}
    with torch.no_grad():
        target = {name: torch.empty_like(t).zero_() for name, t in saved.items()}
    target["part of a larger storage"] = torch.zeros(50)[5:25:4]
    places = {name: t.data_ptr() for name, t in target.items()}
    found.load({"of": target})
    for name, tensor in saved.items():
        assert bits(target[name].detach()) == bits(tensor.detach()), name
        assert target[name].data_ptr() == places[name], f"{name} was not loaded in place"
    other = torch.Generator()
    other.set_state(target["rng/0/cpu"])
    assert torch.equal(torch.rand(5, generator=other), torch.rand(5, generator=generator))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_tensors_on_cuda_come_back_bit_by_bit_in_place(folder: Path) -> None:
    saved = {f"{i}": torch.randn(300 + i, 1000, device="cuda") for i in range(20)}
    saved |= {"bf16": torch.randn(7, 3, device="cuda").bfloat16().t(), "rng/0/cuda": torch.cuda.get_rng_state()}
    found = open_store(folder).open(open_store(folder).save(1, saved, {}))
    target = {name: torch.zeros_like(tensor) for name, tensor in saved.items()}
    found.load(target)
    assert all(torch.equal(target[name], tensor) for name, tensor in saved.items())


def test_meta_comes_back_equal(folder: Path) -> None:
    meta = {"step": 10**12, "loss": 0.1 + 0.2, "tiny": 5e-324, "best": float("-inf"), "none": None, "on": True}
    meta |= {"name": 'ä "quoted"\n', "nested": {"list": [1, 2.5, "x", {"a": []}]}, "empty": {}}
    found = open_store(folder).open(open_store(folder).save(3, {}, meta))
    assert found.meta == meta
    assert (found.step, found.world_size, found.libraries["torch"]) == (3, 1, torch.__version__)
    open_store(folder).save(4, {}, {"loss": float("nan")})
    newest = open_store(folder).newest()
    assert newest is not None and newest.meta["loss"] != newest.meta["loss"]


@pytest.mark.parametrize(
    ("tensors", "meta", "message"),
    [
        ({}, {"shape": (1, 2)}, "meta.shape is a tuple"),
        ({}, {"a": {3: 1}}, "meta.a: the key 3 is no string"),
        ({}, {"a": [torch.tensor(1)]}, r"meta.a\[0\] is a Tensor"),
        ({"a": {"step": 3}}, {}, "a.step is a int; a checkpoint takes tensors"),
    ],
)
def test_what_would_not_come_back_equal_is_not_saved(
    tensors: dict[str, Any], meta: dict[str, Any], message: str, folder: Path
) -> None:
    with pytest.raises(TypeError, match=message):
        open_store(folder).save(1, tensors, meta)
    assert not folder.exists()


def test_two_tensors_of_one_name_are_not_saved(folder: Path) -> None:
    with pytest.raises(ValueError, match="two tensors of the checkpoint are called a.b"):
        open_store(folder).save(1, {"a": {"b": torch.zeros(1)}, "a.b": torch.zeros(1)}, {})


def test_torchs_own_tools_open_the_folder(folder: Path, tmp_path: Path) -> None:
    path = open_store(folder).save(1, {"model": tensors_of(4)}, {})
    dcp_to_torch_save(path, tmp_path / "all.pt")
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert torch.equal(loaded["model.weight"], tensors_of(4)["weight"])


def test_saving_the_same_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    paths = [open_store(each).save(1, tensors_of(1), {"a": 1}) for each in (folder, tmp_path / "other")]
    assert sorted(p.name for p in paths[0].iterdir()) == [".metadata", "__0_0.distcp", "manifest.json"]
    for file in paths[0].iterdir():
        assert file.read_bytes() == (paths[1] / file.name).read_bytes(), file.name


@pytest.mark.parametrize(
    ("keep", "left"), [(0, [5, 10, 15, 20]), (1, [20]), (2, [15, 20]), (3, [10, 15, 20]), (9, [5, 10, 15, 20])]
)
def test_keep_leaves_that_many_newest(keep: int, left: list[int], folder: Path) -> None:
    for step in (5, 10, 15, 20):
        open_store(folder, keep).save(step, tensors_of(step), {})
    assert names_in(folder) == {f"step_{step:08d}" for step in left}
    assert (folder / "latest").read_text() == "step_00000020\n"


def test_newest_is_by_number_beyond_eight_digits(folder: Path) -> None:
    for step in (99_999_999, 100_000_000, 7):
        open_store(folder).save(step, tensors_of(1), {})
    assert names_in(folder) == {"step_99999999.old-1", "step_100000000.old-1", "step_00000007"}
    assert open_store(folder).open(folder / "step_100000000.old-1").step == 100_000_000
    open_store(folder).save(99_999_999, tensors_of(1), {})
    open_store(folder).save(100_000_000, tensors_of(1), {})
    newest = open_store(folder).newest()
    assert newest is not None and newest.step == 100_000_000


def test_saving_a_step_again_with_the_same_content_keeps_the_published_one(folder: Path) -> None:
    path = open_store(folder).save(5, tensors_of(1), {"a": 1})
    before = path.stat().st_ino
    warnings: list[str] = []
    assert open_store(folder, warnings=warnings).save(5, tensors_of(1), {"a": 1}) == path
    assert path.stat().st_ino == before and names_in(folder) == {"step_00000005"} and not warnings


def test_saving_a_step_again_with_other_content_sets_the_published_one_aside(folder: Path) -> None:
    warnings: list[str] = []
    saving = open_store(folder, 2, warnings)
    for seed in (1, 2, 3):
        saving.save(5, tensors_of(seed), {})
    assert names_in(folder) == {"step_00000005", "step_00000005.old-1", "step_00000005.old-2"}
    assert "step_00000005 was of a run that went on differently; it is now step_00000005.old-2" in warnings[1]
    newest = saving.newest()
    assert newest is not None and value_of(newest) == 3
    assert value_of(saving.open(folder / "step_00000005.old-1")) == 1
    saving.save(6, tensors_of(6), {})
    assert "step_00000005.old-1" in names_in(folder), "its step is still kept"
    saving.save(7, tensors_of(7), {})
    assert names_in(folder) == {"step_00000006", "step_00000007"}


def test_a_damaged_published_step_is_replaced_when_saved_again(folder: Path) -> None:
    path = open_store(folder).save(5, tensors_of(1), {})
    (path / "__0_0.distcp").write_bytes(bytes((path / "__0_0.distcp").stat().st_size))
    open_store(folder).save(5, tensors_of(1), {})
    newest = open_store(folder).newest()
    assert newest is not None and value_of(newest) == 1
    assert names_in(folder) == {"step_00000005", "step_00000005.old-1"}


def test_going_on_from_an_older_checkpoint_never_prunes_or_prefers_what_is_newer(folder: Path) -> None:
    """Else the save just made would be pruned as the oldest, and the next resume take the other run's."""
    for step in (50, 100, 150):
        open_store(folder, 3).save(step, tensors_of(step), {})
    saving = open_store(folder, 2)
    assert value_of(saving.open(folder / "step_00000050")) == 50
    saving.save(60, tensors_of(60), {})
    assert names_in(folder) == {"step_00000050", "step_00000060", "step_00000100.old-1", "step_00000150.old-1"}
    newest = saving.newest()
    assert newest is not None and value_of(newest) == 60


def test_what_was_set_aside_is_used_when_nothing_else_verifies(folder: Path) -> None:
    for seed in (1, 2):
        open_store(folder).save(5, tensors_of(seed), {})
    (folder / "step_00000005" / "manifest.json").unlink()
    newest = open_store(folder).newest()
    assert newest is not None and value_of(newest) == 1 and newest.path.name == "step_00000005.old-1"


def test_a_checkpoint_of_another_model_is_one_message_and_changes_no_tensor(folder: Path) -> None:
    weights = {f"layers.{i}.weight": torch.ones(4, 4) for i in range(9)}
    path = open_store(folder).save(1, {"model": weights, "rng/1/cpu": torch.zeros(3)}, {})
    asked = {f"layers.{i}.weight": torch.zeros(4, 4) for i in range(2)}
    asked |= {"layers.2.weight": torch.zeros(4, 5), "layers.3.weight": torch.zeros(4, 4, dtype=torch.bfloat16)}
    asked |= {"layers.9.weight": torch.zeros(2)}
    with pytest.raises(UserError) as error:
        open_store(folder).open(path).load({"model": asked})
    assert str(error.value) == (
        f"{path} is a checkpoint of another model or optimizer than this run's; 8 tensors differ.\n"
        "  model.layers.2.weight: asked (4, 5) float32, found (4, 4) float32\n"
        "  model.layers.3.weight: asked (4, 4) bfloat16, found (4, 4) float32\n"
        "  model.layers.9.weight: asked (2,) float32, not in the checkpoint\n"
        "  model.layers.4.weight: not asked for, found (4, 4) float32\n"
        "  model.layers.5.weight: not asked for, found (4, 4) float32\n"
        "  model.layers.6.weight: not asked for, found (4, 4) float32\n"
        "  and 2 more\n"
        "Go on with the configuration it was saved with (config.yaml in its run folder), or start anew in another "
        "folder: train.resume=never run.dir=NEW_FOLDER."
    )
    assert not any(tensor.any() for tensor in asked.values())


def test_a_part_can_be_loaded_by_saying_what_is_left(folder: Path) -> None:
    path = open_store(folder).save(1, {"model": tensors_of(2), "optim": tensors_of(3)}, {})
    target = {"model": {"weight": torch.zeros(3, 5)}}
    open_store(folder).open(path).load(target, leave=("optim.*",))
    assert torch.equal(target["model"]["weight"], tensors_of(2)["weight"])


def test_newest_of_no_folder_or_an_empty_one_is_none_without_a_word(folder: Path) -> None:
    warnings: list[str] = []
    assert open_store(folder, warnings=warnings).newest() is None
    assert not folder.parent.exists(), "looking makes no folder"
    open_store(folder).check_writable()
    assert open_store(folder, warnings=warnings).newest() is None
    assert not warnings


def test_open_says_what_was_asked_what_is_wrong_and_what_there_is(folder: Path) -> None:
    open_store(folder).save(5, tensors_of(1), {})
    for path in (folder / "step_00000006", folder):
        with pytest.raises(UserError) as error:
            open_store(folder).open(path)
        assert f"{path} can't be used as a checkpoint: manifest.json: missing" in str(error.value)
        assert str(folder / "step_00000005") in str(error.value) and "train.resume=auto" in str(error.value)
    assert names_in(folder) == {"step_00000005"}, "open renames nothing"


def test_check_writable_finds_a_folder_that_cannot_be_written(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder.parent.parent.mkdir(exist_ok=True)
    folder.parent.write_text("a file where the folder should be")
    with pytest.raises(UserError, match="can't be written to .*checkpoints: File exists .*/run.*run.dir=PATH"):
        open_store(folder).check_writable()
    folder.parent.unlink()

    def refuse(path: Path, data: bytes) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.files.write_file", refuse)
        with pytest.raises(UserError, match="checkpoints: Permission denied .*run.dir=PATH"):
            open_store(folder).check_writable()
    open_store(folder).check_writable()
    assert names_in(folder) == set()


LEFTOVERS = [f"step_00000007.tmp-{'a' * 32}", f".trash-{'b' * 32}", f"latest.tmp-{'c' * 32}", f".probe-{'d' * 32}"]


def leave_litter(folder: Path) -> None:
    for name in LEFTOVERS:
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_text("x")


@pytest.mark.parametrize("by", ["check_writable", "save"])
def test_what_killed_saves_left_is_deleted_at_the_next_start(by: str, folder: Path) -> None:
    leave_litter(folder)
    (folder / "step_00000007.tmp-mine").mkdir()
    assert open_store(folder).newest() is None
    assert names_in(folder) == {*LEFTOVERS, "step_00000007.tmp-mine"}, "a reader deletes nothing"
    if by == "save":
        open_store(folder).save(1, {}, {})
    else:
        open_store(folder).check_writable()
    assert names_in(folder) - {"step_00000001"} == {"step_00000007.tmp-mine"}


def test_while_another_process_saves_nothing_of_it_is_deleted(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leave_litter(folder)
    open_store(folder).save(1, tensors_of(1), {})
    leave_litter(folder)
    warnings: list[str] = []
    with open(folder / ".lock") as other:  # locks belong to the open file: this is as good as another process
        fcntl.flock(other, fcntl.LOCK_EX)
        open_store(folder, warnings=warnings).check_writable()
        assert set(LEFTOVERS) <= names_in(folder)
        assert "another process is saving" in warnings[0]
        monkeypatch.setattr(store, "_LOCK_SECONDS", 0.05)
        with pytest.raises(CheckpointSaveError, match="step 2 was not saved: another process is saving there"):
            open_store(folder).save(2, tensors_of(2), {})
        assert set(LEFTOVERS) <= names_in(folder)
        newest = open_store(folder).newest()
        assert newest is not None and newest.step == 1
    open_store(folder).save(2, tensors_of(2), {})
    assert names_in(folder) == {"step_00000001", "step_00000002"}


def test_on_a_file_system_without_locks_saves_work_and_leftovers_stay(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave_litter(folder)

    def no_locks(fd: int, how: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", no_locks)
    open_store(folder).check_writable()
    open_store(folder).save(1, tensors_of(1), {})
    assert names_in(folder) == {*LEFTOVERS, "step_00000001"}, "another process may be using them"


def test_an_interrupt_during_a_save_leaves_no_litter(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_store(folder).save(1, tensors_of(1), {})

    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("trainer.checkpoint.files.sync", interrupt)
        with pytest.raises(KeyboardInterrupt):
            open_store(folder).save(2, tensors_of(2), {})
    assert names_in(folder) == {"step_00000001"}
