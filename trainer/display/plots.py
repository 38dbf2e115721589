"""The pictures of a run: memory over one step, loss over the whole run.

matplotlib is imported inside the functions, and drawn on without pyplot: no display, no global state.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trainer.memory import KINDS, Timeline, format_bytes
from trainer.memory.timeline import BETWEEN

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

KIND_COLORS = {
    "weights": "#0072B2",
    "gradients": "#D55E00",
    "states": "#44A5DE",
    "activations": "#F0B030",
    "workspace": "#D2D2D2",
}
"""One colour a kind wherever kinds are shown; told apart by colour-blind eyes and in grey (after Okabe, Ito 2008)."""

INK, MUTED, FAINT = "#222222", "#6B6B6B", "#DDDDDD"
STYLE = {
    "font.family": "sans-serif",
    "font.sans-serif": ["Inter", "Helvetica Neue", "Arial", "Liberation Sans", "DejaVu Sans"],
    "font.size": 13,
    "text.color": INK,
    "axes.labelcolor": MUTED,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
SIZE, DPI = (16.0, 9.0), 100


def plot_memory(timeline: Timeline, path: Path, *, title: str = "Memory over one training step") -> None:
    """Draw the bytes by kind over one counted step, stacked, with phases and the peak. 1600 x 900 pixels.

    Args:
        timeline: of a step that has been counted.
        path: PNG to write.
    """
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        figure.subplots_adjust(left=0.075, right=0.80, top=0.85, bottom=0.09)
        total = timeline.total
        divisor, unit = byte_scale(int(total.max()))
        draw_phases(axes, timeline)
        draw_stack(axes, timeline.bytes_by_kind / divisor)
        peak = timeline.peak
        draw_peak(axes, peak.sample / len(total), peak.sample, peak.total / divisor, format_bytes(peak.total))
        if timeline.allocator:  # whose peak may lie above the stack
            axes.axhline(peak.total / divisor, color=INK, linewidth=1.0, linestyle=(0, (4, 3)))
        axes.set_xlim(0, max(len(total) - 1, 1))
        axes.set_ylim(0, max(peak.total, int(total.max())) / divisor * 1.12)
        axes.set_ylabel(unit)
        axes.set_xlabel("operators run")
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        draw_legend(figure, peak.by_kind, peak.total, f"at the peak, in {peak.phase}")
        head(figure, title, f"live bytes after every operator, on {timeline.device}")
        figure.savefig(path, dpi=DPI)


def draw_stack(axes: "Axes", scaled: NDArray[np.float64]) -> None:
    """Stack (kinds, samples) values, weights at the bottom; a sample lasts until the next."""
    samples = np.arange(scaled.shape[1])
    base = np.zeros(scaled.shape[1])
    for kind, values in zip(KINDS, scaled, strict=True):
        top = base + values
        axes.fill_between(samples, base, top, step="post", color=KIND_COLORS[kind], linewidth=0)
        base = top
    axes.step(samples, base, where="post", color=INK, linewidth=1.0)


def draw_peak(axes: "Axes", along: float, x: int, y: float, text: str) -> None:
    """Mark the peak, its name on the side where there is room; `along` is the share of the width to its left."""
    axes.plot([x], [y], "o", color=INK, markersize=7, zorder=5, clip_on=False)
    side = -1 if along > 0.75 else 1
    axes.annotate(
        f"peak {text}",
        (x, y),
        xytext=(12 * side, 9),
        textcoords="offset points",
        ha="right" if side < 0 else "left",
        fontsize=15,
        fontweight="bold",
    )


def draw_phases(axes: "Axes", timeline: Timeline) -> None:
    """Shade every second phase and name each above the plot, where the name has room."""
    runs = phase_runs(timeline.phases())
    letter = 0.011 * len(timeline)
    free_from = -letter
    for index, (name, first, last) in enumerate(runs):
        if index % 2 == 0:
            axes.axvspan(first, last, color="#F3F3F3", linewidth=0, zorder=0)
        if index:
            axes.axvline(first, color="#C8C8C8", linewidth=0.8, zorder=0.5)
        half = letter * len(name) / 2
        center = max((first + last) / 2, free_from + half)  # a short phase's name may stand a little to its right
        if center - (first + last) / 2 < 5 * letter and len(runs) <= 24:
            axes.text(
                center,
                1.012,
                name,
                transform=axes.get_xaxis_transform(),
                ha="center",
                va="bottom",
                color=MUTED,
                fontsize=13,
            )
            free_from = center + half


def phase_runs(names: Sequence[str]) -> list[tuple[str, int, int]]:
    """(phase, first, last) of each stretch of equal names; the gaps between phases go to the phase before."""
    runs: list[tuple[str, int, int]] = []
    for sample, name in enumerate(names):
        if runs and (name == runs[-1][0] or name == BETWEEN):
            runs[-1] = (runs[-1][0], runs[-1][1], sample)
        elif name != BETWEEN:
            runs.append((name, sample, sample))
    return [(name, first, runs[i + 1][1] if i + 1 < len(runs) else last) for i, (name, first, last) in enumerate(runs)]


def draw_legend(figure: "Figure", by_kind: Mapping[str, int], total: int, heading: str) -> None:
    """List the kinds in the order of the stack, with their bytes, to the right of the plot."""
    from matplotlib.patches import Rectangle

    left, top, line = 0.82, 0.80, 0.052
    figure.text(left, top, heading, color=MUTED, fontsize=13)
    for row, kind in enumerate(reversed(KINDS), start=1):
        y = top - row * line
        figure.add_artist(
            Rectangle((left, y - 0.002), 0.011, 0.02, transform=figure.transFigure, color=KIND_COLORS[kind], lw=0)
        )
        figure.text(left + 0.018, y, kind, fontsize=14)
        figure.text(0.975, y, format_bytes(by_kind[kind]), fontsize=14, ha="right")
    y = top - (len(KINDS) + 1) * line
    figure.text(left + 0.018, y, "total", fontsize=14, fontweight="bold")
    figure.text(0.975, y, format_bytes(total), fontsize=14, fontweight="bold", ha="right")


def plot_loss(records: Iterable[Mapping[str, Any]], path: Path, *, title: str = "Loss") -> None:
    """Draw the training loss (each value faint, smoothed strong), the held-out loss and the learning rate.

    Args:
        records: lines of metrics.jsonl. Of two with the same step the later counts: a resumed run repeats steps.
        path: PNG to write; 1600 x 900 pixels.
    """
    import matplotlib
    from matplotlib.ticker import MaxNLocator

    by_step = merge_steps(records)
    with matplotlib.rc_context(STYLE):
        figure, (axes, rate) = new_figure(heights=(6, 1))
        figure.subplots_adjust(left=0.075, right=0.97, top=0.83, bottom=0.07, hspace=0.17)
        draw_losses(axes, by_step)
        draw_rate(rate, by_step)
        for panel in (axes, rate):
            panel.grid(axis="y", color=FAINT, linewidth=0.8)
            panel.set_xlim(0, max([*by_step, 1]))
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.tick_params(axis="x", labelbottom=False)
        name_ticks(rate, "step", "bottom")
        token_axis(axes, by_step)
        head(figure, title, summary(by_step))
        figure.savefig(path, dpi=DPI)


def draw_losses(axes: "Axes", by_step: Mapping[int, Mapping[str, Any]]) -> None:
    """Training and held-out loss on one axis."""
    steps, losses = series(by_step, "loss")
    train, heldout = KIND_COLORS["weights"], KIND_COLORS["gradients"]
    axes.plot(steps, losses, color=train, linewidth=1.0, alpha=0.28)
    axes.plot(steps, smooth(losses), color=train, linewidth=2.4, label="training, smoothed", solid_capstyle="round")
    held_steps, held = series(by_step, "eval_loss")
    if len(held):
        axes.plot(
            held_steps,
            held,
            "o-",
            color=heldout,
            linewidth=1.4,
            markersize=7,
            markeredgecolor="white",
            label="held out",
            clip_on=False,
            zorder=4,
        )
    if len(steps) or len(held):
        axes.legend(frameon=False, loc="upper right", fontsize=14)
    axes.set_ylabel("loss, nats per token")


def draw_rate(axes: "Axes", by_step: Mapping[int, Mapping[str, Any]]) -> None:
    """The learning rate, on an axis that names only nought and the highest."""
    steps, rates = series(by_step, "lr")
    axes.plot(steps, rates, color=MUTED, linewidth=1.8)
    highest = max([*rates, 0.0]) or 1.0
    axes.set_ylim(0, highest * 1.2)
    axes.set_yticks([0, highest], ["0", f"{highest:.3g}"])
    axes.text(0, 1.03, " learning rate", transform=axes.transAxes, va="bottom", color=MUTED, fontsize=13)


def name_ticks(axes: "Axes", name: str, side: str) -> None:
    """Write what an x axis counts to the left of its numbers, where it costs no height."""
    up = 1 if side == "top" else -1
    axes.annotate(
        name,
        (0, up > 0),
        xycoords="axes fraction",
        xytext=(-26, up * 8),
        textcoords="offset points",
        ha="right",
        va="bottom" if up > 0 else "top",
        color=MUTED,
        fontsize=13,
    )


def token_axis(axes: "Axes", by_step: Mapping[int, Mapping[str, Any]]) -> None:
    """Say above the plot how many tokens had been trained on."""
    steps, tokens = series(by_step, "tokens")
    if len(steps) < 2 or tokens[-1] <= tokens[0]:
        return
    slope = (tokens[-1] - tokens[0]) / (steps[-1] - steps[0])
    start = tokens[0] - slope * steps[0]
    above = axes.secondary_xaxis("top", functions=(lambda s: start + slope * s, lambda t: (t - start) / slope))
    above.xaxis.set_major_formatter(lambda value, _: short_count(value))
    above.spines["top"].set_visible(True)
    name_ticks(axes, "tokens", "top")


def merge_steps(records: Iterable[Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    """Records by step, in order; later ones complete and replace earlier ones of the same step."""
    found: dict[int, dict[str, Any]] = {}
    for record in records:
        found.setdefault(int(record["step"]), {}).update(record)
    return dict(sorted(found.items()))


def series(by_step: Mapping[int, Mapping[str, Any]], key: str) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """(steps, values) of the records that have a finite `key`."""
    pairs = [(step, record[key]) for step, record in by_step.items() if record.get(key) is not None]
    points = np.array(pairs, np.float64).reshape(-1, 2)
    points = points[np.isfinite(points[:, 1])]
    return points[:, 0], points[:, 1]


def smooth(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Mean weighted by nearness, over about a twentieth of the run to both sides: it lags behind nothing."""
    if len(values) < 3:
        return values
    width = len(values) / 60
    reach = min(int(3 * width) + 1, (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / width) ** 2)
    sums: NDArray[np.float64] = np.convolve(values, kernel, "same")
    return sums / np.convolve(np.ones_like(values), kernel, "same")


def summary(by_step: Mapping[int, Mapping[str, Any]]) -> str:
    """Where the held-out loss, or else the training loss, began and ended."""
    for key, name in (("eval_loss", "held-out loss"), ("loss", "training loss")):
        _, values = series(by_step, key)
        if len(values) > 1:
            return f"{name} {values[0]:.3f} at the start, {values[-1]:.3f} at the end"
        if len(values):
            return f"{name} {values[0]:.3f}"
    return "nothing measured yet"


def new_figure(heights: tuple[int, ...] = (1,)) -> tuple["Figure", Any]:
    """A figure of 1600 x 900 pixels, with one panel or several of the given heights over a common x axis."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=SIZE, dpi=DPI)
    FigureCanvasAgg(figure)
    return figure, figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)


def head(figure: "Figure", title: str, subtitle: str) -> None:
    """Title and what is shown, flush with the plot's left edge."""
    figure.text(0.075, 0.945, title, fontsize=21, fontweight="bold")
    figure.text(0.075, 0.908, subtitle, fontsize=14, color=MUTED)


def byte_scale(largest: int) -> tuple[int, str]:
    """Divisor and unit in which an axis up to `largest` bytes reads best."""
    for divisor, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if largest >= divisor:
            return divisor, unit
    return 1, "bytes"


def short_count(value: float) -> str:
    """Counts on an axis: 0, 500k, 1.5M, 2B."""
    for divisor, unit in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= divisor:
            return f"{value / divisor:g}{unit}"
    return f"{value:g}"
