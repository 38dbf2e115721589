"""Between backward and update: who still reads weights and states, and must be done before they change."""

from collections.abc import Callable


class Gate:
    """The step opens it before it writes to any weight or state; whoever reads them beside it holds it shut."""

    def __init__(self) -> None:
        self._holders: list[Callable[[], None]] = []

    def hold(self, wait: Callable[[], None]) -> None:
        """Have `wait` called before the next update; it returns when the weights may change."""
        self._holders.append(wait)

    def open(self) -> None:
        """Wait for all holders, and let them go."""
        while self._holders:
            self._holders.pop()()
