"""`metrics.jsonl`: one line a logged step, and the clock behind its `tokens_per_second`.

A line holds `step, tokens, loss, lr, grad_norm, tokens_per_second, seconds, memory{kind: bytes}`, and where there is
something to say `eval_loss, eval_perplexity, eval_perplexity_authors, eval_by_position{first-last: {loss, perplexity,
targets}}, skipped, checkpoint_wait_seconds (that training waited since the line before), subspace{refreshes,
captured{min, median}, overlap{min, median}}, beside{tier: bytes}` (what lies off the device: `host` and `disk` of
activations, `states_host`, `states_disk`, `gradients_host`, `weights_host`). The file only ever holds the run that
leads to its last line: on a resume the lines the interrupted run wrote after its checkpoint are taken out.
"""

import contextlib
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

Record = dict[str, Any]


class MetricsFile:
    """Appends records to a JSON-lines file that is whole at every moment.

    Opening it takes out a last line that a crash left half written. One process writes; any may read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            self._keep(lambda record: True)
        self._file = path.open("ab", buffering=0)  # unbuffered: a line is with the system when append returns

    def append(self, record: Mapping[str, Any]) -> None:
        """Write one record as one line. Fields that are None are left out: they were not measured."""
        line = json.dumps(_plain({k: v for k, v in record.items() if v is not None}), allow_nan=False)
        rest = memoryview(line.encode() + b"\n")
        while rest:  # a raw write may take less than it was given
            rest = rest[self._file.write(rest) :]

    def rewind(self, step: int) -> int:
        """Take out the records after `step`, which the run that goes on from there will write again.

        A run that begins at step 0 evaluates before its first step, so it writes the records of step 0 again too.
        The new file is written aside and renamed, so a crash leaves the old or the new one, never a part.

        Returns:
            How many lines went.
        """
        self._file.close()
        removed = self._keep(lambda record: 0 < step >= record["step"])
        self._file = self.path.open("ab", buffering=0)
        return removed

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _keep(self, wanted: Callable[[Record], bool]) -> int:
        """Rewrite the file with the whole lines that are wanted, if that changes it."""
        before = self.path.read_bytes()
        kept = b"".join(line for line, record in _whole_lines(before) if wanted(record))
        if kept != before:
            _replace(self.path, kept)
        return len(before.splitlines()) - len(kept.splitlines())


def read_metrics(path: Path) -> list[Record]:
    """Read the records of a metrics file, in order; a line still being written is left out.

    NaN and infinities come back as floats. An absent file has no records.
    """
    if not path.exists():
        return []
    return [_restored(record) for _, record in _whole_lines(path.read_bytes())]


def _whole_lines(content: bytes) -> Iterator[tuple[bytes, Record]]:
    """Yield each complete line with its record.

    What a crash or a full disk leaves (no newline at the end, a run of NUL bytes) is no record and is passed over.
    """
    for line in content.splitlines(keepends=True):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if line.endswith(b"\n") and isinstance(record, dict) and isinstance(record.get("step"), int):
            yield line, record


def _replace(path: Path, content: bytes) -> None:
    """Put `content` in place of the file's, all or nothing, also over a power failure."""
    aside = path.with_name(path.name + ".new")
    with aside.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def _plain(value: Any) -> Any:
    """Turn a value into what JSON has: scalars of tensors and arrays to numbers, NaN to null, infinities to text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else "inf" if value > 0 else "-inf"
    return value


def _restored(value: Any) -> Any:
    """Undo `_plain`."""
    if isinstance(value, dict):
        return {k: _restored(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_restored(v) for v in value]
    return math.nan if value is None else float(value) if value in ("inf", "-inf") else value


Mark = tuple[float, int, int]
"""Seconds, steps, tokens."""


class Throughput:
    """Tokens per second, seconds, and time to go, from marks set at logged steps.

    Evaluation, saving and steps that are slowed down by measuring happen inside `aside`. They are left out of the
    speed, which would otherwise fall after each of them. The time to go has them: the mean measured cost of one,
    times how often each is still due.

    Args:
        total_steps: steps of the whole run.
        step, tokens, seconds: where the run stands; not zero for a resumed one.
        every: steps between two occasions of each aside that recurs, by its name. 0: only at the last step.
        window: seconds of training that the speed is averaged over; never less than the last two marks.
        clock: seconds that only go up.
    """

    def __init__(
        self,
        *,
        total_steps: int,
        step: int = 0,
        tokens: int = 0,
        seconds: float = 0.0,
        every: Mapping[str, int] | None = None,
        window: float = 30.0,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._total = total_steps
        self._every = dict(every or {})
        self._window = window
        self._clock = clock
        self._began = clock() - seconds
        self._step = step
        self._paused = 0.0
        self._costs: dict[str, list[float]] = {}
        self._slow: Mark = (0.0, 0, 0)  # steps taken aside
        self._first: Mark = (clock(), step, tokens)
        self._marks = deque([self._first])  # without what happened aside

    def mark(self, step: int, tokens: int) -> None:
        """Note that `step` steps and `tokens` tokens of the whole run are done (on CUDA: and synchronised)."""
        self._step = step
        self._marks.append((self._clock() - self._paused, step - self._slow[1], tokens - self._slow[2]))
        while len(self._marks) > 2 and self._marks[-1][0] - self._marks[1][0] >= self._window:
            self._marks.popleft()

    @contextlib.contextmanager
    def aside(self, name: str, *, steps: int = 0, tokens: int = 0) -> Iterator[None]:
        """Leave what happens inside out of the speed, the steps and tokens it trains on included. Not to be nested."""
        began = self._clock()
        try:
            yield
        finally:
            cost = self._clock() - began
            self._paused += cost
            self._costs.setdefault(name, []).append(cost)
            if steps:
                self._slow = (self._slow[0] + cost, self._slow[1] + steps, self._slow[2] + tokens)

    @property
    def tokens_per_second(self) -> float:
        """Speed of training over the window; 0 before the first mark."""
        return self._speed(self._marks[0], 2)

    @property
    def average(self) -> float:
        """Tokens per second of training since this process began."""
        return self._speed(self._first, 2)

    @property
    def seconds(self) -> float:
        """Wall time of the whole run so far, asides and interrupted parts included."""
        return self._clock() - self._began

    @property
    def eta(self) -> float | None:
        """Seconds until the last step is done, evaluated and saved; None before there is a speed."""
        speed = self._speed(self._marks[0], 1)
        if not speed:
            return None
        pause = sum(
            occasions(every, self._step, self._total) * sum(costs) / len(costs)
            for name, every in self._every.items()
            if (costs := self._costs.get(name))
        )
        return (self._total - self._step) / speed + pause

    def _speed(self, first: Mark, field: int) -> float:
        """Steps (field 1) or tokens (2) per second since a mark; of the steps taken aside until there are others."""
        last = self._marks[-1]
        if last[1] > first[1]:
            return (last[field] - first[field]) / max(last[0] - first[0], 1e-9)
        return self._slow[field] / self._slow[0] if self._slow[0] > 0 else 0.0


def occasions(every: int, step: int, total: int) -> int:
    """Count the steps after `step` and up to `total` that are a multiple of `every` or the last one."""
    if step >= total:
        return 0
    if every < 1:
        return 1
    return total // every - step // every + (total % every != 0)
