"""The picture of held-out loss by position: what a model makes of a long text, before and after training."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from trainer.display.plots import DPI, FAINT, KIND_COLORS, STYLE, head, merge_steps, new_figure

FIRST, LAST = KIND_COLORS["gradients"], KIND_COLORS["weights"]


def plot_by_position(records: Iterable[Mapping[str, Any]], path: Path, *, title: str = "Loss by position") -> None:
    """Draw the held-out loss by position of the first and the last evaluation that has it; 1600 x 900 pixels.

    Args:
        records: lines of metrics.jsonl; without such an evaluation nothing is drawn.
        path: PNG to write.
    """
    import matplotlib

    key = "eval_by_position"
    by_step = {step: record[key] for step, record in merge_steps(records).items() if key in record}
    if not by_step:
        return
    first, last = next(iter(by_step)), next(reversed(by_step))
    names = list(by_step[last])
    with matplotlib.rc_context(STYLE):
        figure, axes = new_figure()
        figure.subplots_adjust(left=0.075, right=0.97, top=0.85, bottom=0.10)
        for step, color in {first: FIRST, last: LAST}.items():
            held = {name: figures["loss"] for name, figures in by_step[step].items() if name in names}
            style = {"linewidth": 2.4, "markersize": 8, "clip_on": False}
            axes.plot(list(held), list(held.values()), "o-", color=color, label=f"after step {step}", **style)
        axes.grid(axis="y", color=FAINT, linewidth=0.8)
        axes.legend(frameon=False, loc="best", fontsize=14)
        axes.set_ylabel("held-out loss, nats per token")
        axes.set_xlabel("position of the last token seen, within its document")
        near, far = (f"{by_step[last][name]['loss']:.3f} at positions {name}" for name in (names[0], names[-1]))
        head(figure, title, f"{near}, {far}")
        figure.savefig(path, dpi=DPI)
