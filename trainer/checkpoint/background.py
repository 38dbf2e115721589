"""A checkpoint that is written by a thread while training goes on.

The thread does all that a synchronous save does, through a store whose ranks agree in a group of their own: so their
collectives cannot come between those of training, a failure on one rank is a failure on all, and no rank publishes
what another could not write. The training thread waits for the copies alone (`Saving.wait`).
"""

import copy
import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from offload.snapshot import Snapshot
from trainer.checkpoint.store import CheckpointStore


class Saving:
    """One save under way.

    Args:
        store: of this save alone, until it is done; with a group that nobody else uses.
        tensors: as `CheckpointStore.save` takes them, flat; emptied once they are being copied.
        meta: copied at once.
        snapshot: made when the tensors held what is to be saved.
    """

    def __init__(
        self,
        store: CheckpointStore,
        step: int,
        tensors: dict[str, Any],
        meta: dict[str, Any],
        snapshot: Snapshot,
        device: torch.device,
    ) -> None:
        self.step = step
        self.seconds = 0.0
        """From the request to the end; known then."""
        self._snapshot = snapshot
        self._outcome: Future[Path] = Future()
        work = (store, tensors, copy.deepcopy(meta), device)
        threading.Thread(target=self._work, args=work, name=f"stowage-save-{step}").start()

    def _work(
        self, store: CheckpointStore, tensors: dict[str, Any], meta: dict[str, Any], device: torch.device
    ) -> None:
        began = time.perf_counter()
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)  # which is each thread's own
            path = store.save(self.step, tensors, meta, self._snapshot)
        except BaseException as error:
            self._end(began)
            self._outcome.set_exception(error)
        else:
            self._end(began)
            self._outcome.set_result(path)

    def _end(self, began: float) -> None:
        self._snapshot.end()
        self.seconds = time.perf_counter() - began

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return self._outcome.done()

    def wait(self) -> None:
        """Return when the tensors may change. Never fails: what went wrong is `result`'s to tell."""
        self._snapshot.wait()

    def result(self) -> Path:
        """Wait for the end; return the checkpoint's folder.

        Raises:
            CheckpointSaveError: the disk of any rank refused; nothing was published.
        """
        return self._outcome.result()
