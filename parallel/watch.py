"""Who waits for whom: every rank tells where it is, so that a hang or a death is told by rank, step and phase.

A thread of each rank writes its place into the group's key-value store, and a count that shows it is alive. A rank
that ends with an error leaves that there too, the first one for good. When a collective then fails elsewhere (its
partner is gone, or did not come within the time-out), the failure is explained by what the store holds, instead of by
a socket's closing.
"""

import json
import re
import socket
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from types import TracebackType
from typing import Any, Self

import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from parallel.launch import World

Place = tuple[int, str]
"""Step (0 before the first) and phase."""

EVERY = 1.0
"""Seconds between two signs of life."""
GRACE = 4.0
"""Seconds that a rank whose partner has gone waits for that partner's own account: it may still be writing it."""

FAILED = re.compile(
    r"gloo|nccl|TCPStore|connection (closed|reset) by peer|timed out waiting|pair closure|broken pipe", re.I
)
"""How torch's RuntimeErrors speak of a collective that failed; its own classes cover a part of them only."""
WAITED = re.compile(r"timed out|timeout", re.I)


class RankLost(RuntimeError):
    """Another rank ended the job, or kept it waiting; the text says which and where.

    Attributes:
        speaks: whether this rank is the one to say so.
    """

    def __init__(self, text: str, *, speaks: bool) -> None:
        super().__init__(text)
        self.speaks = speaks


def of_a_collective(error: BaseException) -> bool:
    """Whether an error is that of a collective whose partners did not do their part."""
    if isinstance(error, dist.DistBackendError | dist.DistNetworkError | dist.DistStoreError):
        return True
    return isinstance(error, RuntimeError) and FAILED.search(str(error)) is not None


class Watch:
    """Context of a run on several ranks; alone it does nothing.

    Args:
        timeout: seconds after which a collective gives up.
    """

    def __init__(self, world: World, timeout: float, *, every: float = EVERY, grace: float = GRACE) -> None:
        self.phase = "start"
        """What this rank does before its first step."""
        self.where: Callable[[], Place] = lambda: (0, self.phase)
        """Asked by the thread for this rank's place; must not block."""
        self._world, self._timeout, self._every, self._grace = world, timeout, every, grace
        self._store: Any = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._tell_places, name="stowage-watch", daemon=True)

    def __enter__(self) -> Self:
        if self._world.control is not None:
            store: Any = dist.distributed_c10d._get_default_store()
            # A connection of its own: on a shared one a wait of the main thread would hold up the thread.
            store = store.clone() if hasattr(store, "clone") else store
            self._store = PrefixStore("stowage-watch", store)
            self._store.set_timeout(timedelta(seconds=2 * self._every))
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Explain a collective's failure; leave word of any other error for the other ranks.

        Raises:
            RankLost: in place of the collective's own error.
        """
        if self._store is None:
            return
        try:
            if error is not None and of_a_collective(error):
                text = self._explanation(error)
                speaks = self._speaks()
                if self._world.leads:  # which mostly keeps the store: the others are still reading in it
                    time.sleep(2 * self._every)
                raise RankLost(text, speaks=speaks) from error
            if error is not None:
                self._leave_word(error)
        finally:
            self._ended.set()
            self._thread.join(self._every * 3)

    def _tell_places(self) -> None:
        beat, since, last = 0, time.monotonic(), self.where()
        warned = False
        while not self._ended.is_set():
            now = self.where()
            if now != last:
                last, since, warned = now, time.monotonic(), False
            beat += 1
            waiting = time.monotonic() - since
            try:
                place = {"beat": beat, "step": now[0], "phase": now[1], "for": waiting, "host": socket.gethostname()}
                self._store.set(f"place/{self._world.process_rank}", json.dumps(place))
                if waiting > self._timeout and not warned and self._world.device.type == "cuda":
                    # NCCL's own watchdog ends the process without an exception, so there is no later occasion.
                    warned = True
                    print(f"stowage: {self._overview('a collective waits')}", file=sys.stderr, flush=True)
            except (RuntimeError, OSError):
                return  # the store has gone with the rank that kept it
            self._ended.wait(self._every)

    def _leave_word(self, error: BaseException) -> None:
        rank, place = self._world.process_rank, named(*self.where())
        word = f"rank {rank} failed in {place}: {type(error).__name__}: {error}"
        try:
            if self._store.add("words", 1) == 1:
                self._store.set("word", word)
        except (RuntimeError, OSError):
            return

    def _explanation(self, error: BaseException) -> str:
        """What happened to the others, as far as the store knows."""
        deadline = time.monotonic() + self._grace
        try:
            self._store.set(f"gave_up/{self._world.process_rank}", b"")
            while time.monotonic() < deadline:
                if self._store.check(["word"]):
                    return str(self._store.get("word").decode())
                time.sleep(self._every / 4)
            if WAITED.search(str(error)):
                return self._overview(f"a collective got no answer within parallel.timeout={self._timeout:g} s")
            return self._overview("the connection to another rank broke")
        except (RuntimeError, OSError):
            first = (str(error).strip().splitlines() or [""])[0][:200]
            return f"{self._here()}: rank 0, which keeps the ranks together, is gone ({first})"

    def _overview(self, what: str) -> str:
        """Say of every rank where it is and how long it has been there."""
        before = self._places()
        time.sleep(2.5 * self._every)
        now = self._places()
        ranks = range(self._world.process_count)
        gone = [r for r in ranks if r not in now or now[r]["beat"] == before.get(r, now[r])["beat"]]
        waited = [r for r in ranks if self._store.check([f"gave_up/{r}"])]
        late = [r for r in ranks if r not in gone and r not in waited]
        blame = [f"{ranks_text(gone)} gone"] * bool(gone) + [f"{ranks_text(late)} not there"] * bool(late)
        lines = [
            "; ".join([f"{self._here()}: {what}", *blame]),
            *(place_text(r, now.get(r), alive=r not in gone) for r in ranks),
        ]
        return "\n".join(lines)

    def _places(self) -> dict[int, dict[str, Any]]:
        found = {}
        for rank in range(self._world.process_count):
            key = f"place/{rank}"
            if self._store.check([key]):
                found[rank] = json.loads(self._store.get(key))
        return found

    def _speaks(self) -> bool:
        """One rank speaks for those that wait: the first to say so, or any where the store is gone."""
        try:
            return bool(self._store.add("speakers", 1) == 1)
        except (RuntimeError, OSError):
            return True

    def _here(self) -> str:
        return f"rank {self._world.process_rank} in {named(*self.where())}"


def named(step: int, phase: str) -> str:
    return f"step {step}, {phase}" if step else phase


def ranks_text(ranks: list[int]) -> str:
    """`rank 1 is`, `ranks 1, 2 are`."""
    return f"rank {ranks[0]} is" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))} are"


def place_text(rank: int, place: dict[str, Any] | None, *, alive: bool) -> str:
    """One line about a rank; its place was looked up at its last sign of life."""
    if place is None:
        return f"  rank {rank}: never heard of"
    where = f"{named(place['step'], place['phase'])} for {place['for']:.0f} s"
    if alive:
        return f"  rank {rank} on {place['host']}: {where}"
    return f"  rank {rank} on {place['host']}: last seen in {where}; its process has ended or is stopped"
