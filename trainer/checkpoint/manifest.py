"""manifest.json: what a complete checkpoint holds, sealed against any change of its own.

The file is canonical JSON (sorted keys, fixed spacing) with a `seal`, the SHA-256 of the rest. A reader accepts only
the very bytes that writing the parsed content again would give, so that no bit of the file can change unnoticed.
"""

import hashlib
import json
import platform
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from typing import Any

from trainer.checkpoint.digest import FileDigest

MANIFEST = "manifest.json"
FORMAT = 1
"""Raised when older programs could no longer read what we write."""


class BadManifest(ValueError):
    """The manifest was not written by us, or not left as we wrote it."""


class FutureFormat(ValueError):
    """Written by a newer program: nothing wrong with it, but not ours to judge."""


@dataclass(frozen=True)
class Manifest:
    step: int
    world_size: int
    """Processes that saved it."""
    files: tuple[FileDigest, ...]
    """Every file of the checkpoint but the manifest."""
    meta: dict[str, Any]
    """What the trainer wanted kept beside the tensors."""
    libraries: dict[str, str]

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)

    def holds_the_same(self, other: "Manifest") -> bool:
        return (self.step, self.files, _canonical(self.meta)) == (other.step, other.files, _canonical(other.meta))

    def to_bytes(self) -> bytes:
        body = {
            "format": FORMAT,
            "step": self.step,
            "world_size": self.world_size,
            "files": [file.to_json() for file in self.files],
            "meta": self.meta,
            "libraries": self.libraries,
        }
        return _canonical({**body, "seal": _seal(body)})

    @classmethod
    def from_bytes(cls, raw: bytes) -> "Manifest":
        """Read a manifest back.

        Raises:
            BadManifest: not the bytes that we would have written.
            FutureFormat: the format number is above ours.
        """
        try:
            body = json.loads(raw)
            if body["format"] > FORMAT:
                raise FutureFormat(f"written in format {body['format']}, this version reads up to {FORMAT}")
            if _canonical(body) != raw or body.pop("seal") != _seal(body):
                raise BadManifest("altered since it was written: its seal doesn't fit")
            files = tuple(FileDigest.from_json(entry) for entry in body["files"])
            return cls(body["step"], body["world_size"], files, body["meta"], body["libraries"])
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            if isinstance(e, BadManifest | FutureFormat):
                raise
            raise BadManifest(f"no readable manifest ({type(e).__name__}: {e})") from e


def require_json(value: Any, path: str = "meta") -> None:
    """Refuse what JSON would not give back equal: tuples, keys that are no strings, objects.

    Raises:
        TypeError: names the first such value.
    """
    if isinstance(value, dict):
        for key, item in value.items():
            if not isinstance(key, str):
                raise TypeError(f"{path}: the key {key!r} is no string")
            require_json(item, f"{path}.{key}")
    elif isinstance(value, list):
        for i, item in enumerate(value):
            require_json(item, f"{path}[{i}]")
    elif not (value is None or type(value) in (bool, int, float, str)):
        raise TypeError(f"{path} is a {type(value).__name__}; a checkpoint's meta takes numbers, strings, lists, dicts")


@cache
def library_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in ("torch", "transformers", "numpy", "stowage"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _canonical(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()


def _seal(body: dict[str, Any]) -> str:
    return hashlib.sha256(_canonical(body)).hexdigest()
