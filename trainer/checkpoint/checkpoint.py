"""One complete checkpoint, opened for reading."""

import fnmatch
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load as dcp_load

from trainer.checkpoint.manifest import Manifest
from trainer.checkpoint.ranks import Ranks
from trainer.checkpoint.storage import METADATA, VerifiedReader, parse_metadata
from trainer.errors import UserError

PER_RANK = "rng/*"
"""Names of tensors that belong to one process: `rng/<process rank>/...`. A load need not ask for them."""

_SHOWN = 6
"""Differences spelled out in the message about a checkpoint of another model."""


class TensorInfo(NamedTuple):
    shape: tuple[int, ...]
    """Global shape."""
    dtype: torch.dtype

    def __str__(self) -> str:
        return f"{self.shape} {str(self.dtype).removeprefix('torch.')}"


class Checkpoint:
    """A checkpoint whose files were found as its manifest describes them.

    Attributes:
        meta: numbers and strings that the trainer saved beside the tensors.
        world_size: processes that saved it.
        libraries: versions it was saved with.
    """

    def __init__(self, path: Path, manifest: Manifest, ranks: Ranks) -> None:
        self.path = path
        self.step = manifest.step
        self.meta = manifest.meta
        self.world_size = manifest.world_size
        self.libraries = manifest.libraries
        self._manifest = manifest
        self._ranks = ranks

    def names(self) -> dict[str, TensorInfo]:
        """Every tensor in it, with global shape and dtype."""
        return {
            name: TensorInfo(tuple(entry.size), entry.properties.dtype)
            for name, entry in self._metadata.state_dict_metadata.items()
            if isinstance(entry, TensorStorageMetadata)
        }

    def load(self, tensors: Mapping[str, Any], *, leave: Sequence[str] = (PER_RANK,)) -> None:
        """Read into `tensors`, in place. Called by every rank; ranks may ask for different names.

        Args:
            tensors: dict, nested or flat, of tensors (plain ones and DTensors, on any device); names are joined by dots
                as in `CheckpointStore.save`.
            leave: patterns (as for file names) of what may stay unread; anything else that nobody asks for is an
                error. `("*",)` reads a part, as for evaluation.

        Raises:
            UserError: names, shapes or dtypes differ: a checkpoint of another model. No tensor was changed.
            OSError: a file can't be read. Some tensors may have been changed.
        """
        asked = dict.fromkeys(item for of_rank in self._ranks.all(partial(_asked, tensors)) for item in of_rank)
        found = self._ranks.all(self.names)[0]
        unread = found.keys() - {name for name, _ in asked}
        differences = [
            f"{name}: asked {info}, {f'found {found[name]}' if name in found else 'not in the checkpoint'}"
            for name, info in asked
            if found.get(name) != info
        ]
        differences += [
            f"{name}: not asked for, found {found[name]}"
            for name in sorted(unread)
            if not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave)
        ]
        if differences:
            raise UserError(self._another_model(differences))
        self._ranks.all(partial(self._read, flatten(tensors)))

    def _another_model(self, differences: list[str]) -> str:
        shown = "".join(f"\n  {difference}" for difference in differences[:_SHOWN])
        more = f"\n  and {len(differences) - _SHOWN} more" if len(differences) > _SHOWN else ""
        return (
            f"{self.path} is a checkpoint of another model or optimizer than this run's; {len(differences)} tensors "
            f"differ.{shown}{more}\nGo on with the configuration it was saved with (config.yaml in its run folder), or "
            "start anew in another folder: train.resume=never run.dir=NEW_FOLDER."
        )

    def _read(self, asked: Mapping[str, Tensor]) -> None:
        reader = VerifiedReader(self.path, self._metadata)
        group = self._ranks.group
        with alone_without_warning():
            dcp_load(dict(asked), storage_reader=reader, process_group=group, no_dist=group is None)

    @cached_property
    def _metadata(self) -> Metadata:
        """torch's own description of the tensors: a pickle, so its digest comes first and its classes are limited.

        Raises:
            UserError: it isn't what the manifest says, or asks for more than a checkpoint needs.
        """
        expected = {file.name: file.sha256 for file in self._manifest.files}
        raw = (self.path / METADATA).read_bytes()
        if sha256(raw).hexdigest() != expected[METADATA]:
            raise UserError(f"{self.path / METADATA} is damaged: its SHA-256 differs from the manifest's.")
        try:
            metadata = parse_metadata(raw)
        except pickle.UnpicklingError as e:
            raise UserError(f"{self.path / METADATA} is not read, since it might run a program: {e}.") from e
        unlisted = {info.relative_path for info in metadata.storage_data.values()} - expected.keys()
        if unlisted:
            raise UserError(f"{self.path / METADATA} refers to {min(unlisted)!r}, which the manifest doesn't list.")
        return metadata


def _asked(tensors: Mapping[str, Any]) -> list[tuple[str, TensorInfo]]:
    flat = flatten(tensors)
    for name, tensor in flat.items():
        assert not tensor.is_meta, f"{name} is on the meta device: nothing to load into"
    return [(name, TensorInfo(tuple(tensor.shape), tensor.dtype)) for name, tensor in flat.items()]


def flatten(tensors: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Nested dicts to one, keys joined by dots (as torch.distributed.checkpoint names them).

    Raises:
        TypeError: a value is neither a tensor nor a dict (numbers and strings belong in a checkpoint's meta).
        ValueError: two tensors get the same name.
    """
    flat: dict[str, Tensor] = {}
    for key, value in tensors.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            items = flatten(value, f"{name}.")
        elif isinstance(value, Tensor):
            items = {name: value}
        else:
            raise TypeError(f"{name} is a {type(value).__name__}; a checkpoint takes tensors, the rest goes in meta")
        if twice := flat.keys() & items.keys():
            raise ValueError(f"two tensors of the checkpoint are called {min(twice)}")
        flat |= items
    return flat


@contextmanager
def alone_without_warning() -> Iterator[None]:
    """torch warns when a single process saves or loads, as if that were a mistake."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield
