"""One complete checkpoint, opened for reading."""

import fnmatch
import pickle
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, partial, reduce
from hashlib import sha256
from operator import or_
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


class _Comparison(NamedTuple):
    """What one rank asks for beside what there is; small, for every rank gets that of all."""

    differing: int
    """Tensors that differ."""
    shown: list[str]
    """The first few of them in words."""
    asked: int
    """Bit i is set if the rank asks for the i-th of the checkpoint's names."""


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
        compared = self._ranks.all(partial(self._compare, tensors))
        self._require_the_same(compared, leave)
        self._ranks.all(partial(self._read, flatten(tensors)))

    def _compare(self, tensors: Mapping[str, Any]) -> "_Comparison":
        found = self.names()
        place = {name: i for i, name in enumerate(found)}
        differences, asked = [], 0
        for name, tensor in flatten(tensors).items():
            assert not tensor.is_meta, f"{name} is on the meta device: nothing to load into"
            info = TensorInfo(tuple(tensor.shape), tensor.dtype)
            if name not in found:
                differences.append(f"{name}: asked {info}, not in the checkpoint")
                continue
            asked |= 1 << place[name]
            if found[name] != info:
                differences.append(f"{name}: asked {info}, found {found[name]}")
        return _Comparison(len(differences), differences[:_SHOWN], asked)

    def _require_the_same(self, compared: list["_Comparison"], leave: Sequence[str]) -> None:
        asked = reduce(or_, (each.asked for each in compared))
        unread = [
            f"{name}: not asked for, found {info}"
            for i, (name, info) in enumerate(self.names().items())
            if not asked >> i & 1 and not any(fnmatch.fnmatchcase(name, pattern) for pattern in leave)
        ]
        shown = list(dict.fromkeys(text for each in compared for text in each.shown)) + unread
        count = max(len(shown), max(each.differing for each in compared) + len(unread))
        if shown:
            raise UserError(self._another_model(shown[:_SHOWN], count))

    def _another_model(self, shown: list[str], count: int) -> str:
        lines = "".join(f"\n  {difference}" for difference in shown)
        more = f"\n  and {count - len(shown)} more" if count > len(shown) else ""
        return (
            f"{self.path} is a checkpoint of another model or optimizer than this run's; {count} tensors differ."
            f"{lines}{more}\nGo on with the configuration it was saved with (config.yaml in its run folder), or "
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
