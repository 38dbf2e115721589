"""What is left when a save is killed, or fails, at any of its file operations."""

import errno
import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from offload.snapshot import Snapshots
from trainer.checkpoint import CheckpointSaveError, CheckpointStore, Saving, files
from trainer.checkpoint.checkpoint import flatten
from trainer.checkpoint.files import PRIMITIVES


def tensors_of(seed: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(24, 16, generator=generator)
    return {"model": {"weight": weight}, "rng/0/cpu": generator.get_state(), "seed": torch.tensor(seed)}


def store_at(folder: Path, keep: int = 1) -> CheckpointStore:
    return CheckpointStore(folder, keep=keep, verify=True, warn=lambda text: None)


def seed_of_newest(folder: Path) -> int | None:
    """Which tensors the newest checkpoint holds, every one of them compared bit by bit."""
    found = store_at(folder).newest()
    if found is None:
        return None
    loaded = {name: torch.zeros(info.shape, dtype=info.dtype) for name, info in found.names().items()}
    found.load(loaded)
    seed = int(loaded["seed"])
    expected = tensors_of(seed)
    assert found.meta == {"seed": seed} and found.step == seed // 10
    assert torch.equal(loaded["model.weight"], expected["model"]["weight"])
    assert torch.equal(loaded["rng/0/cpu"], expected["rng/0/cpu"])
    return seed


def save(folder: Path, seed: int, keep: int = 1, mode: str = "sync") -> Path:
    """Save checkpoint `seed`: its step is a tenth, so that one step can be saved with different content."""
    return save_in(store_at(folder, keep), mode, seed // 10, tensors_of(seed), {"seed": seed})


def save_in(store: CheckpointStore, mode: str, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> Path:
    """Save as a run does in this mode, its weights changed as soon as they may be."""
    if mode == "sync":
        return store.save(step, tensors, meta)
    flat = flatten(tensors)
    values = list(flat.values())
    saving = Saving(store, step, flat, meta, Snapshots(torch.device("cpu")).now(), torch.device("cpu"))
    saving.wait()
    for value in values:
        value.zero_()
    return saving.result()


class Tracer:
    """Counts the file operations of a save, notes them, and interferes with one.

    Args:
        interfere: called with (operation's number, name, arguments, the real one) in place of the real one.
        journal: descriptor to which every finished operation is written, so that it outlives a SIGKILL.
    """

    def __init__(self, interfere: Callable[[int, str, tuple[Any, ...], Callable[..., Any]], Any], journal: int = -1):
        self.names: list[str] = []
        self.inside = False
        self._paths: dict[int, str] = {}
        self._interfere = interfere
        self._journal = journal

    def wrap(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*args: Any) -> Any:
            self.names.append(name)
            self.inside = True
            try:
                result = self._interfere(len(self.names) - 1, name, args, real)
            finally:
                self.inside = False
            self._note(name, args, result)
            return result

        return operation

    def _note(self, name: str, args: tuple[Any, ...], result: Any) -> None:
        if name == "create":
            self._paths[result] = str(args[0])
        paths = [self._paths[args[0]]] if name in ("write", "sync", "close") else [str(path) for path in args]
        if self._journal >= 0:
            os.write(self._journal, (json.dumps([name, *paths]) + "\n").encode())


def call(number: int, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
    return real(*args)


def operations_of(work: Callable[[], Any], monkeypatch: pytest.MonkeyPatch) -> list[str]:
    tracer = Tracer(call)
    with monkeypatch.context() as patch:
        for name in PRIMITIVES:
            patch.setattr(files, name, tracer.wrap(name, getattr(files, name)))
        work()
    return tracer.names


def run_and_kill(work: Callable[[], Any], at: int, half: bool, journal_path: Path, leave_out: str = "") -> bool:
    """Run `work` in a fork, killed before operation `at` (`half`: half-way through a write).

    Args:
        leave_out: an operation that isn't done at all.

    Returns:
        Whether it got as far as being killed.
    """
    journal = os.open(journal_path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)

    def kill(number: int, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        if number == at:
            if half:
                real(args[0], args[1][: len(args[1]) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*args)

    child = os.fork()
    if child == 0:
        try:
            tracer = Tracer(kill, journal)
            for name in PRIMITIVES:
                setattr(files, name, tracer.wrap(name, getattr(files, name)))
            if leave_out:
                setattr(files, leave_out, lambda *args: None)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(journal)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status) or os.WEXITSTATUS(status) == 0, "the save itself failed"
    return os.WIFSIGNALED(status)


def lose_unsynced_data(events: list[list[str]]) -> None:
    """A power cut that keeps names but not contents: what was written since a file's last sync is gone."""
    for i, (name, *paths) in enumerate(events):
        if name == "write" and ["sync", paths[0]] not in events[i:]:
            now = path_now(paths[0], events[i:])
            if now.is_file():
                now.write_bytes(b"\0" * (now.stat().st_size // 2))


def lose_unsynced_entries(events: list[list[str]]) -> None:
    """A power cut that keeps contents but not names: entries of folders not synced since are as before."""
    for i in reversed(range(len(events))):
        name, *paths = events[i]
        if (
            name not in ("create", "make_folder", "rename")
            or ["sync_folder", str(Path(paths[-1]).parent)] in events[i:]
        ):
            continue
        now = path_now(paths[-1], events[i + 1 :])
        if name == "rename" and now.exists() and not Path(paths[0]).exists():
            now.rename(paths[0])
            events[i] = ["nothing"]
        elif name != "rename":
            shutil.rmtree(now) if now.is_dir() else now.unlink(missing_ok=True)


def path_now(path: str, later: list[list[str]]) -> Path:
    for name, *paths in later:
        if name == "rename" and (path == paths[0] or path.startswith(paths[0] + "/")):
            path = paths[1] + path[len(paths[0]) :]
    return Path(path)


LOSSES = {"killed": lambda events: None, "data": lose_unsynced_data, "entries": lose_unsynced_entries}

# name: (saved before, with keep=0), (the save that is killed, keep), what may be there afterwards
SCENARIOS = {
    "first": ([], (10, 1), {None, 10}),
    "prunes_the_one_before": ([10], (20, 1), {10, 20}),
    "prunes_two": ([10, 20, 30], (40, 2), {30, 40}),
    "same_step_only_one": ([10], (11, 1), {10, 11}),
    "same_step_one_before": ([10, 20], (21, 2), {10, 20, 21}),
    "same_step_same_content": ([10, 20], (20, 2), {20}),
    "went_on_from_an_older_one": ([10, 20, 30], (21, 2), {10, 20, 21, 30}),
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Power cuts are simulated, so nothing waits for the disk; one thread, so that forking is safe."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


BESIDE = [pytest.param(name, "lazy", marks=[] if name == "first" else [pytest.mark.slow]) for name in SCENARIOS]
"""Killed in the thread that writes while training goes on: the file operations of async and lazy are the same."""


@pytest.mark.parametrize(("scenario", "mode"), [*((name, "sync") for name in SCENARIOS), *BESIDE])
def test_a_save_killed_at_any_file_operation_leaves_the_new_or_the_previous_checkpoint(
    scenario: str, mode: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before, (seed, keep), allowed = SCENARIOS[scenario]
    start, folder, journal = tmp_path / "start", tmp_path / "now", tmp_path / "journal"
    start.mkdir()
    for earlier in before:
        save(start, earlier, keep=0)
    shutil.copytree(start, folder)
    names = operations_of(lambda: save(folder, seed, keep, mode), monkeypatch)
    assert len(names) > 20
    kills = [(i, False) for i in range(len(names) + 1)] + [(i, True) for i, n in enumerate(names) if n == "write"]
    for at, half in kills:
        for loss, lose in LOSSES.items():
            where = f"{loss} at operation {at} of {len(names)} ({names[at] if at < len(names) else 'end'}), {half=}"
            if loss == "killed":
                reset(start, folder)
                killed = run_and_kill(lambda: save(folder, seed, keep, mode), at, half, journal)
                assert killed == (at < len(names)), where
                events = [json.loads(line) for line in journal.read_text().splitlines()]
                shutil.copytree(folder, tmp_path / "killed", symlinks=True)
            else:
                reset(tmp_path / "killed", folder)
                lose(list(events))
            found = seed_of_newest(folder)
            assert found in (allowed if killed else {seed}), where
            assert scenario == "same_step_same_content" or (found == seed) == is_published(folder, seed, events, loss)
            if before and loss != "entries":  # our power cut can't bring a replaced file back
                hints = {f"step_{each // 10:08d}\n" for each in (before[-1], seed)}
                assert (folder / "latest").read_text() in hints, where
            if loss == "killed":
                save(folder, 90, keep)
                assert seed_of_newest(folder) == 90, where
                assert not [p.name for p in folder.iterdir() if ".tmp-" in p.name or ".trash-" in p.name], where
        shutil.rmtree(tmp_path / "killed")


def is_published(folder: Path, seed: int, events: list[list[str]], loss: str) -> bool:
    """Whether the new checkpoint must be there: its name was given, and survived."""
    final = str(folder / f"step_{seed // 10:08d}")
    given = [i for i, (name, *paths) in enumerate(events) if name == "rename" and paths[1] == final]
    return bool(given) and (loss != "entries" or ["sync_folder", str(folder)] in events[given[0] :])


@pytest.mark.parametrize(("leave_out", "loss"), [("sync", "data"), ("sync_folder", "entries")])
def test_a_power_cut_would_lose_the_checkpoint_if_syncing_were_left_out(
    leave_out: str, loss: str, tmp_path: Path
) -> None:
    for operation, expected in (("", 10), (leave_out, None)):
        folder = tmp_path / f"without_{operation}"
        folder.mkdir()
        assert not run_and_kill(lambda f=folder: save(f, 10), 10**6, False, tmp_path / "journal", operation)
        LOSSES[loss]([json.loads(line) for line in (tmp_path / "journal").read_text().splitlines()])
        assert seed_of_newest(folder) == expected


def test_every_change_to_the_disk_goes_through_the_listed_operations(tmp_path: Path) -> None:
    """Otherwise the tests here would miss where a save can be interrupted: torch's writer is included."""
    store_at(tmp_path).check_writable()
    save(tmp_path, 10)
    child = os.fork()
    if child == 0:  # an audit hook can't be taken away again
        tracer = Tracer(call)
        for name in PRIMITIVES:
            setattr(files, name, tracer.wrap(name, getattr(files, name)))
        seen, outside = [], []

        def audit(event: str, args: tuple[Any, ...]) -> None:
            changing = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")
            writing = event == "open" and args[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            if (writing or event in changing) and str(args[0]).startswith(str(tmp_path)):
                (seen if tracer.inside else outside).append((event, args))

        sys.addaudithook(audit)
        save(tmp_path, 20)
        store_at(tmp_path).newest()
        os._exit(0 if len(seen) > 10 and not outside else 1)
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk_full", "io_error"])
@pytest.mark.parametrize("half", [False, True], ids=["at_once", "half_way"])
@pytest.mark.parametrize("seed", [30, 21], ids=["next_step", "same_step"])
@pytest.mark.parametrize("mode", ["sync", pytest.param("lazy", marks=pytest.mark.slow)])
def test_a_failing_file_operation_leaves_older_checkpoints_and_no_litter(
    mode: str, seed: int, half: bool, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start, folder = tmp_path / "start", tmp_path / "now"
    for earlier in (10, 20):
        save(start, earlier, keep=0)
    shutil.copytree(start, folder)
    names = operations_of(lambda: save(folder, seed, keep=2), monkeypatch)
    raised = 0
    for at, name in enumerate(names):
        if half and name != "write":
            continue

        def fail(number: int, name: str, args: tuple[Any, ...], real: Callable[..., Any], at: int = at) -> Any:
            if number != at:
                return real(*args)
            if half:
                real(args[0], args[1][: len(args[1]) // 2])
            if name == "close":
                real(*args)
            raise OSError(code, os.strerror(code))

        reset(start, folder)
        tracer, warnings = Tracer(fail), []
        store = CheckpointStore(folder, keep=2, verify=True, warn=warnings.append)
        with monkeypatch.context() as patch:
            for each in PRIMITIVES:
                patch.setattr(files, each, tracer.wrap(each, getattr(files, each)))
            try:
                save_in(store, mode, seed // 10, tensors_of(seed), {"seed": seed})
                saved = True
            except CheckpointSaveError as error:
                saved = False
                raised += 1
                assert f"step {seed // 10} was not saved: {os.strerror(code)}" in str(error) and error.errno == code
                assert "run.dir" in str(error) and ("MiB are free" in str(error)) == (code == errno.ENOSPC)
        where = f"{name} at {at} of {len(names)}"
        there = {path.name for path in folder.iterdir()}
        assert not [name for name in there if ".tmp-" in name], where
        if saved:
            assert os.strerror(code) in warnings[-1], f"{where}: an error that nobody was told"
            assert seed_of_newest(folder) == seed, where
        elif seed_of_newest(folder) != seed:  # else what failed came after the rename: there, but not surely durable
            assert there == {".lock", "latest", "step_00000001", "step_00000002"}, where
            assert seed_of_newest(folder) == 20, where
        save(folder, 40, keep=1)
        assert seed_of_newest(folder) == 40
        assert {p.name for p in folder.iterdir()} == {".lock", "latest", "step_00000004"}, where
    assert raised > len([n for n in names if not half or n == "write"]) // 3


def test_a_published_name_is_synced_before_anything_older_is_deleted(tmp_path: Path, monkeypatch: Any) -> None:
    save(tmp_path, 10)
    order: list[str] = []

    def note(number: int, name: str, args: tuple[Any, ...], real: Callable[..., Any]) -> Any:
        order.append(" ".join([name, *(Path(arg).name for arg in args if isinstance(arg, Path))]))
        return real(*args)

    tracer = Tracer(note)
    with monkeypatch.context() as patch:
        for name in PRIMITIVES:
            patch.setattr(files, name, tracer.wrap(name, getattr(files, name)))
        save(tmp_path, 20)
    published = next(i for i, each in enumerate(order) if each.startswith("rename") and each.endswith(" step_00000002"))
    assert order[published + 1] == f"sync_folder {tmp_path.name}"
    assert not [each for each in order[:published] if each.split()[0] in ("unlink", "remove_folder")]


def test_a_disk_that_gives_back_other_bytes_is_noticed_before_the_older_checkpoint_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 10)

    def decay(fd: int, data: memoryview, real: Callable[[int, memoryview], None] = files.write) -> None:
        real(fd, memoryview(bytes(data).replace(b"archive/data", b"archive/dada")))

    monkeypatch.setattr(files, "write", decay)
    with pytest.raises(CheckpointSaveError, match="gives back other bytes than were written .__0_0.distcp: SHA-256"):
        save(tmp_path, 20)
    assert seed_of_newest(tmp_path) == 10


def reset(source: Path, target: Path) -> None:
    shutil.rmtree(target)
    shutil.copytree(source, target)
