"""Whether a folder is a complete, undamaged checkpoint of ours; if not, which file and why."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from trainer.checkpoint import digest
from trainer.checkpoint.digest import FileDigest
from trainer.checkpoint.manifest import MANIFEST, BadManifest, FutureFormat, Manifest
from trainer.checkpoint.storage import METADATA

_THREADS = 8
"""Files read at a time; hashing lets other threads run."""


@dataclass(frozen=True)
class Finding:
    """Why a checkpoint is refused."""

    file: str
    what: str
    damaged: bool
    """False where the file may be good but can't be judged: no permission, a failing disk, a newer format."""

    def __str__(self) -> str:
        return f"{self.file}: {self.what}"


def read_manifest(folder: Path) -> Manifest | Finding:
    """Read and check a checkpoint's manifest, and that it lists the files which torch needs."""
    try:
        manifest = Manifest.from_bytes((folder / MANIFEST).read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return Finding(MANIFEST, "missing", damaged=True)
    except OSError as e:
        return Finding(MANIFEST, f"can't be read ({e.strerror})", damaged=False)
    except BadManifest as e:
        return Finding(MANIFEST, str(e), damaged=True)
    except FutureFormat as e:
        return Finding(MANIFEST, str(e), damaged=False)
    names = [file.name for file in manifest.files]
    strange = [name for name in names if os.path.basename(name) != name or name in ("", ".", "..")]
    if strange or METADATA not in names:
        return Finding(MANIFEST, f"lists {strange[0]!r}" if strange else f"doesn't list {METADATA}", damaged=True)
    return manifest


def check_files(folder: Path, files: Sequence[FileDigest], *, digests: bool, from_disk: bool = False) -> list[Finding]:
    """Compare files with what the manifest says of them: size, and with `digests` every byte.

    Args:
        from_disk: see `digest.difference`.
    """

    def check(file: FileDigest) -> Finding | None:
        try:
            if digests:
                what = digest.difference(folder / file.name, file, from_disk=from_disk)
            else:
                size = (folder / file.name).stat().st_size
                what = None if size == file.size else f"{size} bytes instead of {file.size}"
        except FileNotFoundError:
            what = "missing"
        except OSError as e:
            return Finding(file.name, f"can't be read ({e.strerror})", damaged=False)
        return None if what is None else Finding(file.name, what, damaged=True)

    with ThreadPoolExecutor(_THREADS) as pool:
        return [finding for finding in pool.map(check, files) if finding is not None]
