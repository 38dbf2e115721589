"""Tokenized documents, end to end: in memory, or in a folder that is mapped and not read.

A folder is complete or absent: it is written aside, synced and renamed, so a killed build leaves nothing that looks
finished, and of two processes building the same one the first wins.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Document:
    """One tokenized document."""

    ids: NDArray[Any]
    """(tokens,) unsigned."""
    scored: NDArray[np.bool_] | None
    """(tokens,) whether the loss counts on a token; None: on all."""
    key: int
    """64-bit hash of the content, before any tokenizer or template."""


@dataclass(frozen=True)
class Tokens:
    """Many documents; document d is ids[stops[d - 1]:stops[d]]."""

    ids: NDArray[Any]
    """(tokens,) uint16 or uint32."""
    stops: NDArray[np.int64]
    """(documents,)"""
    keys: NDArray[np.uint64]
    """(documents,)"""
    scored: NDArray[np.bool_] | None
    """(tokens,) or None: all."""
    dropped: int = 0
    """Records that had no text, or no answer."""

    @property
    def starts(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(min(len(self.stops), 1), np.int64), self.stops[:-1]])

    def __len__(self) -> int:
        return len(self.stops)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Return the smallest dtype of token files that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 1 << 16 else np.uint32)


def tokens_in_memory(documents: Iterable[Document | None], vocab_size: int) -> Tokens:
    """Join documents; None stands for a record that held nothing to train on."""
    everything = list(documents)
    kept = [document for document in everything if document is not None]
    dtype = token_dtype(vocab_size)
    scored = [document.scored for document in kept if document.scored is not None]
    return Tokens(
        ids=np.concatenate([np.empty(0, dtype), *(document.ids.astype(dtype) for document in kept)]),
        stops=np.cumsum([len(document.ids) for document in kept], dtype=np.int64),
        keys=np.array([document.key for document in kept], np.uint64),
        scored=np.concatenate(scored) if scored else None,
        dropped=len(everything) - len(kept),
    )


def write_tokens(folder: Path, documents: Iterable[Document | None], vocab_size: int) -> None:
    """Write documents into `folder`, one at a time; other processes see it complete or not at all.

    Raises:
        OSError: the disk is full, or the folder cannot be written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        write_files(aside, documents, token_dtype(vocab_size))
        sync_folder(aside)
        publish(aside, folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def write_files(folder: Path, documents: Iterable[Document | None], dtype: np.dtype[Any]) -> None:
    stops, keys, dropped, total, masked = [], [], 0, 0, False
    with open(folder / "ids.bin", "wb") as ids, open(folder / "scored.bin", "wb") as scored:
        for document in documents:
            if document is None:
                dropped += 1
                continue
            append(ids, document.ids.astype(dtype, copy=False))
            if document.scored is not None:
                masked = True
                append(scored, document.scored)
            total += len(document.ids)
            stops.append(total)
            keys.append(document.key)
    np.save(folder / "stops.npy", np.array(stops, np.int64))
    np.save(folder / "keys.npy", np.array(keys, np.uint64))
    info = {"tokens": total, "documents": len(stops), "dropped": dropped, "dtype": dtype.name, "masked": masked}
    (folder / "info.json").write_text(json.dumps(info, indent=1))


def append(file: BinaryIO, values: NDArray[Any]) -> None:
    file.write(np.ascontiguousarray(values).data)


def sync_folder(folder: Path) -> None:
    for path in [*folder.iterdir(), folder]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def publish(aside: Path, folder: Path) -> None:
    """Rename a complete folder to its name, unless another process has just done so."""
    try:
        os.rename(aside, folder)
    except OSError:
        if open_tokens(folder) is not None:
            return
        shutil.rmtree(folder)  # damaged: open_tokens found sizes that cannot be
        os.rename(aside, folder)


def open_tokens(folder: Path) -> Tokens | None:
    """Map the folder's files; None where there is no such folder, or one with files of the wrong size."""
    try:
        info = json.loads((folder / "info.json").read_text())
        count, dtype = info["tokens"], np.dtype(info["dtype"])
        expected = {"ids.bin": count * dtype.itemsize, "scored.bin": count * info["masked"]}
        if any((folder / name).stat().st_size != size for name, size in expected.items()):
            return None
        stops, keys = np.load(folder / "stops.npy"), np.load(folder / "keys.npy")
    except (OSError, ValueError, KeyError):
        return None
    if len(stops) != info["documents"] or len(keys) != len(stops):
        return None
    return Tokens(
        ids=map_file(folder / "ids.bin", dtype, count),
        stops=stops,
        keys=keys,
        scored=map_file(folder / "scored.bin", np.dtype(bool), count) if info["masked"] else None,
        dropped=info["dropped"],
    )


def map_file(path: Path, dtype: np.dtype[Any], count: int) -> NDArray[Any]:
    """Map a file read-only; an empty file cannot be mapped."""
    return np.memmap(path, dtype, mode="r", shape=(count,)) if count else np.empty(0, dtype)
