"""Names in the folder of checkpoints, and what moves between them. Rank 0 alone calls what writes.

step_00000100            published: complete, never written to again
step_00000100.tmp-<id>   being written, or left by a killed save
step_00000100.old-<n>    set aside when the run went on from an older one; a last resort for loading
step_00000100.bad-<n>    damaged; kept for the user to look at
.trash-<id>              being deleted
latest                   name of the newest, a hint for people
.lock                    held by the process that saves or cleans
"""

import os
import re
import uuid
from pathlib import Path

from trainer.checkpoint import files
from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.verify import read_manifest

LATEST = "latest"
_PUBLISHED = re.compile(r"step_(\d{8,})")
_OLD = re.compile(r"step_(\d{8,})\.old-(\d+)")
_LEFTOVER = re.compile(r"(step_\d{8,}\.tmp-|\.trash-|latest\.tmp-|\.probe-)[0-9a-f]{32}")


def step_name(step: int) -> str:
    return f"step_{step:08d}"


def part_name(step: int) -> str:
    """A new name to write the checkpoint of `step` under."""
    return f"{step_name(step)}.tmp-{uuid.uuid4().hex}"


def published(folder: Path) -> list[tuple[int, Path]]:
    """What carries a published checkpoint's name, oldest step first; nothing is said about its content."""
    found = [(_PUBLISHED.fullmatch(path.name), path) for path in _entries(folder)]
    return sorted((int(match[1]), path) for match, path in found if match)


def old_versions(folder: Path) -> list[tuple[int, int, Path]]:
    """What was set aside as (step, n, path), oldest first."""
    found = [(_OLD.fullmatch(path.name), path) for path in _entries(folder)]
    return sorted((int(match[1]), int(match[2]), path) for match, path in found if match)


def candidates(folder: Path) -> list[Path]:
    """What a load may try, best first."""
    return [path for _, path in reversed(published(folder))] + [path for *_, path in reversed(old_versions(folder))]


def move_aside(path: Path, suffix: str) -> Path:
    """Rename `path` to the first free `<path>.<suffix>-<n>`."""
    n = 1
    while os.path.lexists(target := path.with_name(f"{path.name}.{suffix}-{n}")):
        n += 1
    files.rename(path, target)
    return target


def set_aside_from(folder: Path, step: int) -> list[tuple[Path, Path]]:
    """Make way for `step`: set aside what is published of it and of later steps.

    Returns:
        (published name, name now), to be undone by `undo` if the save fails after all.
    """
    moved: list[tuple[Path, Path]] = []
    try:
        for other, path in reversed(published(folder)):
            if other >= step:
                moved.append((path, move_aside(path, "old")))
    except OSError:
        undo(moved)
        raise
    return moved


def undo(moved: list[tuple[Path, Path]]) -> None:
    for path, now in reversed(moved):
        files.rename(now, path)


def prune(folder: Path, step: int, keep: int) -> None:
    """Delete all but the newest `keep` checkpoints up to `step`, which must have been verified; 0 keeps all.

    A folder without a manifest of ours is left alone and doesn't count: it may hold something else.
    """
    if keep == 0:
        return
    ours = [(s, path) for s, path in published(folder) if s <= step and isinstance(read_manifest(path), Manifest)]
    kept, doomed = ours[-keep:], [path for _, path in ours[:-keep]]
    doomed += [path for old, _, path in old_versions(folder) if kept and old < kept[0][0]]
    for path in doomed:
        discard(path)


def discard(path: Path) -> None:
    """Delete such that a crash leaves no half of a checkpoint under its name."""
    trash = path.with_name(f".trash-{uuid.uuid4().hex}")
    files.rename(path, trash)
    files.remove_tree(trash)


def remove_leftovers(folder: Path) -> None:
    """Delete what killed saves left. The caller holds the folder's lock, so nobody is using them."""
    for path in _entries(folder):
        if _LEFTOVER.fullmatch(path.name):
            files.remove_tree(path)


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except (FileNotFoundError, NotADirectoryError):
        return []
