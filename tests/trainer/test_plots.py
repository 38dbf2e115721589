"""The pictures are drawn to size, from whatever a run has measured, and show what the numbers say."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import imread
from torch import nn

from trainer.display.plots import KIND_COLORS, merge_steps, phase_runs, plot_loss, plot_memory, series, smooth
from trainer.memory import KINDS, MemoryMeter, Timeline, format_bytes


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Every figure that is saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def note_and_save(self: Figure, *args: Any, **named: Any) -> None:
        figures.append(self)
        save(self, *args, **named)

    monkeypatch.setattr(Figure, "savefig", note_and_save)
    return figures


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for place in (figure, *figure.axes) for text in place.texts]


def counted(micros: int) -> Timeline:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 256), nn.Tanh(), nn.Linear(256, 8))
    optimizer = torch.optim.AdamW(model.parameters())
    meter = MemoryMeter(model, optimizer, torch.device("cpu"))
    with meter.count_step() as timeline:
        for _ in range(micros):
            with meter.phase("forward"):
                loss = model(torch.randn(512, 64)).sum()
            with meter.phase("backward"):
                loss.backward()
        with meter.phase("step"):
            optimizer.step()
    return timeline


@pytest.mark.parametrize("micros", [1, 3, 30])
def test_the_memory_plot_stacks_the_kinds_and_names_the_peak(tmp_path: Path, drawn: list[Figure], micros: int) -> None:
    timeline = counted(micros)
    plot_memory(timeline, tmp_path / "memory.png")
    image = imread(tmp_path / "memory.png")
    assert image.shape[:2] == (900, 1600)
    colors = (image[..., :3] * 255).round().astype(int)
    for kind in KINDS:  # each shows in the stack, left of the legend
        wanted = np.array([int(KIND_COLORS[kind][i : i + 2], 16) for i in (1, 3, 5)])
        assert (abs(colors[:, :1280] - wanted).sum(-1) <= 3).sum() > 20, f"{kind} does not show"
    (figure,) = drawn
    shown = texts(figure)
    assert f"peak {format_bytes(timeline.peak.total)}" in shown
    assert f"at the peak, in {timeline.peak.phase}" in shown
    assert ("forward" in shown) == (micros < 12), "names of phases only where they have room"


def test_the_allocators_peak_is_shown_where_there_is_one(tmp_path: Path, drawn: list[Figure]) -> None:
    timeline = counted(1)
    highest = int(timeline.total.max())
    timeline.allocator = dict.fromkeys(timeline.peak_by_phase, (2 * highest, highest))
    plot_memory(timeline, tmp_path / "memory.png")
    (axes,) = drawn[0].axes
    (peak,) = (line for line in axes.lines if line.get_marker() == "o")
    assert peak.get_ydata()[0] * 2**20 == pytest.approx(2 * highest)
    assert axes.get_ylim()[1] * 2**20 > 2 * highest


def test_gaps_between_phases_go_to_the_phase_before() -> None:
    names = ["between", "a", "a", "between", "b", "b", "a", "between"]
    assert phase_runs(names) == [("a", 1, 4), ("b", 4, 6), ("a", 6, 7)]
    assert phase_runs(["between"]) == []


def record(step: int, **values: Any) -> dict[str, Any]:
    return {"step": step, "tokens": 100 * step, "loss": 5 * math.exp(-step / 20) + 1, "lr": 1e-3, **values}


RECORDS = {
    "a run": [record(step, **({"eval_loss": 2.0} if step % 20 == 0 else {})) for step in range(100)],
    "one line": [record(1)],
    "nothing": [],
    "only an evaluation": [{"step": 0, "eval_loss": 5.5}],
    "gaps": [record(1), record(2, loss=None, lr=None), record(3, loss=float("nan")), record(4, loss=float("inf"))],
    "rate zero": [record(step, lr=0.0) for step in range(5)],
}


@pytest.mark.parametrize("case", RECORDS)
def test_the_loss_plot_takes_whatever_was_measured(tmp_path: Path, case: str) -> None:
    with np.errstate(all="raise"):
        plot_loss(RECORDS[case], tmp_path / "loss.png")
    assert imread(tmp_path / "loss.png").shape[:2] == (900, 1600)


def test_the_loss_plot_shows_each_series_at_its_steps(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_loss(RECORDS["a run"], tmp_path / "loss.png")
    (figure,) = drawn
    axes, rate = figure.axes
    raw, smoothed, heldout = axes.lines
    assert list(raw.get_xdata()) == list(range(100)) and raw.get_ydata()[0] == 6
    assert list(heldout.get_xdata()) == [0, 20, 40, 60, 80]
    assert len(smoothed.get_ydata()) == 100 and smoothed.get_alpha() is None and raw.get_alpha() < 0.5
    assert [label.get_text() for label in rate.get_yticklabels()] == ["0", "0.001"]
    assert "held-out loss 2.000 at the start, 2.000 at the end" in texts(figure)


def test_a_resumed_runs_repeated_steps_count_once_and_the_later_wins() -> None:
    merged = merge_steps([record(2), record(1, eval_loss=3.0), record(1, loss=9.0)])
    assert list(merged) == [1, 2] and merged[1]["loss"] == 9.0 and merged[1]["eval_loss"] == 3.0
    steps, values = series(merged, "eval_loss")
    assert steps.tolist() == [1] and values.tolist() == [3.0]


def test_smoothing_keeps_level_and_time() -> None:
    assert smooth(np.full(50, 3.0)) == pytest.approx(3.0)
    ramp = np.arange(200.0)
    assert smooth(ramp)[20:-20] == pytest.approx(ramp[20:-20]), "it lags behind nothing"
    noise = np.random.default_rng(0).normal(size=600)
    assert smooth(noise).std() < 0.3 * noise.std()


def test_neighbours_in_the_stack_differ_in_lightness_too() -> None:
    """Told apart in grey print: luminance as in WCAG 2."""
    weights = np.array([0.2126, 0.7152, 0.0722])
    light = [float(np.array(to_rgb(KIND_COLORS[kind])) ** 2.2 @ weights) for kind in KINDS]
    assert all((max(a, b) + 0.05) / (min(a, b) + 0.05) > 1.15 for a, b in zip(light, light[1:], strict=False))
