"""The order of training samples, and who computes which.

Sample g (counted from 0 over the whole run) is a function of the seed and g alone. A step takes the next
`global_batch` samples, and the ranks share those out: neither rank count nor micro-batch changes what a step sees.
"""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import numpy as np
import torch

from trainer.data import IGNORE
from trainer.data.batch import Batch, StepBatch
from trainer.data.order import permutation
from trainer.data.packing import Ints
from trainer.data.rows import Rows
from trainer.data.streamed import Mark, StreamedRows
from trainer.errors import UserError


class Samples(Protocol):
    """The endless sequence of training samples."""

    def take(self, first: int, count: int, mine: range) -> tuple[Batch, int, Mark]:
        """Return the samples of `mine`, the targets in all of first .. first + count, and how to find this place."""


class ShuffledRows:
    """Rows in a new permutation each epoch; a sample is found in constant time."""

    def __init__(self, rows: Rows, seed: int) -> None:
        self.rows, self.seed = rows, seed
        self.epoch, self.order = 0, permutation(len(rows), seed, 0)

    def take(self, first: int, count: int, mine: range) -> tuple[Batch, int, Mark]:
        indices = self.indices(first, count)
        targets = int(self.rows.targets[indices].sum())
        return self.rows.batch(indices[mine.start - first : mine.stop - first]), targets, {}

    def indices(self, first: int, count: int) -> Ints:
        """Return the rows of `count` samples from global sample `first` on; they may cross epochs."""
        taken = []
        while count:
            epoch, at = divmod(first, len(self.rows))
            if epoch != self.epoch:
                self.epoch, self.order = epoch, permutation(len(self.rows), self.seed, epoch)
            part = self.order[at : at + count]
            taken.append(part)
            first, count = first + len(part), count - len(part)
        return np.concatenate(taken)


class TrainStream(Iterator[StepBatch]):
    """Iterate over the steps of one rank, without end.

    Args:
        rows: training rows of a corpus.
        global_batch: samples per step, over all ranks and micro-steps; at least one for each rank.
        micro_batch: most samples in a micro-batch; the last of a step may be smaller.

    Raises:
        UserError: fewer rows than a step takes, or fewer samples in a step than ranks.
    """

    position: int
    """Global samples consumed so far."""

    def __init__(
        self,
        rows: Rows | StreamedRows,
        *,
        seed: int,
        global_batch: int,
        micro_batch: int,
        process_rank: int = 0,
        process_count: int = 1,
    ) -> None:
        if global_batch < process_count:
            raise UserError(
                f"train.global_batch={global_batch}: {process_count} processes need at least one sample each "
                f"in a step. Use train.global_batch={process_count} or more, or fewer processes."
            )
        if isinstance(rows, Rows) and len(rows) < global_batch:
            raise UserError(
                f"train.global_batch={global_batch}: the training data makes only {len(rows)} rows of "
                f"{rows.length} tokens, so a step would see rows twice. Give more data, a smaller "
                "data.sequence_length or a smaller train.global_batch."
            )
        self.position, self.mark = 0, dict[str, int]()
        self.global_batch, self.micro_batch = global_batch, micro_batch
        borders = [global_batch * rank // process_count for rank in (process_rank, process_rank + 1)]
        self.share = range(*borders)
        self.rows, self.seed = rows, seed
        self.samples: Samples = ShuffledRows(rows, seed) if isinstance(rows, Rows) else rows.samples(seed)
        # Building rows takes microseconds; reading and tokenizing a stream doesn't, and is done a step ahead.
        self.ahead = Ahead(self.load) if isinstance(rows, StreamedRows) else None

    def __next__(self) -> StepBatch:
        batch, targets, self.mark = self.ahead.get(self.position) if self.ahead else self.load(self.position)
        step = StepBatch(batch.split(self.micro_batch), targets, first_sample=self.position)
        self.position += self.global_batch
        if self.ahead:
            self.ahead.start(self.position)
        return step

    def load(self, position: int) -> tuple[Batch, int, Mark]:
        return self.samples.take(position, self.global_batch, shifted(self.share, position))

    def seek(self, position: int) -> None:
        """Make sample `position` the next one: at once for token files; a stream is read and tokenized up to there."""
        self.restore({"position": position})

    def state(self) -> dict[str, int]:
        """Return what `restore` needs: the position and a stream's place in its source. Equal on all ranks."""
        return {"position": self.position, **self.mark}

    def restore(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, at any rank count, batch size and micro-batch."""
        self.position = state["position"]
        self.mark = {name: value for name, value in state.items() if name != "position"}
        if isinstance(self.rows, StreamedRows) and self.ahead:
            self.ahead.close()
            self.samples = self.rows.samples(self.seed, self.mark)
            self.ahead = Ahead(self.load)


def shifted(span: range, by: int) -> range:
    return range(span.start + by, span.stop + by)


class Ahead:
    """Computes the next value of a function in a thread while the last one is being used."""

    def __init__(self, function: Callable[[int], tuple[Batch, int, Mark]]) -> None:
        self.function = function
        self.pool = ThreadPoolExecutor(1, thread_name_prefix="data")
        self.argument, self.future = -1, Future[tuple[Batch, int, Mark]]()

    def start(self, argument: int) -> None:
        self.argument, self.future = argument, self.pool.submit(self.function, argument)

    def get(self, argument: int) -> tuple[Batch, int, Mark]:
        if self.argument != argument:
            self.start(argument)
        return self.future.result()

    def close(self) -> None:
        """Wait for the value being computed, and drop it."""
        self.pool.shutdown(cancel_futures=True)


def heldout_batches(
    rows: Rows, *, micro_batch: int, process_rank: int = 0, process_count: int = 1, limit: int = 0
) -> Iterator[Batch]:
    """Yield this rank's share of the held-out rows; over all ranks each row comes exactly once.

    All ranks get as many batches, since a sharded model runs on all of them at once: where the shares differ, a rank
    repeats a row without targets. The last batch with targets may be smaller.

    Args:
        limit: rows to measure over all ranks, spread evenly over the held-out rows; 0: all of them.
    """
    count = min(limit, len(rows)) if limit else len(rows)
    chosen = np.arange(count) * len(rows) // max(count, 1)
    mine = chosen[count * process_rank // process_count : count * (process_rank + 1) // process_count]
    largest = -(-count // process_count)
    for at in range(0, largest, micro_batch):
        some = mine[at : at + micro_batch]
        yield rows.batch(some) if len(some) else without_targets(rows.batch(chosen[:1]))


def without_targets(batch: Batch) -> Batch:
    return Batch(batch.input_ids, torch.full_like(batch.labels, IGNORE), batch.position_ids)
