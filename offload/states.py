"""Optimizer states off the device: in host memory or on disk, and here while their parameters step.

    step       ...| window 1 |  window 2  |  window 3  |...
    coming     window 1  | window 2 | window 3 |
    leaving                         | window 1  | window 2  | window 3

A window is as many neighbours in the optimizer's order as `offload.window_mib` holds, or one that has more by itself.
It arrives while the one before it is stepped, and leaves while the one after it is, each way by its own stream or
thread (`streams.py`): three windows are here at the most, between two steps none. The kernels that step are those of a
run that keeps its states, on the same operands, so the numbers are too: in a hook of backward, where parameters come
one by one, as in a step. Which window comes when follows from names and global shapes, so that ranks agree.

A state that its tier fails to take stays here, whole, as it is freed only when the copy out is known to be good.
`host_step.py` leaves the states where they are and steps there.
"""

from collections import deque
from collections.abc import Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from itertools import zip_longest

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.optim import Optimizer

from offload.config import OffloadConfig, StatePlace, WhenFull
from offload.gradients import GradientsAway
from offload.parcel import Parcel
from offload.pool import HostPool, Ledger, TierFull
from offload.streams import Copies
from offload.tiers import DiskRoom, HostRoom, Room, SpillFile
from optim.residency import Group, Residency, State

MIB, GIB = 2**20, 2**30

Window = tuple[Group, list[Tensor]]


class OffloadedStates(Residency):
    """The states of one optimizer, elsewhere between two steps (`optim.residency.kept_by`).

    Args:
        device: where the optimizer steps.
    """

    def __init__(self, cfg: OffloadConfig, device: torch.device, *, copies: Copies | None = None) -> None:
        self.cfg, self.ledger, self.messages = cfg, Ledger(), list[str]()
        cuda = device.type == "cuda"
        budget = None if cfg.host_gib is None else int(cfg.host_gib * GIB)
        self._pool = HostPool(budget, pinned=cuda)
        self._staging = HostPool(pinned=True) if cuda else None
        self._copies = copies or Copies(device)
        self._device = device
        self._file: SpillFile | None = None
        self._parcels: dict[Tensor, Parcel] = {}
        self._leaving: deque[Parcel] = deque()
        self._followers: dict[Parcel, Parcel] = {}
        self._last: Parcel | None = None
        self._early: Parcel | None = None
        self._refusal: str | None = None
        self.gradients: GradientsAway | None = None
        """What keeps gradients elsewhere too, until their parameter steps."""
        self._told = 0

    def take_gradients(self, parameters: Sequence[Tensor]) -> GradientsAway:
        """From now on have gradients leave in backward, and come back with their states."""
        self.gradients = GradientsAway(parameters, self._device, self._copies)
        return self.gradients

    @property
    def ledgers(self) -> dict[str, Ledger]:
        """Accounts of what is elsewhere, by a prefix for its tiers."""
        away = {"gradients_": self.gradients.ledger} if self.gradients is not None else {}
        return {"states_": self.ledger} | away

    @property
    def total(self) -> int:
        """Bytes of all states of this rank."""
        return sum(parcel.nbytes for parcel in self._parcels.values())

    def require_room(self) -> None:
        """Refuse to begin without room for all states, unless what has none may stay.

        Raises:
            TierFull: says what all of them take.
        """
        if self._refusal is not None:
            place = self.cfg.states.value
            raise TierFull(
                f"{self._refusal} {self.total:,} bytes ({self.total / GIB:.3g} GiB) of this rank",
                f"Use offload.{place}_gib={self.total / GIB * 1.01:.3g} or more where there is as much, or "
                "offload.when_full=keep, which leaves on the device what has no room",
            )

    def take_messages(self) -> list[str]:
        """What the user should know since the last call."""
        new, self._told = self.messages[self._told :], len(self.messages)
        return new

    # --- the contract of a residency ---

    def admit(self, p: Tensor, state: State) -> None:
        parcel = self._parcels[p] = Parcel(f"a parameter of shape {tuple(p.shape)}", state)
        if not parcel.nbytes:
            return
        if self._refusal is None:
            try:
                parcel.room = self._room(parcel)
            except (TierFull, OSError, MemoryError) as error:
                self._refuse(error, parcel)
        if self._refusal is not None:
            parcel.discard()
        elif parcel.room is not None:
            self._send(parcel)
            self._let_go(but=1)

    def batches(self, asked: list[Window], states: MutableMapping[Tensor, State]) -> Iterator[Window]:
        self.require_room()
        self.rest()
        windows = list(self._windows(asked))
        for _, params in windows[:1]:
            self._fetch(params)
        for (group, params), following in zip_longest(windows, windows[1:]):
            parcels = [self._parcels[p] for p in params]
            if following is not None:
                self._fetch(following[1])
            for p, parcel in zip(params, parcels, strict=True):
                parcel.arrive()
                if self.gradients is not None:
                    self.gradients.arrive(p)
            yield group, params
            self._let_go()
            for p, parcel in zip(params, parcels, strict=True):
                self._send(parcel)
                if self.gradients is not None:
                    self.gradients.release(p)
        self._let_go()

    def has_gradient(self, p: Tensor) -> bool:
        return p.grad is not None or (self.gradients is not None and p in self.gradients)

    @contextmanager
    def here(self, p: Tensor, *, written: bool = True) -> Iterator[None]:
        self.require_room()
        parcel = self._parcels[p]
        self._recall(parcel)
        parcel.fetch(self.ledger)
        self._fetch_follower(parcel)
        parcel.arrive()
        yield
        self._let_go(but=1)
        if written:
            self._send(parcel)
        else:
            self._leaving.append(parcel)

    def rest(self) -> None:
        if self._early is not None:
            self._leaving.append(self._early)
        self._early = self._last = None
        self._let_go()

    def readable(self, p: Tensor, state: State) -> State:
        self.rest()
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)  # the reader is the host, which waits for no copy so far
        return self._parcels[p].readable() if p in self._parcels else state

    # --- windows ---

    def _windows(self, asked: list[Window]) -> Iterator[Window]:
        limit = int(self.cfg.window_mib * MIB)
        for group, params in asked:
            window: list[Tensor] = []
            held = 0
            for p in params:
                size = self._parcels[p].rank_bytes
                if window and held + size > limit:
                    yield group, window
                    window, held = [], 0
                window.append(p)
                held += size
            yield group, window

    def _fetch(self, params: list[Tensor]) -> None:
        for p in params:
            self._parcels[p].fetch(self.ledger)
            if self.gradients is not None:
                self.gradients.fetch(p)

    def _fetch_follower(self, parcel: Parcel) -> None:
        """Begin to bring what was asked for after `parcel` the last time: hooks come in the same order every step."""
        if self._early is not None and self._early is not parcel:
            self._leaving.append(self._early)  # fetched for nothing
        if self._last is not None and self._last is not parcel:
            self._followers[self._last] = parcel
        self._last, self._early = parcel, self._followers.get(parcel)
        if self._early is not None and not self._early.here:
            self._early.fetch(self.ledger)
        else:
            self._early = None

    def _recall(self, parcel: Parcel) -> None:
        """Have one that is leaving stay for another round; it must not change under the copy out."""
        if parcel in self._leaving:
            self._leaving.remove(parcel)
            try:
                parcel.written()
            except OSError as error:
                self._refuse(error, parcel)

    def _send(self, parcel: Parcel) -> None:
        parcel.send(self.ledger)
        self._leaving.append(parcel)

    def _let_go(self, but: int = 0) -> None:
        """Free what has left, except the last few, whose copies have just begun."""
        while len(self._leaving) > but:
            parcel = self._leaving.popleft()
            try:
                parcel.let_go()
            except OSError as error:
                self._refuse(error, parcel)

    # --- tiers ---

    def _room(self, parcel: Parcel) -> Room:
        fake = isinstance(parcel.bytes, FakeTensor)
        if self.cfg.states is StatePlace.host:
            return HostRoom(parcel.nbytes, self._pool, self._copies, self.ledger, fake=fake, section="offload")
        if self._file is None and not fake:
            self._file = SpillFile(self.cfg.folder())
        budget = None if self.cfg.disk_gib is None else int(self.cfg.disk_gib * GIB)
        file, lasting = self._file, not fake
        return DiskRoom(
            parcel.nbytes, file, self._staging, budget, self._copies, self.ledger, section="offload", lasting=lasting
        )

    def _refuse(self, error: Exception, parcel: Parcel) -> None:
        """A tier did not take a state: the run is refused or stops, or the state stays."""
        place = self.cfg.states.value
        self.ledger.refused[place] += parcel.nbytes
        begun = parcel.room is not None
        if begun:
            self.ledger.out[place] -= parcel.nbytes
        parcel.stay()
        if isinstance(error, TierFull):
            text = str(error).partition(" has no room")[0] + " has no room for all"
        else:
            where = self.cfg.folder() if self.cfg.states is StatePlace.disk else "host memory"
            text = f"{where} does not take them ({getattr(error, 'strerror', None) or error})"
        text = f"optimizer states: {text}"
        if self.cfg.when_full is WhenFull.keep:
            message = f"{text}; what has no room stays on the device (offload.when_full=keep)"
            if message not in self.messages:
                self.messages.append(message)
        elif begun:
            raise TierFull(
                f"{text}; offload.when_full=stop ends the run",
                "Give the tier more room, or use offload.when_full=keep",
            ) from error
        else:
            self._refusal = text


def offloaded(optimizer: Optimizer) -> OffloadedStates | None:
    """What keeps the states of an optimizer elsewhere, if anything does."""
    residency = getattr(optimizer, "residency", None)
    return residency if isinstance(residency, OffloadedStates) else None
