"""DeepSpeed trains what the torch engine trains, at every stage, and reads what it saved."""

from pathlib import Path
from typing import Any

import pytest
import torch

from parallel.launch import World, connected
from tests.ranks import on_ranks
from tests.trainer import tiny
from trainer.build import Trainable
from trainer.cli.compose import load
from trainer.engines.deepspeed_config import generated
from trainer.errors import UserError

OPTIMIZERS = {
    "adamw": ["optim=adamw", "optim.weight_decay=0.1"],  # by parts, without communication
    "galore_8bit": ["optim=galore_8bit", "optim.rank=8", "optim.update_proj_gap=2"],  # whole matrices, codec blocks
    "cosmos": ["optim=cosmos", "optim.rank=8"],  # measures norms over matrices
}
STAGES = (1, 2, 3)
ZERO = "deepspeed.zero_optimization"
PASSED_THROUGH = (
    (1, ["deepspeed.gradient_predivide_factor=2.0", f"{ZERO}.reduce_bucket_size=900", f"{ZERO}.reduce_scatter=false"]),
    (2, [f"{ZERO}.overlap_comm=true", f"{ZERO}.contiguous_gradients=false"]),
    (2, [f"{ZERO}.offload_optimizer.device=cpu"]),
    (3, [f"{ZERO}.sub_group_size=3000", f"{ZERO}.reduce_scatter=false", f"{ZERO}.stage3_max_live_parameters=100"]),
    (3, [f"{ZERO}.offload_optimizer.device=cpu", f"{ZERO}.offload_param.device=cpu"]),
)
HALF, END = 3, 6
LARGE_MICRO = "train.micro_batch=6"
"""One micro-step instead of six."""


def deepspeed(stage: int) -> list[str]:
    return ["parallel.engine=deepspeed", f"parallel.zero={stage}"]


def on_two(folder: Path) -> dict[str, Any]:
    """Train with torch and every stage; each goes on from the other's checkpoint of the middle."""
    history: dict[str, Any] = {}
    with connected(load(tiny.MODEL).parallel, "cpu", 1) as world:

        def run(optimizer: str, name: str, overrides: list[str], start: int = 0, source: str | None = None) -> None:
            built = tiny.trainable(world, [*OPTIMIZERS[optimizer], *overrides])
            name = f"{optimizer}/{name}"
            if source is not None:
                tiny.resume(world, built, folder / optimizer / source, start)
                tiny.save(world, built, folder / name / "again", start)
            found = tiny.train(world, built, range(start, HALF))
            if start < HALF:
                tiny.save(world, built, folder / name, HALF)
            history[name] = found + tiny.train(world, built, range(HALF, END))
            tiny.save(world, built, folder / name, END)

        for optimizer in OPTIMIZERS:
            run(optimizer, "torch", [])
            for stage in STAGES:
                run(optimizer, f"zero{stage}", deepspeed(stage))
                run(optimizer, f"zero{stage}_from_torch", [*deepspeed(stage), LARGE_MICRO], HALF, "torch")
            run(optimizer, "torch_from_zero3", [], HALF, "zero3")
        for number, (stage, keys) in enumerate(PASSED_THROUGH):
            run("galore_8bit", f"zero{stage}_with_keys_{number}", [*deepspeed(stage), *keys])
        run("adamw", "zero1_from_zero3", deepspeed(1), HALF, "zero3")
        for name, overrides in {"torch": [], **{f"zero{stage}": deepspeed(stage) for stage in STAGES}}.items():
            history[f"poisoned/{name}"] = poisoned(world, tiny.trainable(world, [*OPTIMIZERS["adamw"], *overrides]))
    return history


def poisoned(world: World, built: Trainable) -> list[tuple[float, float, bool]]:
    """Three steps; in the second, the gradients of rank 1 are not numbers from the fourth micro-step on."""
    found = tiny.train(world, built, range(1))
    backward, factors = built.engine.backward, iter([1.0, 1.0, 1.0] + [float("nan")] * 3)
    if world.process_rank == 1:
        object.__setattr__(built.engine, "backward", lambda loss: backward(loss * next(factors, 1.0)))
    return found + tiny.train(world, built, range(1, 3))


def on_other(folder: Path, ranks: int) -> dict[str, Any]:
    """Go on from two ranks' checkpoints."""
    history = {}
    with connected(load([*tiny.MODEL, *deepspeed(1)]).parallel, "cpu", 1) as world:
        for optimizer in OPTIMIZERS:
            for source, stage in (("zero1", 3), ("zero3", 2)):
                name = f"{optimizer}/zero{stage}_from_{source}_on_{ranks}"
                built = tiny.trainable(world, [*OPTIMIZERS[optimizer], *deepspeed(stage)])
                tiny.resume(world, built, folder / optimizer / source, HALF)
                tiny.save(world, built, folder / name / "again", HALF)
                history[name] = tiny.train(world, built, range(HALF, END))
                tiny.save(world, built, folder / name, END)
    return history


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Folder of the checkpoints, and history of every run, first rank's."""
    folder = tmp_path_factory.mktemp("checkpoints")
    history = on_ranks(2, on_two, folder, timeout=600)[0]
    for ranks in (1, 3):
        history |= on_ranks(ranks, on_other, folder, ranks, timeout=600)[0]
    return folder, history


def runs(history: dict[str, Any]) -> list[str]:
    return [name for name in history if not name.startswith("poisoned/")]


def difference(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    """Largest of the weights."""
    assert found.keys() == wanted.keys()
    return max(float((found[k] - wanted[k]).abs().max()) for k in wanted if k.startswith("model/"))


@pytest.mark.slow
def test_every_stage_rank_count_and_resume_ends_where_torch_ends(trained: tuple[Path, dict[str, Any]]) -> None:
    """fp32, 6 steps, clipped: sums in another order, so 1e-5."""
    folder, history = trained
    wanted = {optimizer: tiny.saved(folder / optimizer / "torch", END)[0] for optimizer in OPTIMIZERS}
    found = {name: difference(tiny.saved(folder / name, END)[0], wanted[name.split("/")[0]]) for name in runs(history)}
    assert (
        len(found) == 12 * len(OPTIMIZERS) + 1 + len(PASSED_THROUGH)
        and {name: d for name, d in found.items() if not d < 1e-5} == {}
    )


@pytest.mark.slow
def test_the_reported_loss_and_norm_are_the_true_ones(trained: tuple[Path, dict[str, Any]]) -> None:
    _, history = trained
    for optimizer in OPTIMIZERS:
        losses, norms, _ = zip(*history[f"{optimizer}/torch"], strict=True)
        assert min(norms) > 0.5, "clipping is to be active"
        for name, steps in history.items():
            if name.startswith(f"{optimizer}/"):
                assert [s[0] for s in steps] == pytest.approx(losses[-len(steps) :], rel=1e-5), name
                assert [s[1] for s in steps] == pytest.approx(norms[-len(steps) :], rel=1e-4), name


@pytest.mark.slow
def test_a_checkpoint_is_the_same_after_another_engine_stage_and_rank_count(
    trained: tuple[Path, dict[str, Any]],
) -> None:
    folder, history = trained
    resumed = [name for name in history if "_from_" in name]
    assert len(resumed) == 8 * len(OPTIMIZERS) + 1
    for name in resumed:
        optimizer, run = name.split("/")
        wanted, numbers = tiny.saved(folder / optimizer / run.split("_from_")[1].split("_on_")[0], HALF)
        found, found_numbers = tiny.saved(folder / name / "again", HALF)
        assert found.keys() == wanted.keys() and found_numbers == numbers
        assert [key for key in wanted if not torch.equal(found[key], wanted[key])] == [], name


@pytest.mark.slow
def test_a_step_that_is_not_finite_on_one_rank_is_left_out_on_all(trained: tuple[Path, dict[str, Any]]) -> None:
    _, history = trained
    for stage in STAGES:
        steps = history[f"poisoned/zero{stage}"]
        assert [applied for *_, applied in steps] == [True, False, True]
        first, _, last = history["poisoned/torch"]
        assert (steps[0][:2], steps[2][:2]) == (pytest.approx(first[:2], rel=1e-4), pytest.approx(last[:2], rel=1e-4))


def run_after_run() -> tuple[list[list[tuple[float, float, bool]]], bool]:
    found, linear = [], torch.nn.functional.linear
    for _ in range(2):
        with connected(load([*tiny.MODEL, *deepspeed(3)]).parallel, "cpu", 1) as world:
            built = tiny.trainable(world, ["optim=adamw", *deepspeed(3)])
            found.append(tiny.train(world, built, range(2)))
            built.engine.close()
    return found, torch.nn.functional.linear is linear


def test_a_process_can_run_deepspeed_again_as_a_sweep_does_and_torch_is_as_before() -> None:
    (first, second), untouched = on_ranks(1, run_after_run)[0]
    assert first == second
    assert untouched, "stage 3 replaces torch.nn.functional.linear"


REFUSED = {
    "parallel.zero=0": "DeepSpeed shards here, with parallel.zero=1, 2 or 3",
    "precision=bf16_pure": "use precision=fp32 or bf16, or parallel.engine=torch",
    "optim.in_backward=true train.clip_norm=0": "use parallel.engine=torch",
    "train.clip_by=parameter": "use train.clip_by=global, or parallel.engine=torch",
    "parallel.replicas=2": "cuts over all ranks",
    "parallel.accumulate=local": "leave it out",
    "deepspeed.gradient_clipping=0.3": "contradicts train.clip_norm, by which it is 0.5",
    "deepspeed.zero_optimization.stage=3": "contradicts parallel.zero, by which it is 2",
    "deepspeed.train_batch_size=7": "contradicts train.global_batch, by which it is 12",
    "deepspeed.optimizer.type=Adam": "is decided here by optim=NAME",
    "deepspeed.wandb.enabled=true": "is decided here by track=wandb",
    "deepspeed.zero_optimisation.stage=2": "is not passed through; known are zero_optimization.reduce",
    "deepspeed.zero_optimization.zero_quantized_gradients=true": "is not passed through",
    "deepspeed.zero_optimization.round_robin_gradients=true": "is not passed through",
    "deepspeed.zero_optimization.offload_optimizer.device=gpu": "must be cpu or none",
    "deepspeed.zero_optimization.offload_optimizer.device=nvme": "use parallel.engine=torch offload.states=disk",
    "parallel.engine=torch deepspeed.dump_state=true": "has no effect with parallel.engine=torch",
}


@pytest.mark.parametrize("overrides", REFUSED)
def test_what_deepspeed_cannot_do_or_would_do_otherwise_is_refused(overrides: str) -> None:
    with pytest.raises(UserError) as refused:
        load([*tiny.MODEL, *OPTIMIZERS["adamw"], *deepspeed(2), *overrides.split()])
    assert REFUSED[overrides] in str(refused.value)


def test_keys_of_deepspeed_reach_it_beside_ours() -> None:
    given = ["deepspeed.zero_optimization.reduce_bucket_size=1000", "deepspeed.gradient_clipping=0.5"]
    made = generated(load([*tiny.MODEL, *deepspeed(3), *given]), 1)
    assert (made["zero_optimization"]["reduce_bucket_size"], made["zero_optimization"]["stage"]) == (1000, 3)
    assert (made["gradient_clipping"], made["gradient_accumulation_steps"]) == (0.5, 12)
