"""The display: what it shows on a terminal and off it, and that it never stops a run."""

import io
import math
import os
import pty
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from trainer.display import panel
from trainer.display.panel import render, share_cells, sparks
from trainer.display.progress import Progress
from trainer.display.units import count_text, duration_text
from trainer.display.view import CURVE, RunInfo, Trend, View
from trainer.memory import KINDS

MIB = 2**20
INFO = RunInfo(
    name="quickstart",
    model="llama_tiny",
    parameters=3_418_624,
    optimizer="galore",
    device="cpu",
    precision="fp32",
    run_dir=Path("runs/quickstart/now"),
)
MEMORY = {"weights": 13 * MIB, "gradients": 12 * MIB, "states": 8 * MIB, "activations": 41 * MIB, "workspace": 5 * MIB}
RECORD: dict[str, Any] = {
    "step": 120,
    "tokens": 491520,
    "loss": 3.25,
    "lr": 9.1e-3,
    "grad_norm": 0.8312,
    "tokens_per_second": 24310.4,
    "seconds": 32.0,
    "memory": MEMORY,
    "skipped": None,
    "eta": 48.0,
}
EVALUATION = {"step": 100, "tokens": 1, "seconds": 27.0, "eval_loss": 3.5, "eval_perplexity": 33.1155, "eta": 50.0}


class Clock:
    now = 50.0

    def __call__(self) -> float:
        return self.now


def drawn(view: View, width: int, color: bool = True) -> str:
    console = Console(record=True, width=width, file=io.StringIO(), force_terminal=True, color_system="truecolor")
    console.print(render(view, width, color))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_panel_shows_every_fact_in_one_piece(width: int) -> None:
    view = View(info=INFO, total_steps=300, clock=Clock())
    view.take(EVALUATION)
    view.take({**RECORD, "skipped": 2})
    text = drawn(view, width)
    for fact in (
        *("quickstart", "2 skipped", "llama_tiny (3.42M parameters)", "galore", "1 process on cpu", "fp32"),
        *("120/300", "40%", "0:32 gone", "0:48 left"),
        *("3.2500", "3.5000", "33.12", "9.10e-03", "0.831", "24,310"),
        *(
            word
            for kind in KINDS
            for word in (kind, f"{MEMORY[kind] / MIB:.{2 if MEMORY[kind] < 10 * MIB else 1}f} MiB")
        ),
        "peak 79.0 MiB",
    ):
        assert fact in text, f"{fact} is missing at {width} columns:\n{text}"
    assert "…" not in text
    assert {len(line) for line in text.splitlines()} == {min(width, panel.WIDEST)}


def test_a_phase_shows_in_the_border_until_it_is_over() -> None:
    view = View(info=INFO, total_steps=300)
    view.phase = "evaluating held-out text 3/8"
    assert "evaluating held-out text 3/8" in drawn(view, 80).splitlines()[-1]
    view.phase = ""
    assert "evaluating" not in drawn(view, 80)


def test_kinds_can_be_told_apart_without_colour() -> None:
    view = View(info=INFO, total_steps=300)
    view.take(RECORD)
    bar = next(line for line in drawn(view, 100, color=False).splitlines() if "peak" in line)
    runs = re.findall(r"([█▓▒░╳])\1*", bar)
    assert runs == list("█▓▒░╳")


def test_a_loss_that_is_not_finite_is_shown_and_leaves_trend_and_curve_alone() -> None:
    view = View(info=INFO, total_steps=300)
    view.take({**RECORD, "loss": 5.0, "step": 10})
    view.take({**RECORD, "loss": math.nan, "step": 20})
    assert "nan" in drawn(view, 80)
    assert (view.trend.count, list(view.curve.values())) == (1, [5.0])


def test_time_to_go_runs_down_between_records() -> None:
    clock = Clock()
    view = View(info=INFO, total_steps=300, clock=clock)
    assert view.left is None
    view.take(RECORD)
    clock.now += 8
    assert (view.elapsed, view.left) == (40.0, 40.0)
    clock.now += 100
    assert view.left == 0.0


def test_a_resumed_run_shows_where_it_goes_on() -> None:
    assert "200/300" in drawn(View(info=INFO, total_steps=300, start_step=200), 80)


@pytest.mark.parametrize(
    ("losses", "arrow"),
    [
        ([5, 4, 3, 2], "↘"),
        ([2, 3, 4, 5], "↗"),
        ([3, 3.001, 3, 3.001], "→"),
        ([3], " "),
        ([9, 5, 4, 4.1, 3.9, 4.1], "↘"),
    ],
    ids=str,
)
def test_the_arrow_says_where_the_smoothed_loss_goes(losses: list[float], arrow: str) -> None:
    trend = Trend()
    for loss in losses:
        trend.add(loss)
    assert trend.arrow == arrow


def test_the_small_curve_ends_where_the_bar_does() -> None:
    line = sparks({0: 5.0, CURVE // 4: 3.0, CURVE // 2: 1.0}, 80)
    assert len(line) == 41
    assert (line[0], line[20], line[40]) == ("█", "▄", "▁") or (line[0], line[20], line[40]) == ("█", "▅", "▁")


@given(st.lists(st.integers(0, 2**40), min_size=1, max_size=7), st.integers(10, 120))
def test_the_bar_is_full_and_shows_every_kind_that_holds_something(amounts: list[int], cells: int) -> None:
    shares = share_cells(amounts, cells)
    assert sum(shares) == (cells if any(amounts) else 0)
    assert all(
        (share > 0) == (amount > 0) or share > 0 for share, amount in zip(shares, amounts, strict=True) if amount
    )
    assert all(share == 0 for share, amount in zip(shares, amounts, strict=True) if not amount)
    if any(amounts):
        exact = [cells * amount / sum(amounts) for amount in amounts]
        assert all(abs(share - part) < len(amounts) for share, part in zip(shares, exact, strict=True))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0:00"),
        (59.6, "1:00"),
        (725, "12:05"),
        (3723, "1:02:03"),
        (273900, "3d 04:05"),
        (None, "-"),
        (math.inf, "-"),
    ],
)
def test_durations_read_as_clocks(seconds: float | None, text: str) -> None:
    assert duration_text(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(512, "512"), (3_418_624, "3.42M"), (6.74e9, "6.74B"), (9_999, "10.0K")])
def test_counts_have_three_digits(count: float, text: str) -> None:
    assert count_text(count) == text


def plain_run(capsys: pytest.CaptureFixture[str], enabled: bool = True) -> list[str]:
    with Progress.open(INFO, 300, 0, enabled) as progress:
        progress.update(EVALUATION)
        progress.phase("saving")
        progress.notice("saved checkpoints/step_00000100")
        progress.update(RECORD)
        progress.warn("step 121 skipped")
    return capsys.readouterr().out.splitlines()


def test_off_a_terminal_each_record_is_one_line_under_one_header(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")  # as CI services do: rich takes a pipe for a terminal then
    lines = plain_run(capsys)
    assert all(line.isascii() and line.isprintable() for line in lines)
    assert "llama_tiny (3.42M parameters)" in lines[0] and "runs/quickstart/now" in lines[0]
    header, *rows = [line for line in lines[1:] if line[0] not in "*!"]
    assert len(rows) == 2 and {len(line) for line in rows} == {len(header)}
    names = header.split()
    first, second = (dict(zip(names, row.split(), strict=True)) for row in rows)
    assert (first["step"], first["held-out"], first["perplexity"], first["loss"]) == ("100/300", "3.5000", "33.12", "-")
    assert (second["step"], second["loss"], second["lr"]) == ("120/300", "3.2500", "9.10e-03")
    assert (second["grad-norm"], second["tokens/s"], second["eta"]) == ("0.831", "24,310", "0:48")
    assert (second["weights"], second["states"], second["held-out"]) == ("13.0MiB", "8.00MiB", "-")
    assert "* saved checkpoints/step_00000100" in lines and "! step 121 skipped" in lines


def test_other_processes_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    assert plain_run(capsys, enabled=False) == []


def test_a_plain_line_fits_the_encoding_of_its_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    progress = Progress.open(INFO, 300)
    progress.notice("saved /home/zoë/runs")
    assert b"* saved /home/zo?/runs" in raw.getvalue()


def test_a_lost_output_does_not_stop_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8")
    monkeypatch.setattr(sys, "stdout", stream)
    with Progress.open(INFO, 300) as progress:
        stream.close()
        progress.update(RECORD)
        progress.notice("nobody reads this")


class Terminal:
    """A pseudo terminal as standard output, read by a thread so that it never fills up."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.master, slave = pty.openpty()
        self.stream = os.fdopen(slave, "w", encoding="utf-8")
        self._read = b""
        self._monkeypatch = monkeypatch
        for name, value in {"TERM": "xterm-256color", "COLUMNS": "100", "LINES": "40"}.items():
            monkeypatch.setenv(name, value)
        for name in ("FORCE_COLOR", "NO_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE"):
            monkeypatch.delenv(name, raising=False)
        threading.Thread(target=self._drain, daemon=True).start()

    def plug(self) -> None:
        """Put it in the place of standard output; in the test itself, as pytest has its own there from then on."""
        self._monkeypatch.setattr(sys, "stdout", self.stream)

    def _drain(self) -> None:
        try:
            while data := os.read(self.master, 65536):
                self._read += data
        except OSError:  # the other end is closed
            return

    def text(self, wanted: str) -> str:
        """Return what was written up to now, once `wanted` is in it."""
        end = time.monotonic() + 5
        while wanted not in (text := self._read.decode(errors="replace")) and time.monotonic() < end:
            time.sleep(0.01)
        assert wanted in text, f"{wanted!r} never came:\n{text}"
        return text


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> Iterator[Terminal]:
    made = Terminal(monkeypatch)
    yield made
    made.stream.close()


def test_on_a_terminal_the_panel_lives_and_notices_stay_above_it(terminal: Terminal) -> None:
    terminal.plug()
    with Progress.open(INFO, 300) as progress:
        progress.update(RECORD)
        terminal.text("120/300")  # drawn by its own thread, nobody asked
        progress.phase("saving")
        terminal.text("saving")
        progress.notice("saved checkpoints/step_00000100")
        print("a library speaks")
        assert sys.stdout is not terminal.stream, "prints go above the panel"
        progress.phase("")
    text = terminal.text("\x1b[?25h")
    assert "╭─" in text and "\x1b[?25l" in text and "a library speaks" in text
    assert text.count("saved checkpoints/step_00000100") == 1
    assert sys.stdout is terminal.stream
    assert not [thread for thread in threading.enumerate() if thread.name == "progress"]


@pytest.mark.parametrize(
    ("name", "value"), [("TERM", "dumb"), ("COLUMNS", "50"), ("LINES", "10"), ("TTY_INTERACTIVE", "0")]
)
def test_a_terminal_that_cannot_redraw_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    terminal.plug()
    monkeypatch.setenv(name, value)
    with Progress.open(INFO, 300) as progress:
        progress.update(RECORD)
    assert "\x1b" not in terminal.text("3.2500")


def test_a_display_that_fails_gives_way_to_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.plug()
    with Progress.open(INFO, 300) as progress:
        progress.update(RECORD)
        terminal.text("120/300")

        def fail(*_: object) -> None:
            raise RuntimeError("no such glyph")

        monkeypatch.setattr(panel, "render", fail)
        progress.phase("evaluating")
        time.sleep(2 / panel.REFRESH)
        progress.update({**RECORD, "step": 130})
        text = terminal.text("130/300")
    assert "! display lost (RuntimeError: no such glyph), training goes on" in text
    assert text.index("\x1b[?25h") < text.index("! display lost"), "the cursor is back"
    assert sys.stdout is terminal.stream


def test_a_display_that_cannot_begin_gives_way_to_lines(terminal: Terminal, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal.plug()
    monkeypatch.setattr(panel, "render", lambda *_: 1 / 0)
    with Progress.open(INFO, 300) as progress:
        progress.update(RECORD)
    assert "120/300" in terminal.text("3.2500")
    assert sys.stdout is terminal.stream
