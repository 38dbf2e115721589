"""Activations' tiers in a run: what is wrong is told before launch, what fails on the way ends with its reason."""

import errno
import os
from pathlib import Path

import pytest

from offload.tiers import SpillFile
from tests.trainer.test_plan import NARROW, SMALL, plan
from trainer.cli.compose import load
from trainer.errors import TrainingStopped, UserError
from trainer.run import run

HOST = ["activations=host", "activations.min_bytes=0"]


@pytest.mark.parametrize(
    "overrides, message",
    [
        (
            ["activations=disk", "activations.disk_dir=/no/such/folder"],
            "/no/such/folder: is no folder; make it",
        ),
        (["activations=disk", "activations.disk_dir=/proc"], "/proc: cannot write there"),
        (["activations=disk", "activations.disk_gib=1e9"], "activations.disk_gib=1e+09: /"),
        (["activations=host", "activations.host_gib=1e9"], "activations.host_gib=1e+09: this machine has"),
        (["activations.rules=['mlp to host']"], "is not of the form 'PATTERN -> FATE'"),
        (
            ["activations.rules=['mlp -> somewhere']"],
            "somewhere is no fate of a rule; use one of keep",
        ),
        (["activations.rules=['silu() -> recompute']"], "one operator cannot run again by itself"),
        (["activations.rules=['(mlp -> host']"], "(mlp is no regular expression"),
        (["activations.host_gib=1"], "has no effect, as nothing goes to host; use it with activations=host"),
        (["activations.keep_last=2"], "has no effect, as nothing is moved"),
        (["activations.inputs=host"], "has no effect, as nothing is recomputed"),
        (["activations.inputs=recompute", "activations=recompute"], "what a block is given cannot be recomputed"),
        (["activations.attention=keep"], "has no effect, as nothing is recomputed; use it with activations=recompute"),
        (["activations.attention=keep", "activations=selective"], "activations=selective keeps it; leave it out"),
        (["activations.attention=host", "activations=recompute"], "must be keep or recompute"),
        (["activations.attention=keep", "activations=recompute", "model.attention=eager"], "use model.attention=sdpa"),
        (["activations.attention=keep", "activations=recompute", "model.linear=gated"], "use model.softmax_every=N"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_launch(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(overrides)
    assert message in str(caught.value)


def test_a_plan_says_what_other_tiers_hold_and_what_does_not_fit() -> None:
    found = plan(*NARROW, *HOST)
    assert found.steps["steady"].elsewhere["host"] > 0 and found.notes == ()
    tight = plan(*NARROW, *HOST, "activations.host_gib=1e-5")
    assert "stay on the device" in tight.notes[0] and tight.peak.total > found.peak.total
    with pytest.raises(UserError, match="activations.host_gib=1e-05 has no room.*when_full=keep"):
        plan(*NARROW, *HOST, "activations.host_gib=1e-5", "activations.when_full=stop")


def options(tmp_path: Path, *more: str) -> list[str]:
    return [
        *SMALL,
        *NARROW,
        "activations.min_bytes=0",
        "train.steps=2",
        "data.eval_rows=2",
        f"run.dir={tmp_path}",
        *more,
    ]


def test_a_tier_that_is_too_small_is_told_before_the_first_step_with_what_it_takes(tmp_path: Path) -> None:
    host = ["activations=host", "activations.when_full=stop"]
    with pytest.raises(UserError, match="activations.host_gib=1e-05: a step moves .* bytes a rank") as caught:
        run(load(options(tmp_path, *host, "activations.host_gib=1e-5")))
    enough = str(caught.value).partition("give ")[2].partition(",")[0]
    assert run(load(options(tmp_path, *host, enough))).folder.is_dir(), "the figure it gives is enough"


def test_a_disk_that_is_full_on_the_way_ends_a_run_with_its_reason_where_that_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(file: SpillFile, offset: int, content: memoryview) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(SpillFile, "write", full)
    with pytest.raises(TrainingStopped, match=r"step 1: .*No space left on device.*when_full=keep"):
        run(load(options(tmp_path, "activations=disk", "activations.when_full=stop")))
