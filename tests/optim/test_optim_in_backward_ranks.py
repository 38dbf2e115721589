"""Replicas that step in backward: as one process, at the cost of R on the wire and of few gradients in memory."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from optim import InBackward
from optim.in_backward import SUMMING
from parallel.config import ParallelConfig
from parallel.launch import World, connected
from tests.optim.in_backward_model import Net, build, loss_of, ordinary, rows
from tests.optim.test_optim_in_backward import OURS, poisoned_loss
from tests.ranks import on_ranks

STEPS = range(4)  # through a refresh at 0 and 3
CLIPS: list[tuple[float, str]] = [(0.0, "parameter"), (0.05, "parameter"), (0.05, "previous")]
CASES = [
    *((name, micros, 0.0, "parameter") for name in OURS for micros in (1, 4)),
    *((name, micros, clip, by) for name in ("adamw", "galore") for micros in (1, 4) for clip, by in CLIPS[1:]),
    *((name, 1, 0.05, "two_pass") for name in ("adamw", "galore", "apollo")),
]

Weights = dict[str, Any]


def weights(net: nn.Module) -> Weights:
    return {name: p.detach().numpy().copy() for name, p in net.named_parameters()}


def train(world: World, name: str, micros: int, clip: float, by: str) -> tuple[Weights, list[float | None]]:
    """Train on this rank's rows of each step."""
    net = Net()
    updates = InBackward(build(net, name), world, clip_norm=clip, clip_by=by)
    norms = []
    for step in STEPS:
        *earlier, last = rows(step).chunk(world.process_count)[world.process_rank].chunk(micros)
        for tokens in earlier:
            with updates.keep():
                loss_of(net, tokens).backward()
        measured = None
        if by == "two_pass":
            with updates.measure() as measured:
                loss_of(net, last).backward()
        with updates.update() as found:
            loss_of(net, last).backward()
        norms.append((measured or found).norm)
        assert all(p.grad is None for p in net.parameters())
    return weights(net), norms


def sizes_summed(world: World) -> list[int]:
    """Values that each step of GaLore with micro-steps sums over the ranks."""
    net, found = Net(), []
    updates = InBackward(build(net, "galore"), world)
    summed: list[int] = []
    all_reduce = dist.all_reduce

    def noted(tensor: torch.Tensor, **options: Any) -> Any:
        summed.append(tensor.numel())
        return all_reduce(tensor, **options)

    dist.all_reduce = noted
    try:
        for step in STEPS:
            with updates.update():
                loss_of(net, rows(step)).backward()
            found.append(sum(summed))
            summed.clear()
    finally:
        dist.all_reduce = all_reduce
    return found


def most_alive(world: World) -> list[int]:
    """The most gradients alive at once, in each step."""
    net = Net()
    updates = InBackward(build(net, "adamw"), world)
    alive = []

    def count(_: torch.Tensor) -> None:
        alive[-1] = max(alive[-1], sum(p.grad is not None for p in net.parameters()))

    for p in net.parameters():
        p.register_post_accumulate_grad_hook(count)  # behind the update
    for step in range(3):
        alive.append(0)
        with updates.update():
            loss_of(net, rows(step)).backward()
    return alive


def with_nan_on_rank_1(world: World) -> tuple[list[str], Weights, Weights]:
    """Names left out, and weights before and after."""
    net = Net()
    updates = InBackward(build(net, "galore"), world)
    before = weights(net)
    with updates.update() as found:
        (poisoned_loss(net) if world.process_rank == 1 else loss_of(net, rows(0))).backward()
    return found.left_out, before, weights(net)


def used_by_one_rank(world: World) -> Weights:
    """Rank 1 uses the embedding and the norm alone, in every step."""
    net = Net()
    updates = InBackward(build(net, "galore"), world)
    for step in STEPS:
        with updates.update():
            one = loss_of(net, rows(step))
            (net.norm(net.embed(rows(step))).square().mean() if world.process_rank else one).backward()
    return weights(net)


def everything() -> dict[str, Any]:
    with connected(ParallelConfig(), "cpu", 1) as world:
        return {
            "trained": {str(case): train(world, *case) for case in CASES},
            "summed": sizes_summed(world),
            "alive": most_alive(world),
            "nan": with_nan_on_rank_1(world),
            "uneven": used_by_one_rank(world),
        }


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    return on_ranks(2, everything)


def assert_equal(found: Weights, expected: Weights, within: float = 0.0) -> None:
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= within, name


@pytest.mark.parametrize("case", CASES, ids=str)
def test_replicas_step_as_one_process_does_at_once(ranks: list[dict[str, Any]], case: tuple[Any, ...]) -> None:
    name, micros, clip, by = case
    net = Net()
    norms = ordinary(net, build(net, name), STEPS, 2 * micros, clip=clip, by="global" if by == "two_pass" else by)
    (found, known), (other, known_there) = (rank["trained"][str(case)] for rank in ranks)
    assert_equal(found, other)
    assert known == known_there
    assert_equal(found, weights(net), within=1e-10)
    assert [norm for norm, true in zip(known, norms, strict=True) if norm not in (None, pytest.approx(true))] == []
    assert all(norm is not None for norm in known) or ("galore" in name and clip == 0)


def test_between_refreshes_replicas_sum_projections_alone(ranks: list[dict[str, Any]]) -> None:
    net = Net()
    whole = sum(p.numel() for p in net.parameters())
    matrices = {name: p for name, p in net.named_parameters() if name.startswith("mlp") and p.dim() == 2}
    low = whole - sum(p.numel() for p in matrices.values()) + sum(24 * max(p.shape) for p in matrices.values())
    assert ranks[0]["summed"] == [whole, low, low, whole]


def test_replicas_hold_the_gradients_under_way_and_no_more(ranks: list[dict[str, Any]]) -> None:
    first, *later = ranks[0]["alive"]
    assert first <= len(list(Net().parameters())) - 1
    assert set(later) == {SUMMING}, "the order is that in which gradients come"


def test_nan_on_one_rank_leaves_the_parameter_out_on_all(ranks: list[dict[str, Any]]) -> None:
    assert_equal(ranks[0]["nan"][2], ranks[1]["nan"][2])
    for left_out, before, after in (rank["nan"] for rank in ranks):
        assert left_out == ["mlp.down.bias"]
        assert {name for name in before if np.array_equal(before[name], after[name])} == {"mlp.down.bias"}
        assert all(math.isfinite(value.sum()) for value in after.values())


def test_a_rank_that_does_not_use_a_parameter_takes_part_in_its_sum(ranks: list[dict[str, Any]]) -> None:
    net = Net()
    optimizer = build(net, "galore")
    for step in STEPS:
        loss_of(net, rows(step)).backward()
        net.norm(net.embed(rows(step))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    for rank in ranks:
        assert_equal(rank["uneven"], weights(net), within=1e-10)
