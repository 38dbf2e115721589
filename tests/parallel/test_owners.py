"""parallel.zero=1 with matrices that one rank steps whole: the same training, in even shares, and when it is chosen."""

import os
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from parallel.launch import World, connected
from parallel.mesh import make_grid
from parallel.owners import Owners, balanced
from parallel.pretended import PretendedGroup, pretended_ranks
from tests.parallel.sharded import BASE, Outcome, make, on_each_rank, step_batch, train_each
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.matrices import EVEN, owners_of, sent_anyway, sent_beside, state_bytes, unevenness
from trainer.model import build_model
from trainer.plan import planned_config, predict
from trainer.step import train_step

LOW = ["optim.rank=4", "optim.update_proj_gap=3"]
METHODS = {
    "galore": ["optim=galore", *LOW],
    "cosmos": ["optim=cosmos", "optim.rank=4"],
    "adamw": ["optim=adamw"],
    "apollo int8": ["optim=apollo", *LOW, "optim.states=int8"],
}
LIBRARY = (["optim=bnb_adamw_8bit"], ["optim=bnb_lion_8bit"], ["optim=torchao_adamw_4bit", "optim.compile=false"])
HOW = ("auto", "owners")


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    return dict(zip(METHODS, train_each(list(METHODS.values())), strict=True))


def differences(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[k] - wanted[k]).abs().max() / (wanted[k].abs().max() or 1)) for k in found)


@pytest.mark.parametrize("count", [2, *(pytest.param(n, marks=pytest.mark.slow) for n in (3, 4))])
def test_owners_of_whole_matrices_train_as_one_process_does(count: int, alone: dict[str, Outcome]) -> None:
    asked = [(name, how) for name in METHODS for how in HOW]
    cases = [[*METHODS[name], "parallel.zero=1", f"parallel.matrices={how}"] for name, how in asked]
    if count == 4:
        asked, cases = asked * 2, cases + [[*case, "parallel.replicas=2"] for case in cases]
    ranks = on_each_rank(count, train_each, cases)
    for index, (name, how) in enumerate(asked):
        wanted, found = alone[name], [rank[index] for rank in ranks]
        for one in found:
            assert differences(one.weights, wanted.weights) < 1e-9, (name, how)
            assert one.norms == pytest.approx(wanted.norms, rel=1e-9), (name, how)
            codes = {key for key, state in one.states.items() if not state.is_floating_point()}  # which may turn
            assert differences({k: one.states[k] for k in one.states.keys() - codes}, wanted.states) < 1e-9, (name, how)
        assert set().union(*(one.states for one in found)) == set(wanted.states), "each state is on some rank"
        if how == "owners":
            assert not any(one.states.keys() == wanted.states.keys() for one in found), "and no rank has all"


def test_other_packages_optimizers_step_whole_tensors_and_end_where_replicas_of_them_do() -> None:
    """Two summands have one order: bit for bit."""
    cases = [[*name, "precision=fp32", f"parallel.zero={zero}"] for name in LIBRARY for zero in (0, 1)]
    ranks = on_each_rank(2, train_each, cases)
    for index, name in enumerate(LIBRARY):
        replica, owners = ranks[0][2 * index], [rank[2 * index + 1] for rank in ranks]
        for one in owners:
            assert all(torch.equal(one.weights[key], value) for key, value in replica.weights.items()), name
        assert sum(one.held["states"] for one in owners) == replica.held["states"], name
        assert max(one.held["states"] for one in owners) < 0.6 * replica.held["states"], name
        states = owners[0].states | owners[1].states
        assert states.keys() == replica.states.keys(), name
        assert all(torch.equal(states[key], value) for key, value in replica.states.items()), name


def chosen(ranks: int, *overrides: str) -> tuple[Owners, dict[str, int]]:
    """What the first of `ranks` ranks chooses, of which no other exists; and bytes of states by parameter."""
    cfg = load([*BASE, "parallel.zero=1", *overrides])
    model = build_model(cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=World().device, seed=0)
    world = World(process_count=ranks)
    with pretended_ranks(cfg.parallel, ranks):
        found = owners_of(cfg, world, model, make_grid(world, cfg.parallel))
    return found, state_bytes(cfg, dict(model.named_parameters()))


LARGER = ["model.hidden_size=128", "model.intermediate_size=320", "model.layers=4"]


@pytest.mark.parametrize("method", [["optim=galore", "optim.rank=32"], ["optim=cosmos", "optim.rank=16"]], ids=str)
def test_matrices_of_a_projection_are_owned_where_that_sends_less_and_shares_are_even(method: list[str]) -> None:
    found, sizes = chosen(2, *LARGER, *method)
    assert len(found.of) == 7 * 4 and "embed" not in " ".join(found.of)
    assert unevenness(sizes, found, 2) <= EVEN
    assert "28 of 39 tensors are stepped whole, each by one rank (by rows they would send" in found.why
    few, _ = chosen(24, *LARGER, *method)
    assert not few.of and "one rank would own 1." in few.why, few.why


def test_what_is_stepped_value_by_value_stays_in_rows() -> None:
    for name in ("adamw", "adamw_8bit", "sgd"):
        found, _ = chosen(4, f"optim={name}", *LARGER)
        assert found.of == {} and "which takes nothing else to be sent" in found.why
    found, _ = chosen(4, "optim=galore", "optim.rank=32", "parallel.matrices=rows", *LARGER)
    assert found == Owners()


def test_copies_of_a_basis_leave_nothing_to_save_for_rows() -> None:
    """Right projections then send nothing, left ones (keys and values of fewer heads, down projections) R as ever."""
    found, _ = chosen(2, "optim=galore", "optim.rank=32", "optim.basis_copies=true", *LARGER)
    assert {name.rpartition(".")[0].rpartition(".")[2] for name in found.of} == {"k_proj", "v_proj", "down_proj"}


def test_owner_0_has_the_most_and_none_more_than_4_thirds_of_the_best() -> None:
    generator = torch.Generator().manual_seed(0)
    for count in (2, 3, 5):
        sizes = torch.randint(1, 100, (20,), generator=generator).tolist()
        owners = balanced(sizes, count)
        load = [sum(size for size, owner in zip(sizes, owners, strict=True) if owner == i) for i in range(count)]
        assert load[0] == max(load) <= 4 / 3 * max(sum(sizes) / count, max(sizes))


def counted(overrides: list[str]) -> dict[str, Any]:
    with connected(load(BASE).parallel, "cpu", 1) as world:
        built = make(overrides, world)
        for step in range(2):
            with built.meter.count_step() as timeline:
                train_step(built, step_batch(built.cfg, world, step), step, 0)
        return {"peak": timeline.peak.total, "held": built.meter.held(), "remarks": built.remarks}


def test_a_plan_is_that_of_the_rank_that_owns_most_and_the_run_says_who_owns_what() -> None:
    options = [*BASE, *LARGER, "precision=fp32", "parallel.zero=1", "optim=galore", "optim.rank=32"]
    cfg = load(options)
    plan = predict(cfg, planned_config(cfg), ranks=2, device=torch.device("cpu")).steps["steady"]
    ranks = on_each_rank(2, counted, options)
    most = max(rank["held"]["states"] for rank in ranks)
    assert ranks[0]["held"]["states"] == most == plan.at(len(plan) - 1)["states"]
    assert ranks[0]["peak"] == pytest.approx(plan.peak.total, rel=0.01)
    assert all("28 of 39 tensors are stepped whole" in rank["remarks"][0] for rank in ranks)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("parallel.zero=3 parallel.matrices=owners", "has no effect with parallel.zero=3"),
        (
            "parallel.zero=1 parallel.matrices=owners optim=galore optim.basis_copies=true",
            "a basis is its owner's alone",
        ),
        ("parallel.zero=1 parallel.matrices=rows optim=bnb_adamw_8bit precision=fp32", "use parallel.zero=1 or 0"),
        ("parallel.zero=2 optim=bnb_adamw_8bit precision=fp32", "which parallel.zero=2 cuts into rows"),
        ("parallel.zero=1 parallel.engine=deepspeed parallel.matrices=owners precision=fp32", "leave it out"),
    ],
)
def test_what_would_have_no_effect_is_refused(overrides: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with pytest.raises(UserError, match=message):
        load([*BASE, *overrides.split()])


def test_more_ranks_than_tensors_to_own_are_refused() -> None:
    with pytest.raises(ValueError, match="64 ranks cannot share out 21 tensors that are stepped whole"):
        chosen(64, "optim=bnb_adamw_8bit", "precision=fp32")


@pytest.mark.parametrize(
    "name, expected",
    [
        ("galore", (12.5, 4.7, 25)), ("fira", (12.5, 4.7, 25)), ("apollo", (12.5, 4.7, 13)),
        ("qgalore", (1.6, 0.6, 26)), ("cosmos", (540, 200, 250)), ("adafactor", (0.1, 0.04, 0.1)), ("adamw", (0, 0, 0)),
    ],
)  # fmt: skip
def test_rows_send_beside_gradient_and_weight_what_the_table_says(name: str, expected: tuple[float, ...]) -> None:
    """That of `trainer/matrices.py`, on two ranks, in per cent."""
    rank = [] if name in ("adafactor", "adamw") else ["optim.rank=256"]
    int8 = ["precision=int8_sr"] if name == "qgalore" else []
    cfg = load([f"optim={name}", "parallel.zero=1", "run.device=cpu", *rank, *int8])
    shapes = {"self_attn.q_proj": (1024, 1024), "mlp.gate_proj": (2736, 1024), "mlp.down_proj": (1024, 2736)}
    with pretended_ranks(cfg.parallel, 2), FakeTensorMode():
        world = World(process_count=2, device=torch.device("cpu"), gradients=PretendedGroup(2))
        grid = make_grid(world, cfg.parallel)
        weights = {f"model.layers.0.{part}.weight": nn.Parameter(torch.zeros(shape)) for part, shape in shapes.items()}
        beside = sent_beside(cfg, world, weights, grid)
        found = [100 * beside[key] / sent_anyway(weight, grid) for key, weight in weights.items()]
    assert found == pytest.approx(expected, rel=0.1)
