"""The tiers that take the activations of one model: their budgets, their files, and what is done when one is full."""

import shutil
import weakref

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from offload.config import ActivationsConfig, Fate, WhenFull
from offload.pool import HostPool, Ledger, TierFull
from offload.saved import Frame, Moved
from offload.streams import Copies
from offload.tiers import DiskRoom, HostRoom, Room, SpillFile

GIB = 2**30


class Elsewhere:
    """Host memory and disk, as far as `cfg` gives them to activations."""

    def __init__(self, cfg: ActivationsConfig, device: torch.device, ledger: Ledger, copies: Copies) -> None:
        cuda = device.type == "cuda"
        self.pool = HostPool(None if cfg.host_gib is None else int(cfg.host_gib * GIB), pinned=cuda)
        self.messages: list[str] = []
        """What did not fit, each thing once."""
        self._cfg, self._ledger, self._copies = cfg, ledger, copies
        self._staging = HostPool(pinned=True) if cuda else None
        self._file: weakref.ref[SpillFile] | None = None
        self._told: set[Fate] = set()

    def take(self, frame: Frame, storage: torch.UntypedStorage, version: int, near: Tensor, fate: Fate) -> Moved | None:
        """Start to move a storage, whose bytes `near` (n,) are; None where it stays, as its tier has no room.

        Raises:
            TierFull: it has none, and `cfg` says to stop then.
        """
        try:
            room = self._room(fate, near)
        except (TierFull, OSError) as error:
            self._ledger.refused[fate.value] += near.nbytes
            self._refuse(fate, error)
            return None
        entry = Moved(storage, version, frame, near, room, self._ledger, fate, lambda error: self._refuse(fate, error))
        frame.entries.append(weakref.ref(entry))
        frame.moved += near.nbytes
        return entry

    def _room(self, fate: Fate, near: Tensor) -> Room:
        fake = isinstance(near, FakeTensor)
        if fate is Fate.host:
            return HostRoom(near.nbytes, self.pool, self._copies, self._ledger, fake=fake)
        budget = None if self._cfg.disk_gib is None else int(self._cfg.disk_gib * GIB)
        file = None if fake else self._spill_file()
        return DiskRoom(near.nbytes, file, self._staging, budget, self._copies, self._ledger)

    def _spill_file(self) -> SpillFile:
        """The file of this forward; the rooms in it hold it, and with the last of them it is gone."""
        file = self._file() if self._file is not None else None
        if file is None:
            file = SpillFile(self._cfg.folder())
            self._file = weakref.ref(file)
        return file

    def _refuse(self, fate: Fate, error: Exception) -> None:
        """A tier did not take a storage: stop, or say once that such stay."""
        if self._cfg.when_full is WhenFull.stop:
            raise TierFull(
                f"{reason(error, self._cfg)}; activations.when_full=stop ends the run",
                "Give the tier more room, use activations.when_full=keep, or activations=recompute",
            ) from error
        if fate not in self._told:
            self._told.add(fate)
            self.messages.append(
                f"{reason(error, self._cfg)}; such activations stay on the device (activations.when_full=keep)"
            )


def reason(error: Exception, cfg: ActivationsConfig) -> str:
    """What a tier said, in the user's words."""
    if isinstance(error, OSError):
        folder = cfg.folder()
        free = shutil.disk_usage(folder).free if folder.is_dir() else 0
        return f"{folder} has no room for activations ({error.strerror or error}; {free:,} bytes free)"
    return str(error)
