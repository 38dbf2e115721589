"""The report at the end of a run: every fact, at any width, in colour and without."""

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from trainer.display.report import (
    MEANING,
    Memory,
    Outcome,
    final_report,
    print_report,
    ratio_text,
    relative_path,
    report_text,
)
from trainer.memory import KINDS

MIB = 2**20
RUN = {"weights": 13 * MIB, "gradients": 12 * MIB, "states": 8 * MIB, "activations": 41 * MIB, "workspace": 6 * MIB}
FOLDER = Path("runs/quickstart/2026-01-31_12-00-00")
OUTCOME = Outcome(
    name="quickstart",
    steps=300,
    tokens=1_228_800,
    seconds=81.3,
    tokens_per_second=17423.2,
    memory=Memory(label="galore", by_kind=RUN),
    baseline=Memory(label="plain AdamW", by_kind={**RUN, "states": 26 * MIB, "workspace": 5 * MIB}),
    phase="backward",
    first_loss=5.5768,
    last_loss=1.627,
    perplexity=5.0886,
    authors_perplexity=4.0249,
    skipped=1,
    written={"run folder": FOLDER, "loss": FOLDER / "plots" / "loss.png", "checkpoint": FOLDER / ("x" * 150)},
)


def rows(text: str) -> dict[str, list[str]]:
    """The lines of the report by their first word."""
    lines = [line.replace("■ ", "").split() for line in text.splitlines()]
    return {words[0]: words[1:] for words in lines if words}


@pytest.mark.parametrize("color", [True, False])
@pytest.mark.parametrize("width", [80, 100, 140])
def test_every_kind_has_one_row_with_both_arms_ratio_and_meaning(width: int, color: bool) -> None:
    console = Console(
        record=True,
        file=io.StringIO(),
        width=width,
        force_terminal=color,
        color_system="truecolor" if color else None,
    )
    console.print(final_report(OUTCOME), crop=False)
    found = rows(console.export_text())
    assert found["states"] == ["26.0", "MiB", "8.00", "MiB", "31%", *MEANING["states"].split()]
    assert found["workspace"][:5] == ["5.00", "MiB", "6.00", "MiB", "120%"]
    assert found["total"] == ["97.0", "MiB", "80.0", "MiB", "82%", "the", "most", "at", "once,", "in", "backward"]
    for kind in KINDS:
        assert found[kind][-len(MEANING[kind].split()) :] == MEANING[kind].split(), f"{kind} wraps at {width}"


def test_what_a_rank_sends_is_told_by_kind_the_largest_first() -> None:
    assert "sent a step" not in report_text(OUTCOME)
    text = report_text(replace(OUTCOME, sent={"reduce_scatter": 12 * MIB, "all_gather": 24 * MIB, "all_reduce": 84}))
    said = " ".join(rows(text)["sent"])
    assert said == "a step 36.0 MiB by each rank: all-gather 24.0 MiB, reduce-scatter 12.0 MiB"


def test_losses_perplexities_and_speed_are_there() -> None:
    text = report_text(OUTCOME, 80)
    assert "quickstart: 300 steps, 1.23M tokens in 1:21, 17,423 tokens/s, 1 skipped" in text
    assert "5.5768 -> 1.6270" in text and "29% of the first" in text
    lines = text.splitlines()
    assert any(line.startswith("perplexity") and "5.09" in line and "exact" in line for line in lines)
    assert any("4.02 *" in line and "as the papers' evaluators print it" in line for line in lines)
    (note,) = [line for line in lines if line.startswith("* ")]
    assert "true * B/(B+1)" in note and "GaLore issue #30" in note and len(note) <= 80


def test_paths_are_relative_and_in_one_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    inside = tmp_path / "runs" / "a"
    text = report_text(replace(OUTCOME, written={"run folder": inside, "long": FOLDER / ("x" * 150)}), 80)
    assert rows(text)["run"] == ["folder", "runs/a"]
    assert str(FOLDER / ("x" * 150)) in text
    assert relative_path(tmp_path.parent / "elsewhere") == str(tmp_path.parent / "elsewhere")


def test_plain_text_has_no_control_codes_and_no_loose_blanks() -> None:
    text = report_text(OUTCOME)
    assert "\x1b" not in text
    assert all(line == line.rstrip() for line in text.splitlines())


def test_what_was_not_measured_is_left_out() -> None:
    bare = replace(
        OUTCOME, baseline=None, first_loss=None, last_loss=None, perplexity=None, authors_perplexity=None, written={}
    )
    text = report_text(bare)
    assert "ratio" not in text and "perplexity" not in text and "held-out" not in text and "written" not in text
    assert rows(text)["states"][:2] == ["8.00", "MiB"]


def test_only_a_last_loss_is_shown_alone() -> None:
    found = rows(report_text(replace(OUTCOME, first_loss=None)))
    assert found["held-out"] == ["loss", "1.6270", "nats", "a", "token"]


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [(31, 100, "31%"), (100, 100, "100%"), (199, 100, "199%"), (240, 100, "2.4x"), (5, 0, "-"), (0, 7, "0%")],
)
def test_ratios_read_at_a_glance(part: int, whole: int, text: str) -> None:
    assert ratio_text(part, whole) == text


def test_an_ascii_log_gets_the_report_too(monkeypatch: pytest.MonkeyPatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr("sys.stdout", io.TextIOWrapper(raw, encoding="ascii"))
    print_report(OUTCOME)
    assert b"26.0 MiB" in raw.getvalue()
