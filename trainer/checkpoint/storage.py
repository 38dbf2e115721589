"""torch.distributed.checkpoint's own reader and writer, with our file operations under them.

The container is torch's, unchanged: `torch.distributed.checkpoint.format_utils` and others open it. Ours is how the
bytes reach the disk (each file hashed on the way and synced before it is closed) and what we agree to unpickle.
"""

import io
import pickle
from collections.abc import Iterator
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta

from trainer.checkpoint import files
from trainer.checkpoint.digest import FileDigest, Hasher

METADATA = ".metadata"
AHEAD = 10_000_000
"""Bytes on their way from a CUDA device while others are written; torch's default."""
_GATHER_BYTES = 2**20
"""torch.save writes some forty pieces of a few bytes per tensor; they are joined up to this size."""


class HashingFile:
    """A new file that digests what is written, and is synced when closed.

    Args:
        pool: threads in which the sums run while the bytes are written.
    """

    def __init__(self, path: Path, pool: Executor) -> None:
        self.error: OSError | None = None
        """The first error, kept because torch's C++ writer turns it into one without errno."""
        self._path = path
        self._pool = pool
        self._hasher = Hasher()
        self._gathered = bytearray()
        self._position = 0
        self._fd = files.create(path)

    def write(self, data: bytes | memoryview) -> int:
        view = memoryview(data).cast("B")
        self._position += len(view)
        if len(view) < _GATHER_BYTES:
            self._gathered += view
            if len(self._gathered) >= _GATHER_BYTES:
                self._write_gathered()
        else:
            self._write_gathered()
            self._write(view)
        return len(view)

    def flush(self) -> None:
        """Do nothing: torch flushes after every tensor; only `close` promises anything."""

    def tell(self) -> int:
        return self._position

    def close(self) -> None:
        if self._fd < 0:
            return
        try:
            if self.error is None:
                self._write_gathered()
                files.sync(self._fd)
        except OSError as e:
            self.error = self.error or e
            raise
        finally:
            fd, self._fd = self._fd, -1
            files.close(fd)

    def abandon(self) -> None:
        """Close without writing or syncing what is left."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            files.close(fd)

    def digest(self) -> FileDigest:
        return self._hasher.digest(self._path.name)

    def _write_gathered(self) -> None:
        gathered, self._gathered = self._gathered, bytearray()
        if gathered:
            self._write(memoryview(gathered))

    def _write(self, data: memoryview) -> None:
        if len(data) < _GATHER_BYTES:  # not worth waking threads
            self._hasher.update(data)
            sums: tuple[Future[None], ...] = ()
        else:
            sums = self._hasher.begin_update(data, self._pool)
        try:
            files.write(self._fd, data)
        except OSError as e:
            self.error = self.error or OSError(e.errno, e.strerror, str(self._path))
            raise
        finally:
            for each in sums:  # `data` belongs to the caller again once we return
                each.result()


class DurableFileSystem(FileSystem):
    """The file system under torch's writer; remembers the digest of every file it wrote."""

    def __init__(self, pool: Executor) -> None:
        self.digests: dict[str, FileDigest] = {}
        self._pool = pool

    @contextmanager
    def create_stream(self, path: str | PathLike[str], mode: str) -> Iterator[io.IOBase]:
        stream = HashingFile(Path(path), self._pool)
        try:
            yield stream  # type: ignore[misc]
            stream.close()
        except BaseException:
            stream.abandon()
            if stream.error is not None:
                raise stream.error from None
            raise
        self.digests[Path(path).name] = stream.digest()

    def mkdir(self, path: str | PathLike[str]) -> None:
        """Do nothing: rank 0 made the folder before torch's writer was asked."""

    def rename(self, path: str | PathLike[str], new_path: str | PathLike[str]) -> None:
        files.rename(Path(path), Path(new_path))
        old, new = self.digests.pop(Path(path).name), Path(new_path).name
        self.digests[new] = FileDigest(new, old.size, old.sha256, old.crc32)


class DurableWriter(FileSystemWriter):
    """Writes one file per rank, and `.metadata` on rank 0, into a folder that exists and is empty.

    Args:
        in_order: ask for tensors one at a time in the plan's order, rather than a few ahead, small ones first.
    """

    def __init__(self, folder: Path, pool: Executor, *, in_order: bool = False) -> None:
        # One thread: torch's writer loses an error in any other thread. Syncing is HashingFile's.
        ahead = 0 if in_order else AHEAD
        super().__init__(folder, sync_files=False, thread_count=1, per_thread_copy_ahead=ahead, overwrite=False)
        self.fs: DurableFileSystem = DurableFileSystem(pool)

    def storage_meta(self) -> StorageMeta:
        """Leave out folder and random id, so that saving the same tensors gives the same bytes."""
        return StorageMeta()


class VerifiedReader(FileSystemReader):
    """Reads data files under metadata that was already verified and unpickled."""

    def __init__(self, folder: Path, metadata: Metadata) -> None:
        super().__init__(folder)
        self._metadata = metadata

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return self._metadata


_METADATA_CLASSES = {
    ("torch.distributed.checkpoint.metadata", name)
    for name in (
        "Metadata", "MetadataIndex", "StorageMeta", "TensorProperties", "TensorStorageMetadata",
        "ChunkStorageMetadata", "BytesStorageMetadata", "_MEM_FORMAT_ENCODING",
    )
} | {
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
}  # fmt: skip


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _METADATA_CLASSES:
            return super().find_class(module, name)
        if module == "torch" and isinstance(dtype := getattr(torch, name, None), torch.dtype):
            return dtype
        raise pickle.UnpicklingError(f"{module}.{name} is not part of a checkpoint's metadata")


def parse_metadata(raw: bytes) -> Metadata:
    """Unpickle `.metadata`, allowing only the classes that a checkpoint of plain or sharded tensors needs.

    Raises:
        pickle.UnpicklingError: the pickle asks for any other class or function.
    """
    metadata = _MetadataUnpickler(io.BytesIO(raw)).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"holds a {type(metadata).__name__} instead of a checkpoint's metadata")
    return metadata
