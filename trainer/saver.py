"""Checkpoints of a run: what training waits for, what is told of them, and what happens where one fails.

    sync     the training thread writes; it goes on when the checkpoint would survive a power cut
    async    it waits for host copies; a thread writes them while training goes on
    lazy     it waits for nothing; the copies are made beside forward and backward, and are waited for before the
             weights change (`trainer.gate`)

At most one save is under way; a second one waits for it. It ends at a step's border: there all ranks agree that it is
over, and all tell or raise the same. The last save of a run is waited for in every mode.
"""

import time
import warnings
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from offload.snapshot import Snapshots
from parallel.collectives import any_rank
from parallel.launch import World, another_group
from trainer.checkpoint import CheckpointSaveError, CheckpointStore, Saving
from trainer.errors import TrainingStopped
from trainer.gate import Gate
from trainer.memory import format_bytes
from trainer.recorder import Recorder
from trainer.schema import CheckpointConfig, OnFailure, SaveMode


@dataclass
class _Flight:
    saving: Saving
    waited_before: float


class Saver:
    """Saves, and knows what is saved. Every method is called by all ranks together.

    Args:
        store: of the run, for saves that are waited for.
        gate: held shut while weights are copied.
        timeout: seconds a rank's thread may wait for the others'.
        saved_step: newest step that is saved already.
    """

    def __init__(
        self,
        cfg: CheckpointConfig,
        world: World,
        store: CheckpointStore,
        recorder: Recorder,
        gate: Gate,
        *,
        timeout: float,
        saved_step: int | None,
    ) -> None:
        self.saved_step = saved_step
        """Newest step that is saved."""
        self.waited = 0.0
        """Seconds that training has waited for checkpoints, in this process."""
        self._cfg, self._world, self._store, self._recorder, self._gate = cfg, world, store, recorder, gate
        self._unlogged, self._timing = 0.0, False
        self._flight: _Flight | None = None
        self._warnings: deque[str] = deque()
        self.snapshots: Snapshots | None = None
        """Of saves in the background, with what their copies take."""
        if cfg.mode is not SaveMode["sync"]:
            self.snapshots = Snapshots(world.device, cfg.host_bytes())
            group = another_group(world, timeout)
            self._behind = CheckpointStore(
                store.folder, keep=store.keep, verify=store.verify, group=group, warn=self._warnings.append
            )
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # said by the thread

    def beside(self, *, last: bool) -> bool:
        """Whether a save leaves the training thread before all is written."""
        return self.snapshots is not None and not last

    def save(self, step: int, tensors: dict[str, Any], meta: dict[str, Any], *, last: bool) -> None:
        """Save what `tensors` hold now, at once or in the background.

        A disk that refuses costs this checkpoint alone: older ones stay.

        Raises:
            TrainingStopped: it was the `last` occasion, or checkpoint.on_failure=stop.
        """
        if self._flight is not None:
            earlier = self._flight.saving
            if not earlier.done:
                self._recorder.notice(
                    f"the checkpoint of step {earlier.step} is still being written; that of step {step} waits for it"
                )
            self.settle()
        if self.beside(last=last):
            self._begin(step, tensors, meta)
            return
        try:
            path = self._store.save(step, tensors, meta)
        except CheckpointSaveError as error:
            self._failed(step, error, last=last)
        else:
            self._saved(step, path, "")

    def _begin(self, step: int, tensors: dict[str, Any], meta: dict[str, Any]) -> None:
        assert self.snapshots is not None
        mode = self._cfg.mode.value
        saving = Saving(self._behind, step, tensors, meta, self.snapshots.now(), self._world.device)
        self._flight = _Flight(saving, self.waited)
        self._recorder.beside(f"saving step {step} ({mode})")
        if mode == "async":
            saving.wait()
        else:
            self._gate.hold(self._let_copy)

    def _let_copy(self) -> None:
        if self._flight is not None:
            with self.timed():
                self._flight.saving.wait()

    def at_border(self) -> None:
        """Between two steps: tell of a save that has ended on all ranks.

        Raises:
            TrainingStopped: it failed, and checkpoint.on_failure=stop.
            Exception: of the thread, where it is no disk that refused.
        """
        if self._flight is None:
            return
        (running,) = any_rank(self._world, int(not self._flight.saving.done))
        if not running:
            self.settle()

    def settle(self) -> None:
        """Wait for the save that is under way, if any, and tell how it went. Raises as `at_border`."""
        if self._flight is None:
            return
        flight, self._flight = self._flight, None
        try:
            with self.timed():
                path = flight.saving.result()
        except CheckpointSaveError as error:
            self._failed(flight.saving.step, error, last=False)
        else:
            how = f" in {flight.saving.seconds:.2g} s, through {format_bytes(self.staged_bytes())} of host memory; "
            self._saved(flight.saving.step, path, f"{how}training waited {self.waited - flight.waited_before:.2g} s")
        finally:
            self._recorder.beside("")
            while self._warnings:
                self._recorder.warn(self._warnings.popleft())

    def close(self) -> None:
        """Let a save under way come to its end, when the run has come to its own: it fails no more than it has."""
        try:
            self.settle()
        except Exception as error:
            self._recorder.warn(f"the checkpoint that was being written is lost: {type(error).__name__}: {error}")

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Count what happens inside as time that training waits for a checkpoint; once where it is nested."""
        outermost, self._timing = not self._timing, True
        began = time.perf_counter()
        try:
            yield
        finally:
            if outermost:
                seconds = time.perf_counter() - began
                self.waited += seconds
                self._unlogged += seconds
                self._timing = False

    def seconds_to_log(self) -> float | None:
        """Seconds waited since the last call; None for none."""
        seconds, self._unlogged = self._unlogged, 0.0
        return seconds or None

    def newest_text(self) -> str:
        """Say what a run can go on from."""
        return f"step {self.saved_step} is the newest saved" if self.saved_step else "nothing was saved"

    def staged_bytes(self) -> int:
        """Most host memory that copies have taken so far."""
        return 0 if self.snapshots is None else self.snapshots.peak

    def _saved(self, step: int, path: Path, how: str) -> None:
        self.saved_step = step
        self._recorder.notice(f"saved {path}{how}")

    def _failed(self, step: int, error: CheckpointSaveError, *, last: bool) -> None:
        if last:
            raise TrainingStopped(f"step {step} could not be saved, {self.newest_text()}. {error}") from error
        if self._cfg.on_failure is OnFailure.stop:
            raise TrainingStopped(f"checkpoint.on_failure=stop: {self.newest_text()}. {error}") from error
        self._recorder.warn(f"training goes on without a checkpoint of step {step}. {error}")
