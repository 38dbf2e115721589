"""`optim.in_backward=true` in the trainer: the same training, with gradients that never exist all at once."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.config import ParallelConfig
from parallel.launch import World, connected
from tests.ranks import on_ranks
from tests.trainer.test_plan import NARROW, SMALL, build_on, peaks, plan, real_peaks, real_peaks_on, real_rows
from trainer.build import Trainable
from trainer.cli import main as cli
from trainer.cli.compose import load
from trainer.metrics import read_metrics
from trainer.plan_report import plan_text
from trainer.run import run
from trainer.step import Stepped, train_step

IN_BACKWARD = "optim.in_backward=true"
MICRO = "train.micro_batch=1"
CLIPS = {
    "no clipping": ["train.clip_norm=0"],
    "parameter": ["train.clip_norm=0.05", "train.clip_by=parameter"],
}


def trained(*overrides: str, steps: int = 4) -> tuple[list[Stepped], list[torch.Tensor], Trainable]:
    """Steps of a small model in fp64, its weights afterwards, and what trained it."""
    cfg = load([*SMALL, *NARROW, "precision=fp64", "optim.lr=0.01", "train.steps=8", *overrides])
    built = build_on(cfg, World())
    torch.manual_seed(1)
    found = []
    for step in range(steps):
        torch.manual_seed(step)  # of rows and dropout
        found.append(train_step(built, real_rows(cfg, 1), step, stop=0))
        assert all(p.grad is None for p in built.model.parameters())
    return found, [p.detach().clone() for p in built.model.parameters()], built


def distance(one: list[torch.Tensor], other: list[torch.Tensor]) -> float:
    return max(float((p - q).abs().max()) for p, q in zip(one, other, strict=True))


@pytest.mark.parametrize("tied", ["true", "false"])
@pytest.mark.parametrize("clip", CLIPS)
@pytest.mark.parametrize("micro", ["train.micro_batch=4", MICRO])
@pytest.mark.parametrize("optim", ["adamw", "galore"])
def test_the_trainer_steps_in_backward_as_at_once(optim: str, micro: str, clip: str, tied: str) -> None:
    overrides = [f"optim={optim}", micro, f"model.tie_embeddings={tied}", *CLIPS[clip]]
    at_once, expected, _ = trained(*overrides)
    hooked, weights, _ = trained(*overrides, IN_BACKWARD)
    assert distance(weights, expected) < 1e-10
    for one, other in zip(at_once, hooked, strict=True):
        assert float(other.loss) == pytest.approx(float(one.loss), rel=1e-12)
        assert other.norm is None or other.norm == pytest.approx(one.norm, rel=1e-10)
    only_projections = optim == "galore" and micro == MICRO and clip == "no clipping"
    assert [stepped.norm is None for stepped in hooked] == [False] + [only_projections] * 3


@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("optim", ["adamw", "galore"])
def test_two_passes_clip_as_the_ordinary_step_and_replay_dropout(optim: str, activations: str) -> None:
    overrides = [f"optim={optim}", f"activations={activations}", "model.dropout=0.2", "train.clip_norm=0.05"]
    at_once, expected, _ = trained(*overrides)
    hooked, weights, _ = trained(*overrides, IN_BACKWARD, "train.clip_by=two_pass")
    assert distance(weights, expected) < 1e-10
    assert [stepped.norm for stepped in hooked] == pytest.approx([stepped.norm for stepped in at_once], rel=1e-10)


def largest(built: Trainable) -> int:
    return max(p.nbytes for p in built.model.parameters())


@pytest.mark.parametrize("optim", ["adamw", "galore", "apollo", "cosmos", "adamw_8bit"])
def test_the_most_gradient_bytes_are_those_of_the_largest_parameter(optim: str) -> None:
    rank = ["optim.rank=8"] if optim == "cosmos" else []
    overrides = [*SMALL, *NARROW, f"optim={optim}", *rank, IN_BACKWARD, "train.clip_norm=0"]
    built = build_on(load(overrides), World())
    for step in (0, 1):
        with built.meter.count_step() as timeline:
            train_step(built, real_rows(built.cfg, 1), step, stop=0)
        assert timeline.bytes_by_kind[1].max() == largest(built)


def test_over_micro_steps_galore_adds_projections_and_one_whole_gradient() -> None:
    overrides = [*SMALL, *NARROW, "optim=galore", "optim.rank=4", IN_BACKWARD, "train.clip_norm=0", MICRO]
    built = build_on(load(overrides), World())
    assert built.in_backward is not None
    projected, whole = built.in_backward.kept_bytes()
    matrices = [p for n, p in built.model.named_parameters() if "mlp" in n or "attn" in n]
    assert projected == sum(4 * 4 * max(p.shape) for p in matrices)
    assert whole == sum(p.nbytes for p in built.model.parameters()) - sum(p.nbytes for p in matrices)
    for step in (0, 1):
        with built.meter.count_step() as timeline:
            train_step(built, real_rows(built.cfg, 1), step, stop=0)
    highest = timeline.bytes_by_kind[1].max()
    assert projected + whole <= highest <= projected + whole + largest(built)
    assert highest < 0.8 * sum(p.nbytes for p in built.model.parameters())


@pytest.mark.parametrize(
    "overrides",
    [
        ["optim=adamw", "train.clip_norm=0"],
        ["optim=galore", "train.clip_norm=0", MICRO],
        ["optim=galore", "train.clip_by=parameter", "train.clip_norm=0.01", MICRO, "model.tie_embeddings=true"],
        ["optim=apollo", "train.clip_by=previous", "activations=recompute"],
        ["optim=galore", "train.clip_by=two_pass", "precision=bf16"],
        ["optim=galore_8bit", "train.clip_by=two_pass", "precision=bf16_sr", "activations=recompute"],
    ],
    ids=str,
)
def test_the_plan_is_what_a_run_holds(overrides: list[str]) -> None:
    asked = [*NARROW, IN_BACKWARD, *overrides]
    assert peaks(plan(*asked)) == real_peaks(asked)


RANK_CASES = [
    ["optim=galore", "train.clip_norm=0", "train.micro_batch=2"],
    ["optim=galore", "train.clip_norm=0", MICRO],
    ["optim=adamw", "train.clip_by=two_pass", "train.micro_batch=2"],
    ["optim=apollo", "train.clip_by=parameter", MICRO],
]


def on_this_rank() -> list[Any]:
    found = []
    with connected(ParallelConfig(), "cpu", 1) as world:
        for case in RANK_CASES:
            found.append(real_peaks_on(world, load([*SMALL, *NARROW, IN_BACKWARD, *case])))
    return found


@pytest.mark.slow
def test_the_plan_of_a_rank_is_what_it_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for what real ranks tell each other on the host: flags, and in which order gradients come."""
    real = on_ranks(2, on_this_rank)
    monkeypatch.setenv("WORLD_SIZE", "2")  # the options are checked for as many
    for index, case in enumerate(RANK_CASES):
        planned = peaks(plan(*NARROW, IN_BACKWARD, *case, ranks=2))
        for held in (rank[index] for rank in real):
            for one, other in zip(planned, held, strict=True):
                assert one.keys() == other.keys()
                for phase, peak in one.items():
                    told = other[phase].total - peak.total
                    workspace = other[phase].by_kind["workspace"] - told
                    assert 0 <= told <= 128, (case, phase)
                    assert peak.by_kind == {**other[phase].by_kind, "workspace": workspace}, (case, phase)


def test_the_plan_names_what_adds_up_and_offers_the_update_in_backward() -> None:
    asked = [*NARROW, IN_BACKWARD, MICRO, "train.clip_norm=0"]
    text = " ".join(plan_text(load([*SMALL, *asked]), plan(*asked), {}, []).split())
    assert "optim.in_backward with 4 micro-steps: between them" in text and "of projected gradients" in text
    asked = [*NARROW, IN_BACKWARD, MICRO, "train.clip_by=parameter"]
    text = " ".join(plan_text(load([*SMALL, *asked]), plan(*asked), {}, []).split())
    assert "projected" not in text and "train.clip_by=parameter needs the norms of whole ones" in text
    assert plan(*NARROW, IN_BACKWARD, "train.clip_norm=0").notes == ()


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([IN_BACKWARD], ["optim.in_backward=true", "train.clip_by=global with train.clip_norm=1", "two_pass"]),
        (["train.clip_by=previous"], ["train.clip_by=previous: is for optim.in_backward=true", "train.clip_by=global"]),
        (["train.clip_by=two_pass"], ["train.clip_by=two_pass: is for optim.in_backward=true"]),
        (["train.clip_by=parameter", "train.clip_norm=0"], ["train.clip_by=parameter: has no effect", "clip_norm=0"]),
        (
            [IN_BACKWARD, "train.clip_by=two_pass"],
            ["train.clip_by=two_pass: with 2 micro-steps", "nothing is saved; use train.micro_batch=8"],
        ),
        (["train.clip_by=each"], ["train.clip_by=each", "parameter"]),
    ],
    ids=str,
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_before_launch(
    overrides: list[str], expected: list[str], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert cli.main(["train", f"run.dir={tmp_path / 'run'}", *overrides]) == 2
    said = capsys.readouterr().err
    assert [part for part in expected if part not in said] == [], said
    assert not (tmp_path / "run").exists()


def poison(built: Trainable, name: str, value: float) -> Any:
    """Multiply the gradient of a parameter by `value`, as backward computes it."""
    return built.model.get_parameter(name).register_hook(lambda grad: grad * value)


@pytest.mark.parametrize("micro", ["train.micro_batch=4", MICRO])
def test_a_loss_that_is_not_finite_leaves_everything_as_it_was(micro: str) -> None:
    cfg = load([*SMALL, *NARROW, "optim=galore", IN_BACKWARD, "train.clip_norm=0", micro])
    built = build_on(cfg, World())
    train_step(built, real_rows(cfg, 1), 0, stop=0)
    head = built.model.get_parameter("lm_head.weight")
    whole = head.detach().clone()
    with torch.no_grad():
        head[3] = torch.nan
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    stepped = train_step(built, real_rows(cfg, 1), 1, stop=0)
    assert not stepped.applied and stepped.left_out == ()
    assert all(torch.equal(p.nan_to_num(7), before[n].nan_to_num(7)) for n, p in built.model.named_parameters())
    assert all(p.grad is None for p in built.model.parameters()) and built.optimizer.reduced == {}  # type: ignore[attr-defined]
    with torch.no_grad():
        head.copy_(whole)
    assert train_step(built, real_rows(cfg, 1), 1, stop=0).applied


def test_a_gradient_that_is_not_finite_is_left_out_named_and_counted() -> None:
    cfg = load([*SMALL, *NARROW, IN_BACKWARD, "train.clip_by=parameter"])
    built = build_on(cfg, World())
    name = "model.layers.1.mlp.up_proj.weight"
    hook = poison(built, name, torch.nan)
    before = {n: p.detach().clone() for n, p in built.model.named_parameters()}
    stepped = train_step(built, real_rows(cfg, 1), 0, stop=0)
    assert not stepped.applied and stepped.left_out == (name,)
    assert [n for n, p in built.model.named_parameters() if torch.equal(p, before[n])] == [name]
    hook.remove()
    assert train_step(built, real_rows(cfg, 1), 1, stop=0).applied


def test_with_two_passes_such_a_gradient_leaves_out_the_whole_step() -> None:
    cfg = load([*SMALL, *NARROW, IN_BACKWARD, "train.clip_by=two_pass"])
    built = build_on(cfg, World())
    poison(built, "model.layers.1.mlp.up_proj.weight", torch.inf)
    before = [p.detach().clone() for p in built.model.parameters()]
    stepped = train_step(built, real_rows(cfg, 1), 0, stop=0)
    assert not stepped.applied and stepped.left_out == ()
    assert all(torch.equal(p, q) for p, q in zip(built.model.parameters(), before, strict=True))


def arguments(folder: Path, *more: str) -> list[str]:
    return [
        *SMALL, *NARROW, f"run.dir={folder}", "data.eval_rows=8", "optim=galore", "optim.update_proj_gap=3",
        "train.log_every=1", "checkpoint.every=0", IN_BACKWARD, *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        ["train.clip_norm=0", MICRO],
        ["train.clip_by=previous", "train.clip_norm=0.3", "model.dropout=0.1"],
        ["train.clip_by=two_pass", "train.clip_norm=0.3", "model.dropout=0.1", "precision=bf16_sr"],
    ],
    ids=str,
)
@pytest.mark.usefixtures("without_figures")
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(tmp_path: Path, more: list[str]) -> None:
    """Saved after 4 of 7 steps: between the refreshes of steps 3 and 6."""
    run(load(arguments(tmp_path / "whole", "train.steps=7", "schedule=constant", "schedule.warmup=2", *more)))
    for steps in (4, 7):
        parts = arguments(tmp_path / "parts", f"train.steps={steps}", "schedule=constant", "schedule.warmup=2", *more)
        run(load(parts))
    one, other = (read_metrics(tmp_path / name / "metrics.jsonl") for name in ("whole", "parts"))
    figures = [[(r["step"], r["loss"], r.get("grad_norm")) for r in found if "loss" in r] for found in (one, other)]
    assert figures[0] == figures[1] and len(figures[0]) == 7


def test_the_command_line_trains_and_says_what_adds_up(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", *arguments(tmp_path / "run", "train.steps=2", "train.clip_norm=0", MICRO)]) == 0
    assert "optim.in_backward with 4 micro-steps" in capsys.readouterr().out
    memory = json.loads((tmp_path / "run" / "memory.json").read_text())
    for step in ("first", "steady"):
        planned, held = (memory[key][step]["peak"]["by_kind"]["gradients"] for key in ("predicted", "measured"))
        assert planned == held
    first, second = [r for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r]
    assert "grad_norm" in first and "grad_norm" not in second, "of projections the norm is not known"
