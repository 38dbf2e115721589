"""Every change a checkpoint makes to the disk, one small function each.

Nothing else in this package creates, writes, renames or deletes, torch's own checkpoint writer included (see
`storage.py`). So a test can stop, or fail, a save at each of its file operations by replacing the names in PRIMITIVES.
"""

import errno
import fcntl
import os
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PRIMITIVES = (
    "open_lock", "make_folder", "create", "write", "sync", "close", "sync_folder", "rename", "unlink", "remove_folder",
)  # fmt: skip

LOCK_NAME = ".lock"
_LOCK_POLL_SECONDS = 0.1


def make_folder(path: Path) -> None:
    os.mkdir(path)


def create(path: Path) -> int:
    """Open a file that must not exist yet; return its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)


def write(fd: int, data: memoryview) -> None:
    """Write all of `data` (bytes, one dim)."""
    while data:
        data = data[os.write(fd, data) :]


def sync(fd: int) -> None:
    os.fsync(fd)


def close(fd: int) -> None:
    os.close(fd)


def sync_folder(path: Path) -> None:
    """Make the entries of a folder (files created, renamed, deleted in it) survive a power cut."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def rename(source: Path, target: Path) -> None:
    """Rename atomically. A file at `target` is replaced; a folder there must be empty or the call fails."""
    os.rename(source, target)


def unlink(path: Path) -> None:
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """Remove an empty folder."""
    os.rmdir(path)


def open_lock(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)


def make_folders(path: Path) -> None:
    """Make `path` and its missing parents, each entry synced."""
    if path.is_dir():
        return
    make_folders(path.parent)
    try:
        make_folder(path)
    except FileExistsError:
        if not path.is_dir():  # else another process was quicker
            raise
    sync_folder(path.parent)


def write_file(path: Path, data: bytes) -> None:
    """Write a new file and sync it. Its folder entry is not synced."""
    fd = create(path)
    try:
        write(fd, memoryview(data))
        sync(fd)
    finally:
        close(fd)


def replace_file(path: Path, data: bytes) -> None:
    """Give `path` new content such that a reader, and a power cut, find the old or the new, whole."""
    aside = path.with_name(f"{path.name}.tmp-{uuid.uuid4().hex}")
    try:
        write_file(aside, data)
        rename(aside, path)
    except OSError:
        remove_tree(aside)
        raise
    sync_folder(path.parent)


def remove_tree(path: Path) -> None:
    """Delete a file, link or folder with all it holds, if it is there. Links are not followed."""
    if path.is_dir() and not path.is_symlink():
        for entry in sorted(path.iterdir()):
            remove_tree(entry)
        remove_folder(path)
    elif path.is_symlink() or path.exists():
        unlink(path)


@contextmanager
def locked(folder: Path, wait_seconds: float) -> Iterator[bool]:
    """Keep other processes from saving into `folder` meanwhile; the kernel frees the lock if we are killed.

    Yields:
        False where the file system has no locks (some network ones): then nobody can be sure to be alone.

    Raises:
        BlockingIOError: another process still holds the lock after `wait_seconds`.
    """
    fd = open_lock(folder / LOCK_NAME)
    try:
        yield _lock(fd, wait_seconds)
    finally:
        os.close(fd)


def _lock(fd: int, wait_seconds: float) -> bool:
    deadline = time.monotonic() + wait_seconds
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                raise
            time.sleep(_LOCK_POLL_SECONDS)
        except OSError as e:
            if e.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                raise
            return False
