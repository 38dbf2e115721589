"""One reader for the ranks that share rows: what it reads and tokenizes of a stream, it hands on.

Token files are mapped, and each rank looks up the few rows it needs in the machine's page cache. A stream has to be
fetched and tokenized, which ranks that want the same rows need not each do.
"""

from collections.abc import Callable, Iterator

import torch.distributed as dist

from parallel.collectives import from_first
from trainer.data.batch import StepBatch
from trainer.data.stream import TrainStream


class SharedStream(Iterator[StepBatch]):
    """A `TrainStream` of which a group has one, at its first rank; all of the group iterate together.

    Args:
        group: gloo, of the ranks that read the same rows.
        open_stream: called by the first of them alone.
    """

    def __init__(self, group: dist.ProcessGroup, open_stream: Callable[[], TrainStream]) -> None:
        self._group = group
        self._own = open_stream() if dist.get_rank(group) == 0 else None
        self._state = {"position": 0}

    def __next__(self) -> StepBatch:
        read = (next(self._own), self._own.state()) if self._own is not None else None
        step: StepBatch
        step, self._state = from_first(self._group, read)
        return step

    def state(self) -> dict[str, int]:
        """Return what `restore` needs. Equal on all ranks."""
        return self._state

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken."""
        self._state = dict(state)
        if self._own is not None:
            self._own.restore(state)
