"""Progress of a run on the screen: a live panel on a terminal, one aligned line a logged step anywhere else.

Only process 0 shows anything. A display that fails is replaced by plain lines, and those by silence: training goes on.
"""

import contextlib
import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Protocol, Self, TextIO

from rich.console import Console

from trainer.display.panel import LivePanel
from trainer.display.units import duration_text, number_text, perplexity_text
from trainer.display.view import RunInfo, View
from trainer.memory import KINDS, format_bytes

__all__ = ["Progress", "RunInfo"]


COLUMNS: list[tuple[str, int, Callable[[Mapping[str, Any]], str]]] = [
    ("loss", 8, lambda r: number_text(r.get("loss"), ".4f")),
    ("lr", 8, lambda r: number_text(r.get("lr"), ".2e")),
    ("grad-norm", 9, lambda r: number_text(r.get("grad_norm"), ".3g")),
    ("tokens/s", 9, lambda r: number_text(r.get("tokens_per_second"), ",.0f")),
    ("eta", 8, lambda r: duration_text(r.get("eta")).replace(" ", "")),
    ("held-out", 8, lambda r: number_text(r.get("eval_loss"), ".4f")),
    ("perplexity", 10, lambda r: perplexity_text(r.get("eval_perplexity"))),
]
"""Of a plain line, after its step: title, width, text. No text holds a blank, so that scripts can split a line."""


class Display(Protocol):
    """One way to show a run. Any call may raise; the next way then takes over."""

    @property
    def failed(self) -> Exception | None:
        """What ended it, if that happened between calls."""

    def update(self, record: Mapping[str, Any]) -> None: ...
    def phase(self, text: str) -> None: ...
    def say(self, mark: str, text: str, style: str) -> None: ...
    def close(self) -> None: ...


class Silence:
    """Shows nothing: on processes other than the first, and as the last resort."""

    failed = None

    def update(self, record: Mapping[str, Any]) -> None: ...
    def phase(self, text: str) -> None: ...
    def say(self, mark: str, text: str, style: str) -> None: ...
    def close(self) -> None: ...


class PlainLines(Silence):
    """One aligned line a record, a header before the first, each flushed: for pipes, log files and CI. ASCII only.

    Phases are left out: a log keeps what was, not what is going on.
    """

    def __init__(self, stream: TextIO, info: RunInfo, total_steps: int) -> None:
        self._stream = stream
        self._steps = total_steps
        self._headed = False
        where = f" -> {info.run_dir}" if info.run_dir else ""
        self._print(f"{info.name}: {info.facts(', ')}{where}")

    def update(self, record: Mapping[str, Any]) -> None:
        width = 2 * len(str(self._steps)) + 1
        if not self._headed:
            self._headed = True
            titles = [title.rjust(size) for title, size, _ in COLUMNS] + [kind.rjust(_room(kind)) for kind in KINDS]
            self._print(" ".join(["step".rjust(width), *titles]))
        memory = record.get("memory") or {}
        cells = [text(record).rjust(size) for _, size, text in COLUMNS]
        cells += [(_short(memory[kind]) if kind in memory else "-").rjust(_room(kind)) for kind in KINDS]
        self._print(" ".join([f"{record.get('step')}/{self._steps}".rjust(width), *cells]))

    def say(self, mark: str, text: str, style: str) -> None:
        self._print(f"{mark} {text}")

    def _print(self, line: str) -> None:
        encoding = self._stream.encoding or "utf-8"
        print(line.encode(encoding, "replace").decode(encoding), file=self._stream, flush=True)


def _short(count: int) -> str:
    return format_bytes(count).replace(" ", "").replace(",", "")


def _room(kind: str) -> int:
    return max(len(kind), len("9.99MiB"))


class Progress:
    """What the training loop tells a run's progress to; made by `Progress.open`. None of its calls raises."""

    def __init__(self, ways: list[Callable[[], Display]]) -> None:
        self._ways = ways  # in the order in which they are tried
        self._display: Display = Silence()
        self._next_way()

    @classmethod
    def open(cls, info: RunInfo, total_steps: int, start_step: int = 0, enabled: bool = True) -> Self:
        """Begin to show a run of `total_steps` steps that stands at `start_step`.

        Args:
            enabled: False on all processes but the first.
        """
        ways: list[Callable[[], Display]] = []
        if enabled:
            stream = sys.stdout
            console = Console(file=stream)
            if is_live(console):
                view = View(info=info, total_steps=total_steps, start_step=start_step)
                ways.append(lambda: LivePanel(console, view))
            ways.append(lambda: PlainLines(stream, info, total_steps))
        return cls(ways)

    def update(self, record: Mapping[str, Any]) -> None:
        """Show a record of `metrics.jsonl`, with `eta` (seconds) besides. Fields may be missing or None."""
        self._tell(lambda display: display.update(record))

    def phase(self, text: str) -> None:
        """Show what is going on while no steps are taken, until the next call; "" for nothing."""
        self._tell(lambda display: display.phase(text))

    def notice(self, text: str) -> None:
        """Say something that stays on the screen."""
        self._tell(lambda display: display.say("*", text, ""))

    def warn(self, text: str) -> None:
        """Say something that stays on the screen and should be seen."""
        self._tell(lambda display: display.say("!", text, "yellow"))

    def close(self) -> None:
        """Leave the last state on the screen and give the terminal back; calls after it do nothing."""
        self._tell(lambda display: display.close())
        self._ways, self._display = [], Silence()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _tell(self, action: Callable[[Display], None]) -> None:
        while True:  # ends with Silence at the latest
            try:
                if self._display.failed is not None:
                    raise self._display.failed
                return action(self._display)
            except Exception as error:
                with contextlib.suppress(Exception):
                    self._display.close()
                self._next_way()
                with contextlib.suppress(Exception):
                    self._display.say("!", f"display lost ({type(error).__name__}: {error}), training goes on", "")

    def _next_way(self) -> None:
        self._display = Silence()
        while self._ways:
            way = self._ways.pop(0)
            with contextlib.suppress(Exception):
                self._display = way()
                return


def is_live(console: Console) -> bool:
    """Whether a panel can be redrawn in place: a real terminal, wide and high enough, that shows what it is drawn with.

    rich alone would say yes to a pipe where FORCE_COLOR is set, as CI services do.
    """
    return (
        console.file.isatty()
        and console.is_interactive  # not where TERM=dumb
        and not console.is_jupyter
        and console.encoding.lower().replace("-", "") == "utf8"
        and console.width >= 60
        and console.height >= 16
    )
