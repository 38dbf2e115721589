"""What a file should hold: its size, its SHA-256, and a CRC-32 for every 4 MiB to say where it differs.

torch's checkpoint reader returns wrong numbers from a file with a flipped bit (99 of 100 flips went unnoticed when we
tried); the digest is what notices. `sha256sum` prints the same value.
"""

import hashlib
import os
import zlib
from concurrent.futures import Executor, Future
from dataclasses import dataclass
from pathlib import Path
from typing import Any

BLOCK = 4 * 2**20
"""Bytes that share a CRC-32."""


@dataclass(frozen=True)
class FileDigest:
    name: str
    size: int
    """Bytes."""
    sha256: str
    """64 hexadecimal digits over the whole file."""
    crc32: tuple[int, ...]
    """One per BLOCK, the last of what is left."""

    def to_json(self) -> dict[str, Any]:
        crc32 = " ".join(f"{crc:08x}" for crc in self.crc32)
        return {"name": self.name, "bytes": self.size, "sha256": self.sha256, "crc32_per_4mib": crc32}

    @classmethod
    def from_json(cls, entry: dict[str, Any]) -> "FileDigest":
        crc32 = tuple(int(crc, 16) for crc in entry["crc32_per_4mib"].split())
        return cls(str(entry["name"]), int(entry["bytes"]), str(entry["sha256"]), crc32)


class Hasher:
    """Digest of bytes that come in pieces."""

    def __init__(self) -> None:
        self.size = 0
        self._sha256 = hashlib.sha256()
        self._crc32: list[int] = []

    def update(self, data: memoryview) -> None:
        self._sha256.update(data)
        self._update_crc32(data)

    def begin_update(self, data: memoryview, pool: Executor) -> tuple[Future[None], Future[None]]:
        """Start both sums in `pool`; they run beside the caller. `data` must stay as it is until both are done."""
        return pool.submit(self._sha256.update, data), pool.submit(self._update_crc32, data)

    def digest(self, name: str) -> FileDigest:
        return FileDigest(name, self.size, self._sha256.hexdigest(), tuple(self._crc32))

    def _update_crc32(self, data: memoryview) -> None:
        while data:
            room = BLOCK - self.size % BLOCK
            if room == BLOCK:
                self._crc32.append(0)
            self._crc32[-1] = zlib.crc32(data[:room], self._crc32[-1])
            self.size += len(data[:room])
            data = data[room:]


def difference(path: Path, expected: FileDigest, *, from_disk: bool = False) -> str | None:
    """Read the whole file and say how it differs from `expected`; None if it doesn't.

    Args:
        from_disk: drop the file's pages from memory first, so that the disk is asked and not the cache. Only pages
            already synced go; the call is a hint to the kernel.

    Raises:
        OSError: the file can't be read.
    """
    with open(path, "rb", buffering=0) as stream:
        size = os.fstat(stream.fileno()).st_size
        if size != expected.size:
            return f"{size} bytes instead of {expected.size}"
        if from_disk and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        if hashlib.file_digest(stream, "sha256").hexdigest() == expected.sha256:
            return None
        stream.seek(0)
        return f"SHA-256 differs from the manifest's ({_blocks_that_differ(stream, expected)})"


def _blocks_that_differ(stream: Any, expected: FileDigest) -> str:
    hasher = Hasher()
    while data := stream.read(BLOCK):
        hasher.update(memoryview(data))
    found = hasher.digest(expected.name).crc32
    bad = [i for i, (a, b) in enumerate(zip(found, expected.crc32, strict=False)) if a != b]
    if not bad:
        return "no block of 4 MiB differs by CRC-32"
    span = f"bytes {bad[0] * BLOCK} to {min((bad[0] + 1) * BLOCK, expected.size) - 1}"
    return span if len(bad) == 1 else f"{span} and {len(bad) - 1} more blocks of 4 MiB"
