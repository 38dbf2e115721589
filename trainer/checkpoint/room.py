"""Whether the disk can take a run's checkpoints, before the first step."""

import shutil
from collections.abc import Callable
from pathlib import Path

from trainer.checkpoint.folder import published
from trainer.errors import UserError
from trainer.memory import format_bytes


def check_room(folder: Path, size: int, keep: int, warn: Callable[[str], None]) -> None:
    """Refuse a disk without room for one checkpoint of `size` bytes; warn where `keep` of them and the next do not fit.

    Raises:
        UserError: there is no room.
    """
    free = shutil.disk_usage(folder).free
    found = f"{folder}: a checkpoint takes about {format_bytes(size)}, {format_bytes(free)} are free"
    if free < size:
        raise UserError(f"{found}. Free some space, or choose another disk with run.dir=PATH.")
    missing = keep + 1 - len(published(folder))
    if keep and free < missing * size:
        warn(
            f"{found}; checkpoint.keep={keep} needs {format_bytes(missing * size)}, as an old one goes when a new "
            "one is written. Free some space, or lower checkpoint.keep."
        )
