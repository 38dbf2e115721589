"""What a run says at its end: bytes by kind beside a baseline, held-out loss, speed, and where all was written."""

import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from trainer.display.plots import KIND_COLORS
from trainer.display.units import count_text, duration_text, perplexity_text
from trainer.memory import KINDS, format_bytes

MEANING = {
    "weights": "parameters and buffers",
    "gradients": "from backward to the step",
    "states": "the optimizer's own memory",
    "activations": "kept by forward for backward",
    "workspace": "logits, temporaries, batch",
}
"""What each kind is, in the words of the report."""

AUTHORS_NOTE = "* printed loss = true * B/(B+1): perplexity understated; GaLore issue #30"


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Peak bytes by kind of one arm."""

    label: str
    by_kind: Mapping[str, int]

    @property
    def total(self) -> int:
        return sum(self.by_kind.values())


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """Everything the report says; what is None or empty is left out."""

    name: str
    steps: int
    tokens: int
    seconds: float
    """Wall time, evaluation and saving included."""
    tokens_per_second: float
    """Of training alone."""
    memory: Memory
    baseline: Memory | None = None
    phase: str = ""
    """Where in the step this run's peak was."""
    beside: Sequence[str] = ()
    """What lay off the device, a sentence for each kind."""
    first_loss: float | None = None
    """Held-out loss before the first step, nats a token."""
    last_loss: float | None = None
    perplexity: float | None = None
    """exp of the last loss: exact, every held-out token weighted alike."""
    authors_perplexity: float | None = None
    """As the low-rank papers' evaluators would have printed it."""
    skipped: int = 0
    subspace: Mapping[str, Any] | None = None
    """How well the optimizer's subspaces fit, as in metrics.jsonl."""
    sent: Mapping[str, int] = field(default_factory=dict)
    """Bytes that one rank sends in a step, by kind of collective; empty for one process."""
    written: Mapping[str, Path] = field(default_factory=dict)
    """What was written where, most asked for first."""


def final_report(outcome: Outcome) -> RenderableType:
    """Lay out the report for a console of any width from 60 columns on."""
    parts: list[RenderableType] = [Text(), _headline(outcome), Text(), _memory_table(outcome)]
    parts += [Text(line) for line in outcome.beside]
    parts += [Text(), _results(outcome)]
    if outcome.authors_perplexity is not None:
        parts.append(Text(AUTHORS_NOTE, "dim"))
    if outcome.written:
        parts += [Text(), _written(outcome.written)]
    return Group(*parts)


def report_text(outcome: Outcome, width: int = 100) -> str:
    """Return the report as text without colour, for a log or a file; paths stay in one piece."""
    console = Console(file=io.StringIO(), width=width, color_system=None, force_terminal=False, legacy_windows=False)
    console.print(final_report(outcome), crop=False)
    assert isinstance(console.file, io.StringIO)
    return "\n".join(line.rstrip() for line in console.file.getvalue().splitlines()) + "\n"


def print_report(outcome: Outcome) -> None:
    """Print the report: in colour on a terminal, as plain text elsewhere."""
    if sys.stdout.isatty():
        Console().print(final_report(outcome), crop=False)
    else:
        encoding = sys.stdout.encoding or "utf-8"
        print(report_text(outcome).encode(encoding, "replace").decode(encoding), end="", flush=True)


def ratio_text(part: float, whole: float) -> str:
    """Say how much of `whole` is `part`: `31%`, `2.4x`, or `-` where there is nothing to compare with."""
    if whole <= 0:
        return "-"
    share = part / whole
    return f"{share:.2g}x" if share >= 1.995 else f"{100 * share:.0f}%"


def relative_path(path: Path) -> str:
    """Write a path from the working directory, absolute where it lies outside."""
    whole, here = os.path.abspath(path), os.getcwd()
    return os.path.relpath(whole, here) if os.path.commonpath([whole, here]) == here else whole


def _headline(outcome: Outcome) -> Text:
    steps = f"{outcome.steps} steps, {count_text(outcome.tokens)} tokens in {duration_text(outcome.seconds)}"
    text = Text.assemble((outcome.name, "bold"), f": {steps}, {outcome.tokens_per_second:,.0f} tokens/s")
    if outcome.skipped:
        text.append(f", {outcome.skipped} skipped", "bold red")
    return text


def _memory_table(outcome: Outcome) -> Table:
    run, baseline = outcome.memory, outcome.baseline
    most = "the most at once" + (f", in {outcome.phase}" if outcome.phase else "")
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, show_footer=True, footer_style="bold")
    table.add_column("at the peak", "total", no_wrap=True)
    if baseline is not None:
        table.add_column(baseline.label, format_bytes(baseline.total), justify="right", overflow="fold")
    table.add_column(run.label, format_bytes(run.total), justify="right", overflow="fold")
    if baseline is not None:
        table.add_column("ratio", _ratio(run.total, baseline.total), justify="right", no_wrap=True)
    table.add_column("what it is", Text(most, "not bold dim"), style="dim")
    for kind in KINDS:
        name = Text.assemble(("■ ", KIND_COLORS[kind]), kind)
        mine = run.by_kind.get(kind, 0)
        if baseline is None:
            table.add_row(name, _size(mine), MEANING[kind])
        else:
            theirs = baseline.by_kind.get(kind, 0)
            table.add_row(name, _size(theirs), _size(mine), _ratio(mine, theirs), MEANING[kind])
    return table


def _size(count: int) -> Text:
    return Text(format_bytes(count), no_wrap=True)


def _ratio(part: int, whole: int) -> Text:
    text = ratio_text(part, whole)
    return Text(text, "default" if whole <= 0 or text == "100%" else "green" if part < whole else "yellow")


def _results(outcome: Outcome) -> Table:
    """Held-out loss first to last, and both perplexities."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(no_wrap=True)
    rows.add_column(no_wrap=True)
    rows.add_column(style="dim")
    first, last = outcome.first_loss, outcome.last_loss
    if last is not None and first is not None:
        falls = Text.assemble(f"{first:.4f} -> ", (f"{last:.4f}", "bold"))
        rows.add_row("held-out loss", falls, f"first to last; {ratio_text(last, first)} of the first")
    elif last is not None:
        rows.add_row("held-out loss", Text(f"{last:.4f}", "bold"), "nats a token")
    if outcome.perplexity is not None:
        exact = Text(perplexity_text(outcome.perplexity), "bold")
        rows.add_row("perplexity", exact, "exact: every held-out token weighs the same")
    if outcome.authors_perplexity is not None:
        rows.add_row("", f"{perplexity_text(outcome.authors_perplexity)} *", "as the papers' evaluators print it")
    if outcome.subspace is not None:
        rows.add_row("subspaces", *subspace_texts(outcome.subspace))
    if outcome.sent:
        rows.add_row("sent a step", format_bytes(sum(outcome.sent.values())), sent_text(outcome.sent))
    return rows


def sent_text(sent: Mapping[str, int]) -> str:
    """`by each rank: all-gather 8.00 MiB, reduce-scatter 4.00 MiB`, the largest first; what is next to nothing is not
    named."""
    named = [(size, kind.replace("_", "-")) for kind, size in sent.items() if 100 * size >= sum(sent.values())]
    return "by each rank: " + ", ".join(f"{kind} {format_bytes(size)}" for size, kind in sorted(named, reverse=True))


def subspace_texts(subspace: Mapping[str, Any]) -> tuple[str, str]:
    """`captured 61%`, and the rest of what there is to say, medians over matrices at their newest refresh."""
    captured, overlap = subspace["captured"], subspace.get("overlap")
    least = f"of a gradient's energy (median; least {100 * captured['min']:.0f}%)"
    turned = f"; {100 * overlap['median']:.0f}% of the basis before" if overlap else ""
    return f"{100 * captured['median']:.0f}%", least + turned


def _written(written: Mapping[str, Path]) -> Text:
    """Name what was written; no path is broken, so that it can be copied."""
    text = Text("written", "bold", no_wrap=True, overflow="ignore")
    size = max(len(name) for name in written)
    for name, path in written.items():
        text.append(f"\n  {name:<{size}}  ", "not bold dim").append(relative_path(path), "not bold default")
    return text
