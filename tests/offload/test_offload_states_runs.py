"""Optimizer states in another tier, in whole runs: at any stage of ZeRO, through checkpoints, counted and predicted."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from parallel.launch import World, connected
from tests.parallel.sharded import BASE, Outcome, make, on_each_rank, step_batch, train
from tests.trainer.test_plan import NARROW, SMALL, peaks, plan, real_peaks
from trainer.checkpoint.store import CheckpointStore
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.run import run
from trainer.state import restore, run_tensors
from trainer.step import train_step

WINDOW = "offload.window_mib=0.005"
MICRO = "train.micro_batch=3"
HOST, DISK = ["offload=host", WINDOW], ["offload=disk", WINDOW]
AWAY = [*HOST, "offload.gradients=true"]
STEPPED = [*HOST, "offload.step=host"]
GALORE = ["optim=galore", "optim.rank=4", "optim.update_proj_gap=2"]
"""With clipping to the global norm (`BASE`), refreshed at the first and the third step."""
CASES = [
    (["optim=adamw", "parallel.zero=1"], DISK),
    ([*GALORE, "parallel.zero=3", "parallel.accumulate=local"], AWAY),
    ([*GALORE, "parallel.zero=3", "optim.in_backward=true", "train.clip_by=parameter"], HOST),
    ([*GALORE, "parallel.zero=2"], [*STEPPED, "offload.gradients=true"]),
]
MORE = [
    ([f"optim={name}", *more, f"parallel.zero={zero}"], tier)
    for name, more in {
        "adamw_8bit": [], "adafactor": [], "apollo": GALORE[1:], "qgalore": [*GALORE[1:], "precision=int8_sr"],
        "cosmos": ["optim.rank=4"], "fira": [*GALORE[1:], "precision=bf16_sr"],
    }.items()
    for zero, tier in ((1, HOST), (2, DISK), (3, HOST))
] + [
    (["optim=adamw", "parallel.zero=3"], DISK),
    (["optim=adamw", "parallel.zero=2", "train.clip_by=parameter"], AWAY),
    ([*GALORE, "parallel.zero=0"], DISK),
    ([*GALORE, "parallel.zero=2"], HOST),
    ([*GALORE, "parallel.zero=0"], STEPPED),
    (["optim=qgalore", *GALORE[1:], "precision=int8_sr", "parallel.zero=3"], STEPPED),
    (["optim=adamw_8bit", "parallel.zero=1"], STEPPED),
    (["optim=fira", *GALORE[1:], "precision=bf16_sr", "parallel.zero=3"], [*STEPPED, "offload.gradients=true"]),
    (["optim=cosmos", "optim.rank=4", "parallel.zero=1"], STEPPED),
]  # fmt: skip


def both(cases: list[tuple[list[str], list[str]]], steps: int = 3) -> list[tuple[Outcome, Outcome]]:
    """Train each case, in two micro-steps a rank, with states on the device, then elsewhere."""
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        return [
            (train([*case, MICRO], world, steps), train([*case, MICRO, *tier], world, steps)) for case, tier in cases
        ]


def require_same(resident: Outcome, moved: Outcome) -> None:
    assert (resident.losses, resident.norms) == (moved.losses, moved.norms)
    for name, tensor in {**resident.weights, **resident.states}.items():
        assert torch.equal(tensor, {**moved.weights, **moved.states}[name]), name
    assert moved.held == {**resident.held, "states": 0}


def test_sharded_runs_with_states_elsewhere_are_the_same_to_the_bit() -> None:
    for found in on_each_rank(2, both, CASES):
        for (case, _), (resident, moved) in zip(CASES, found, strict=True):
            assert resident.held["states"] > 0, case
            require_same(resident, moved)


@pytest.mark.slow
def test_so_are_other_optimizers_and_formats_of_weights() -> None:
    for found in on_each_rank(2, both, MORE):
        for resident, moved in found:
            require_same(resident, moved)


@pytest.mark.parametrize("clip", ["parameter", "previous", "two_pass"])
def test_an_update_in_backward_brings_each_state_in_time(clip: str) -> None:
    micro = "train.micro_batch=12" if clip == "two_pass" else "train.micro_batch=4"
    case = [*GALORE, "optim.in_backward=true", f"train.clip_by={clip}", micro]
    require_same(train(case, World(), 4), train([*case, *DISK], World(), 4))


@pytest.mark.parametrize(
    "more", [[], ["train.clip_by=parameter"], ["precision=bf16_sr"], ["offload.step=host"]], ids=str
)
def test_gradients_that_leave_in_backward_add_up_and_clip_as_ever(more: list[str]) -> None:
    case = [*GALORE, "train.micro_batch=4"]
    resident = [*case, *(option for option in more if not option.startswith("offload"))]
    require_same(train(resident, World(), 3), train([*case, *AWAY, *more], World(), 3))


def test_gradients_that_leave_are_never_all_on_the_device() -> None:
    overrides = [*NARROW, "optim=adamw", "train.micro_batch=1"]
    away, kept = plan(*overrides, *AWAY), plan(*overrides, *HOST)
    assert peaks(away) == real_peaks([*overrides, *AWAY])
    for phase in ("forward", "clip"):
        held = [found.steps["steady"].peak_by_phase[phase].by_kind["gradients"] for found in (away, kept)]
        assert held[0] < held[1] / 3, f"{phase}: {held}"
    assert away.steps["steady"].elsewhere["gradients_host"] >= kept.steps["steady"].at(0)["gradients"]
    clip = [found.steps["steady"].ends("clip")[0]["gradients"] for found in (away, kept)]
    assert clip[0] == 0 < clip[1]


def go_on(folder: Path, overrides: list[str], world: World, begin: int, steps: int = 2) -> dict[str, Tensor]:
    """Load what `folder` holds, if anything; train some steps; save; return what was saved, this rank's part."""
    built = make(overrides, world)
    store = CheckpointStore(folder, keep=0, verify=True, group=world.control)
    checkpoint = store.newest()
    if checkpoint is not None:
        restore(checkpoint, built.engine, seed=0, rank=world.process_rank, device=world.device)
    for step in range(begin, begin + steps):
        assert train_step(built, step_batch(built.cfg, world, step), step, stop=0).applied
    meta = {"optimizer_numbers": built.engine.numbers()}
    store.save(begin + steps, run_tensors(built.engine, world.process_rank, world.device), meta)
    found = {}
    for name, tensor in built.engine.tensors().items():
        whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
        found[name] = whole.detach().clone()
    return found


def chained(folder: Path, chain: list[list[str]]) -> dict[str, Tensor]:
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        saved: dict[str, Tensor] = {}
        for part, overrides in enumerate(chain):
            saved = go_on(folder, [*GALORE, "train.micro_batch=6", *overrides], world, begin=2 * part)
        return saved


def test_checkpoints_do_not_know_where_states_were(tmp_path: Path) -> None:
    wanted = chained(tmp_path / "resident", [[], [], []])
    found = chained(tmp_path / "moved", [DISK, STEPPED, HOST])
    assert wanted.keys() == found.keys()
    assert all(torch.equal(wanted[name], found[name]) for name in wanted)


@pytest.mark.slow
def test_sharded_checkpoints_do_not_either(tmp_path: Path) -> None:
    wanted = on_each_rank(2, chained, tmp_path / "a", [["parallel.zero=3"]] * 3)[0]
    chain = [["parallel.zero=3", *DISK], ["parallel.zero=1"], ["parallel.zero=2", *HOST]]
    found = on_each_rank(2, chained, tmp_path / "b", chain)[0]
    for name, tensor in wanted.items():
        if not name.startswith("rng/"):
            assert torch.allclose(found[name], tensor, rtol=1e-9, atol=1e-12), name
    # what two ranks saved with their states on disk goes on alone
    with connected(load(BASE).parallel, "cpu", 1) as world:
        alone = go_on(tmp_path / "b", [*GALORE, *HOST], world, begin=6)
    assert all(torch.isfinite(tensor).all() for name, tensor in alone.items() if name.startswith("model/"))


@pytest.mark.parametrize("tier", [HOST, DISK, STEPPED], ids=["host", "disk", "step-on-host"])
def test_a_plan_is_what_is_counted_and_the_device_has_the_states_bytes_less(tier: list[str]) -> None:
    overrides = [*NARROW, "optim=adamw"]
    moved, resident = plan(*overrides, *tier), plan(*overrides)
    assert peaks(moved) == real_peaks([*overrides, *tier])
    forward, before = (found.steps["steady"].peak_by_phase["forward"].by_kind for found in (moved, resident))
    assert forward == {**before, "states": 0} and before["states"] > 0
    held = moved.steps["steady"].elsewhere[f"states_{tier[0].partition('=')[2]}"]
    assert before["states"] <= held < 1.1 * before["states"]  # states of this model are small: 64 bytes a tensor show


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["offload=disk", "offload.disk_dir=/no/such/folder"], "offload.disk_dir=/no/such/folder: is no folder"),
        (["offload=disk", "offload.disk_dir=/proc"], "offload.disk_dir=/proc: cannot write there"),
        (["offload=disk", "offload.disk_gib=1e9"], "offload.disk_gib=1e+09: /"),
        (["offload=host", "offload.host_gib=1e9"], "offload.host_gib=1e+09: this machine has"),
        (["offload=host", "offload.window_mib=0"], "offload.window_mib=0.0: must be above 0; 128 is usual"),
        (["offload=host", "offload.disk_gib=1"], "no states go to disk; use offload.states=disk"),
        (["offload.when_full=keep"], "offload.when_full=keep: has no effect, as no states go to host"),
        (["offload=host", "optim=bnb_paged_adamw"], "pages its states between device and host by itself"),
        (["offload=disk", "offload.step=host"], "no states go to host; use offload.states=host"),
        (["offload.step=host"], "offload.step=host: has no effect, as no states go to host"),
        (["offload=host", "offload.step=host", "optim.in_backward=true"], "backward would wait for the host"),
        (["offload=host", "offload.step=host", "offload.when_full=keep"], "ranks would step some here and some there"),
        (["offload.gradients=true"], "offload.gradients=true: has no effect, as no states go to host"),
        (["offload=host", "offload.gradients=true", "optim.in_backward=true"], "none is left to leave"),
        (
            ["offload=disk", "parallel.engine=deepspeed"],
            "use offload.states=none with deepspeed.zero_optimization.offload_optimizer.device=cpu",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_be_is_told_before_launch(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as caught:
        load(overrides)
    assert message in str(caught.value)


def test_a_budget_that_is_too_small_is_told_before_the_first_step(tmp_path: Path) -> None:
    overrides = [*NARROW, *HOST, "offload.host_gib=1e-5"]
    with pytest.raises(UserError, match=r"offload.host_gib=1e-05 has no room for all .* bytes.*Use offload.host_gib="):
        plan(*overrides)
    with pytest.raises(UserError, match="offload.when_full=keep"):
        run(load([*SMALL, *overrides, "data.eval_rows=2", f"run.dir={tmp_path / 'run'}"]))
    tight = plan(*overrides, "offload.when_full=keep")
    assert "stays on the device" in tight.notes[0]
