"""Where a run's figures go: metrics.jsonl, the display, the trackers. Ranks other than 0 tell nobody."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from parallel.launch import World
from trainer.display.progress import Progress, RunInfo
from trainer.metrics import MetricsFile
from trainer.schema import Config
from trainer.track import open_trackers


class Recorder:
    """Passes each record on to whoever listens; the same calls on every rank, an effect on rank 0."""

    def __init__(
        self, cfg: Config, world: World, folder: Path, info: RunInfo, plain_config: dict[str, Any], *, start: int
    ):
        self._leads = world.leads
        self._phase = self._beside = ""
        self._progress = Progress.open(info, cfg.train.steps, start, enabled=world.leads)
        if world.leads:
            self._metrics = MetricsFile(folder / "metrics.jsonl")
            self._metrics.rewind(start)
            self._tracker = open_trackers(cfg.track, folder, plain_config, step=start, warn=self._progress.warn)

    def record(self, record: Mapping[str, Any], eta: float | None) -> None:
        """Write one record; fields that are None were not measured."""
        if self._leads:
            self._metrics.append(record)
            self._tracker.log(dict(record), record["step"])
            self._progress.update({**record, "eta": eta})

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        """Show what is going on while no steps are taken."""
        self._phase = text
        self._show_phase()
        try:
            yield
        finally:
            self._phase = ""
            self._show_phase()

    def beside(self, text: str) -> None:
        """Show what goes on beside the steps, until the next call; "" for nothing."""
        self._beside = text
        self._show_phase()

    def _show_phase(self) -> None:
        self._progress.phase(self._phase or self._beside)

    def notice(self, text: str) -> None:
        self._progress.notice(text)

    def warn(self, text: str) -> None:
        self._progress.warn(text)

    def close(self) -> None:
        """Give the terminal back and finish the trackers; more calls do nothing."""
        self._progress.close()
        if self._leads:
            self._tracker.close()
            self._metrics.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
