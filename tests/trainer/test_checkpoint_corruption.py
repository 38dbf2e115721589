"""Damage of every kind is noticed, the file is named, and the checkpoint before is used."""

import json
import os
import pickle
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.trainer.test_checkpoint_crash import save_in
from trainer.checkpoint import CheckpointStore
from trainer.checkpoint.digest import BLOCK, Hasher
from trainer.checkpoint.manifest import Manifest
from trainer.errors import UserError


def tensors_of(step: int) -> dict[str, Any]:
    return {"weight": torch.full((64, 32), float(step)), "state": torch.arange(500) + step}


def zeros() -> dict[str, Any]:
    return {"weight": torch.zeros(64, 32), "state": torch.zeros(500, dtype=torch.int64)}


class Run:
    """A folder with checkpoints of steps 1 and 2, and what its store says."""

    def __init__(self, folder: Path, mode: str = "sync") -> None:
        self.folder = folder
        self.warnings: list[str] = []
        self.store = CheckpointStore(folder, keep=0, verify=True, warn=self.warnings.append)
        for step in (1, 2):
            self.last = save_in(self.store, mode, step, tensors_of(step), {"loss": 0.5})

    def step_loaded(self) -> int | None:
        found = self.store.newest()
        if found is None:
            return None
        loaded = zeros()
        found.load(loaded)
        assert all(torch.equal(loaded[name], value) for name, value in tensors_of(found.step).items())
        return found.step


@pytest.fixture
def run(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(os, "fsync", lambda fd: None)  # what a power cut does is another file's matter
    return Run(tmp_path / "checkpoints", getattr(request, "param", "sync"))


def flip(path: Path, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


@pytest.mark.parametrize("run", ["sync", "lazy"], indirect=True)
def test_each_of_300_flipped_bits_is_noticed_and_its_file_named(run: Run) -> None:
    paths = sorted(run.last.iterdir())
    assert {path.name for path in paths} == {".metadata", "__0_0.distcp", "manifest.json"}
    draw = random.Random(0)
    for i in range(300):
        path = paths[i % len(paths)]
        bit = draw.randrange(path.stat().st_size * 8)
        flip(path, bit)
        with pytest.raises(UserError) as error:
            run.store.open(run.last)
        assert f"{path.name}: " in str(error.value), f"bit {bit} of {path.name}"
        flip(path, bit)
    assert run.store.open(run.last).step == 2


def test_without_digests_a_flipped_bit_would_load_as_other_numbers(run: Run) -> None:
    data = run.last / "__0_0.distcp"
    flip(data, data.read_bytes().index(torch.tensor(2.0).numpy().tobytes() * 8) * 8 + 8)
    loaded = zeros()
    CheckpointStore(run.folder, keep=0, verify=False).open(run.last).load(loaded)
    assert not torch.equal(loaded["weight"], tensors_of(2)["weight"])
    assert run.step_loaded() == 1


def rewrite_manifest(change: Callable[[dict[str, Any]], Any]) -> Callable[[Run], None]:
    def edit(run: Run) -> None:
        path = run.last / "manifest.json"
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")

    return edit


def truncate(name: str, size: int) -> Callable[[Run], None]:
    return lambda run: os.truncate(run.last / name, size)


def zero(name: str) -> Callable[[Run], None]:
    def inflict(run: Run) -> None:
        path = run.last / name
        path.write_bytes(bytes(path.stat().st_size))

    return inflict


def swap_between_checkpoints(run: Run) -> None:
    one, two = (run.folder / f"step_0000000{step}" / "__0_0.distcp" for step in (1, 2))
    assert one.stat().st_size == two.stat().st_size
    shutil.copy(one, two)


DAMAGE: dict[str, tuple[Callable[[Run], Any], str]] = {
    "data cut short": (truncate("__0_0.distcp", 4000), r"__0_0.distcp: 4000 bytes instead of \d+"),
    "data empty": (truncate("__0_0.distcp", 0), "__0_0.distcp: 0 bytes instead of"),
    "data zeroed": (zero("__0_0.distcp"), "__0_0.distcp: SHA-256 differs from the manifest's .bytes 0 to"),
    "data missing": (lambda run: (run.last / "__0_0.distcp").unlink(), "__0_0.distcp: missing"),
    "data of another step": (swap_between_checkpoints, "__0_0.distcp: SHA-256 differs"),
    "metadata cut short": (truncate(".metadata", 100), ".metadata: 100 bytes instead of"),
    "metadata zeroed": (zero(".metadata"), ".metadata: SHA-256 differs"),
    "metadata missing": (lambda run: (run.last / ".metadata").unlink(), ".metadata: missing"),
    "manifest cut short": (truncate("manifest.json", 200), "manifest.json: no readable manifest"),
    "manifest empty": (truncate("manifest.json", 0), "manifest.json: no readable manifest"),
    "manifest zeroed": (zero("manifest.json"), "manifest.json: no readable manifest"),
    "manifest missing": (lambda run: (run.last / "manifest.json").unlink(), "manifest.json: missing"),
    "manifest no object": (lambda run: (run.last / "manifest.json").write_text("7"), "manifest.json: no readable"),
    "manifest too deep": (lambda run: (run.last / "manifest.json").write_text("[" * 9**6), "manifest.json: no"),
    "another loss": (rewrite_manifest(lambda m: m["meta"].update(loss=0.4)), "manifest.json: altered"),
    "a file left out": (rewrite_manifest(lambda m: m["files"].pop()), "manifest.json: altered"),
    "another spacing": (
        lambda run: (path := run.last / "manifest.json").write_text(path.read_text().replace(": ", ":")),
        "manifest.json: altered",
    ),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_renamed_named_and_the_one_before_used(damage: str, run: Run) -> None:
    inflict, message = DAMAGE[damage]
    inflict(run)
    content = {path.name: path.read_bytes() for path in run.last.iterdir()}
    with pytest.raises(UserError, match=message):
        run.store.open(run.last)
    assert run.step_loaded() == 1
    assert len(run.warnings) == 1
    with pytest.raises(UserError, match=message):
        raise UserError(run.warnings[0])
    assert "renamed to step_00000002.bad-1" in run.warnings[0]
    assert not run.last.exists()
    assert content == {p.name: p.read_bytes() for p in (run.folder / "step_00000002.bad-1").iterdir()}
    run.store.save(2, tensors_of(2), {})
    assert run.step_loaded() == 2


def test_the_damaged_bytes_are_localised_to_four_mebibytes(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    store = CheckpointStore(folder, keep=0, verify=True)
    path = store.save(1, {"weight": torch.zeros(3 * BLOCK // 4)}, {})
    flip(path / "__0_0.distcp", (BLOCK + 5) * 8)
    with pytest.raises(UserError, match=f"bytes {BLOCK} to {2 * BLOCK - 1}[)]"):
        store.open(path)


def test_two_ranks_files_of_equal_size_swapped_are_noticed(run: Run) -> None:
    """As `mv` in a shared folder might: the manifest ties content to name."""
    first, second = run.last / "__0_0.distcp", run.last / "__1_0.distcp"
    second.write_bytes(bytes(reversed(first.read_bytes())))
    manifest = Manifest.from_bytes((run.last / "manifest.json").read_bytes())
    hashers = {path: Hasher() for path in (run.last / ".metadata", first, second)}
    for path, hasher in hashers.items():
        hasher.update(memoryview(path.read_bytes()))
    listed = tuple(hasher.digest(path.name) for path, hasher in hashers.items())
    of_two = Manifest(2, 2, listed, manifest.meta, manifest.libraries)
    (run.last / "manifest.json").write_bytes(of_two.to_bytes())
    assert run.store.open(run.last).world_size == 2
    one, two = first.read_bytes(), second.read_bytes()
    first.write_bytes(two)
    second.write_bytes(one)
    with pytest.raises(UserError, match="__0_0.distcp: SHA-256 differs.*; __1_0.distcp: SHA-256 differs"):
        run.store.open(run.last)


def test_a_checkpoint_of_a_newer_format_is_refused_and_left_alone(run: Run) -> None:
    rewrite_manifest(lambda m: m.update(format=2))(run)
    assert run.step_loaded() == 1
    assert "manifest.json: written in format 2, this version reads up to 1" in run.warnings[0]
    assert run.last.exists()


def test_a_latest_that_is_stale_damaged_or_missing_changes_nothing(run: Run) -> None:
    for content in (b"step_00000001\n", b"step_99999999\n", b"\xff\x00", b"../../etc"):
        (run.folder / "latest").write_bytes(content)
        assert run.step_loaded() == 2
    (run.folder / "latest").unlink()
    assert run.step_loaded() == 2
    assert run.warnings == []


def test_foreign_things_in_the_folder_are_neither_loaded_nor_deleted(run: Run) -> None:
    (run.folder / "step_00000009").mkdir()
    (run.folder / "step_00000009" / "notes.txt").write_text("mine")
    (run.folder / "step_00000008").write_text("a file")
    (run.folder / "step_7").mkdir()
    (run.folder / "best").symlink_to(run.last)
    (run.folder / "mine.tmp-1").mkdir()
    assert run.step_loaded() == 2
    run.store.keep = 1
    for step in (3, 4):
        run.store.save(step, tensors_of(step), {})
    assert (run.folder / "step_00000009.bad-1" / "notes.txt").read_text() == "mine"
    assert (run.folder / "step_00000008.bad-1").read_text() == "a file"
    assert {"step_7", "best", "mine.tmp-1"} <= {path.name for path in run.folder.iterdir()}
    assert run.step_loaded() == 4


def test_a_file_that_cannot_be_read_now_is_no_damage(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A disk that fails for a moment, or a permission taken away: refused, but not renamed."""

    def fail(path: Path, expected: Any, *, from_disk: bool = False) -> None:
        if path.parent == run.last:
            raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr("trainer.checkpoint.digest.difference", fail)
    found = run.store.newest()
    assert found is not None and found.step == 1
    assert "can't be read (Permission denied)" in run.warnings[0] and "left where it is" in run.warnings[0]
    assert run.last.exists()


def test_when_nothing_verifies_newest_says_so(run: Run) -> None:
    for path in run.folder.glob("step_*"):
        (path / "manifest.json").unlink()
    assert run.store.newest() is None
    assert "none of 2 checkpoints can be used" in run.warnings[-1]


def test_a_manifest_that_fits_does_not_make_its_pickle_run(run: Run, tmp_path: Path) -> None:
    """Digests don't stop an attacker; the classes allowed in `.metadata` do."""

    class Attack:
        def __reduce__(self) -> tuple[Any, ...]:
            return os.mkdir, (str(tmp_path / "attacked"),)

    (run.last / ".metadata").write_bytes(pickle.dumps(Attack()))
    hashers = {path: Hasher() for path in (run.last / ".metadata", run.last / "__0_0.distcp")}
    for path, hasher in hashers.items():
        hasher.update(memoryview(path.read_bytes()))
    listed = tuple(hasher.digest(path.name) for path, hasher in hashers.items())
    (run.last / "manifest.json").write_bytes(Manifest(2, 1, listed, {}, {}).to_bytes())
    with pytest.raises(UserError, match="might run a program: posix.mkdir is not part"):
        run.store.open(run.last).names()
    assert not (tmp_path / "attacked").exists()


def test_metadata_changed_after_the_checkpoint_was_opened_is_noticed(run: Run) -> None:
    found = run.store.open(run.last)
    flip(run.last / ".metadata", 80)
    with pytest.raises(UserError, match=".metadata is damaged"):
        found.load(zeros())
