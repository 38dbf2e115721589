"""The live display: what a run is doing now, as one panel of rich.

    ╭─ quickstart ───────────────────────────────────────────────────────────────────────╮
    │ llama_tiny (3.42M parameters) · galore · 1 process on cpu · fp32                   │
    │ ▇▆▅▄▃▃▂▂▁▁▁▁                                            the loss over the bar      │
    │ ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━  120/300  40%  0:32 gone, 0:48 left    │
    │ loss, held-out loss, perplexity, learning rate, gradient norm, tokens/s, captured  │
    │ bytes by kind as one bar, and its legend                                           │
    ╰─────────────────────────────────────────────────────── evaluating held-out text ───╯

`render` draws a `View`; `LivePanel` keeps the drawing fresh from a thread of its own.
"""

import math
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from trainer.display.plots import KIND_COLORS
from trainer.display.units import duration_text, number_text, perplexity_text
from trainer.display.view import CURVE, View
from trainer.memory import beside_text, format_bytes

REFRESH = 4.0
"""Looks a second for something new to draw."""
WIDEST = 120
"""Columns the panel takes at most: on wider terminals the eye would have to travel."""
MONOCHROME = {"weights": "█", "gradients": "▓", "states": "▒", "activations": "░", "workspace": "╳"}
"""Fill of each kind where there is no colour."""
SPARKS = "▁▂▃▄▅▆▇█"


def render(view: View, width: int, color: bool) -> RenderableType:
    """Draw the panel for a terminal of `width` columns."""
    width = min(width, WIDEST)
    inner = width - 4
    skipped = view.record.get("skipped", 0)
    title = Text.assemble((view.info.name, "bold default"), (f" · {skipped} skipped" if skipped else "", "bold red"))
    parts: list[RenderableType] = [Text(view.info.facts(), "dim", no_wrap=True, overflow="ellipsis"), Text()]
    parts += [*_progress(view, inner), Text(), _numbers(view)]
    if memory := view.record.get("memory"):
        parts += [Text(), *_memory(memory, view, inner, color)]
        parts += [Text(line, "dim") for line in beside_text(view.record.get("beside") or {})]
    return Panel(
        Group(*parts),
        title=title,
        title_align="left",
        subtitle=Text(view.phase, "cyan") if view.phase else None,
        subtitle_align="right",
        box=box.ROUNDED,
        border_style="bright_black",
        width=width,
        padding=(0, 1),
    )


def _progress(view: View, width: int) -> list[RenderableType]:
    """Draw the bar, and over it the loss curve on the same axis."""
    left = f", {duration_text(view.left)} left" if view.left is not None and view.step < view.total_steps else ""
    tail = Text.assemble(
        (f"  {view.step}/{view.total_steps}", "bold"),
        f"  {100 * view.step // max(view.total_steps, 1)}%",
        (f"  {duration_text(view.elapsed)} gone{left}", "dim"),
    )
    room = max(10, width - max(len(tail), 40))  # as a rule the bar keeps its length when a figure gains a digit
    bar = ProgressBar(view.total_steps, view.step, width=room, complete_style="cyan", finished_style="green")
    line = Table.grid(expand=True)
    line.add_column()
    line.add_column(justify="right", no_wrap=True)
    line.add_row(bar, tail)
    return [Text(sparks(view.curve, room), "cyan", no_wrap=True), line]


def sparks(curve: Mapping[int, float], width: int) -> str:
    """Draw values against their place (0 to CURVE) as blocks of eight heights, lowest to highest."""
    columns: dict[int, float] = {place * width // CURVE: value for place, value in curve.items()}
    if len(columns) < 2:
        return ""
    low, high = min(columns.values()), max(columns.values())
    line, block = "", " "
    for column in range(max(columns) + 1):
        if column in columns:
            share = (columns[column] - low) / (high - low) if high > low else 0.0
            block = SPARKS[round(share * (len(SPARKS) - 1))]
        line += block  # a place without a value of its own shows the one before
    return line


def _numbers(view: View) -> RenderableType:
    record, arrow = view.record, view.trend.arrow
    loss = record.get("loss")
    style = "bold" if loss is None or math.isfinite(loss) else "bold red"
    cells = [
        ("loss", Text.assemble((number_text(loss, ".4f"), style), (f" {arrow}", _hue(arrow)))),
        ("held-out", Text(number_text(record.get("eval_loss"), ".4f"), "bold")),
        ("perplexity", Text(perplexity_text(record.get("eval_perplexity")), "bold")),
        ("lr", Text(number_text(record.get("lr"), ".2e"))),
        ("grad norm", Text(number_text(record.get("grad_norm"), ".3g"))),
        ("tokens/s", Text(number_text(record.get("tokens_per_second"), ",.0f"))),
    ]
    if subspace := record.get("subspace"):
        cells.append(("captured", Text(f"{100 * subspace['captured']['median']:.0f}%")))
    return _columns([Text(name, "dim") for name, _ in cells], [value for _, value in cells])


def _hue(arrow: str) -> str:
    return {"↘": "green", "↗": "yellow"}.get(arrow, "dim")


def _memory(memory: Mapping[str, int], view: View, width: int, color: bool) -> list[RenderableType]:
    total = sum(memory.values())
    scale = max(total, view.peak, 1)
    peak = f"peak {format_bytes(scale)}"
    bar = Text(no_wrap=True)
    cells = share_cells([*memory.values(), scale - total], width - len(peak) - 2)
    for kind, count in zip(memory, cells, strict=False):
        bar.append(fill(kind, color) * count, hue(kind))
    bar.append("·" * cells[-1] + "  ", "dim")
    bar.append(peak, "dim")
    names = [Text.assemble(("■" if color else fill(kind, color), hue(kind)), (f" {kind}", "dim")) for kind in memory]
    return [bar, _columns(names, [Text(f"  {format_bytes(count)}") for count in memory.values()])]


def hue(kind: str) -> str:
    return KIND_COLORS.get(kind, "default")


def fill(kind: str, color: bool) -> str:
    return "█" if color else MONOCHROME.get(kind, "#")


def share_cells(amounts: Sequence[float], cells: int) -> list[int]:
    """Share out `cells` in proportion to `amounts`: all of them, and at least one to each amount above zero.

    What rounding down leaves goes to the largest remainders; what the small ones get extra, the largest gives.
    """
    whole = sum(amounts)
    if whole <= 0 or cells <= 0:
        return [0] * len(amounts)
    exact = [cells * amount / whole for amount in amounts]
    shares = [max(int(part), amount > 0) for part, amount in zip(exact, amounts, strict=True)]
    order = sorted(range(len(amounts)), key=lambda i: exact[i] - int(exact[i]), reverse=True)
    for i in order[: max(0, cells - sum(shares))]:
        shares[i] += 1
    while sum(shares) > cells and max(shares) > 1:
        shares[shares.index(max(shares))] -= 1
    return shares


def _columns(heads: Sequence[Text], values: Sequence[Text]) -> Table:
    grid = Table.grid(expand=True)
    for _ in heads:
        grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    grid.add_row(*heads)
    grid.add_row(*values)
    return grid


class LivePanel:
    """Keeps the panel at the foot of the terminal; what is printed meanwhile scrolls above it.

    A failure to draw ends the display, never the caller: `failed` says so, and the drawing thread is gone.
    """

    def __init__(self, console: Console, view: View) -> None:
        self._console = console
        self._view = view
        self.failed: Exception | None = None
        self._live = Live(
            console=console,
            get_renderable=self._draw,
            auto_refresh=False,
            redirect_stderr=sys.stderr.isatty(),  # `2> errors.log` means what it says
            vertical_overflow="crop",
        )
        self._live.start(refresh=True)
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._refresh, name="progress", daemon=True)
        self._thread.start()

    def update(self, record: Mapping[str, Any]) -> None:
        self._view.take(record)

    def phase(self, text: str) -> None:
        self._view.phase = text

    def say(self, mark: str, text: str, style: str) -> None:
        grid = Table.grid(padding=(0, 1, 0, 0))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")  # a long path is broken, not cut
        grid.add_row(Text(mark, style), Text(text, style))
        self._console.print(grid)

    def close(self) -> None:
        """Draw the last state, leave it on the screen and give the terminal back."""
        self._closing.set()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=2)
        self._live.stop()

    def _draw(self) -> RenderableType:
        color = self._console.color_system is not None and not self._console.no_color
        return render(self._view, self._console.width, color)

    def _refresh(self) -> None:
        shown: object = None
        while not self._closing.wait(1 / REFRESH):
            try:
                if (facts := self._facts()) != shown:  # a redraw holds the interpreter for 3 ms
                    self._live.refresh()
                    shown = facts
            except Exception as error:  # a closed terminal, say: the training thread will read it
                self.failed = error
                return

    def _facts(self) -> object:
        """Return what a new drawing would show another of."""
        return self._view.told, self._view.phase, int(self._view.elapsed), self._console.size
