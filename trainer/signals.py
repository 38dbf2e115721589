"""SIGTERM and SIGINT: the first asks for a clean end, a second one ends at once."""

import os
import signal
import sys
import time
from types import FrameType, TracebackType
from typing import Any, Self

SAME_REQUEST_SECONDS = 1.0
"""A launcher passes on a Ctrl-C that the terminal has already sent to every process: one request, two signals."""


SHOW_CURSOR = b"\x1b[?25h"
"""The live display hides it, and would not come to show it again."""


class Interrupted(Exception):
    """The run ended early, cleanly saved, because a signal asked for it. Exit code 128 + signal."""

    def __init__(self, number: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + number


class StopRequest:
    """Context that turns the first SIGTERM or SIGINT into a number the loop reads between steps."""

    def __init__(self) -> None:
        self.number = 0
        self._received_at = 0.0
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Self:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.number and now - self._received_at > SAME_REQUEST_SECONDS:
            if sys.stdout.isatty():
                os.write(sys.stdout.fileno(), SHOW_CURSOR)
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        if not self.number:
            self.number, self._received_at = number, now
