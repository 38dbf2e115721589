"""A step taken in backward is the ordinary step, at the cost of one gradient at a time."""

import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from optim import AdamW, InBackward, MemoryOptimizer, registry
from optim.config import LibraryConfig
from tests.optim.in_backward_model import Net, build, distance, loss_of, numbers, ordinary, rows

STEPS = range(5)  # through a refresh at 0 and 3
OURS = [name for name in registry.names() if not issubclass(registry.config_class(name), LibraryConfig)]
LIBRARIES = [name for name in registry.names() if name not in OURS]
LINEAR = ["galore", "galore_8bit", "galore_adafactor", "qgalore"]


def in_backward(
    net: nn.Module, optimizer: MemoryOptimizer, steps: Sequence[int], micros: int, *, clip: float = 0.0,
    by: str = "parameter",
) -> list[float | None]:  # fmt: skip
    updates = InBackward(optimizer, clip_norm=clip, clip_by=by)
    norms = []
    for step in steps:
        *earlier, last = rows(step).chunk(micros)
        for tokens in earlier:
            with updates.keep():
                loss_of(net, tokens).backward()
        measured = None
        if by == "two_pass" and clip:
            with updates.measure() as measured:
                loss_of(net, last).backward()
            assert all(p.grad is None for p in net.parameters())
        with updates.update() as found:
            loss_of(net, last).backward()
        norms.append((measured or found).norm)
        assert found.left_out == []
        assert all(p.grad is None for p in net.parameters()) and optimizer.reduced == {}
    updates.detach()
    return norms


@pytest.mark.parametrize("micros", [1, 4])
@pytest.mark.parametrize("name", OURS)
def test_every_optimizer_steps_in_backward_as_at_once(name: str, micros: int) -> None:
    one, other = Net(), Net()
    at_once, hooked = build(one, name), build(other, name)
    norms = ordinary(one, at_once, STEPS, micros)
    found = in_backward(other, hooked, STEPS, micros)
    assert distance(one, other) < 1e-10
    assert numbers(at_once) == numbers(hooked)
    if micros > 1 and name in LINEAR:  # only projections were at hand, but for the steps of a refresh
        assert [norm is None for norm in found] == [False, True, True, False, True]
    else:
        assert found == pytest.approx(norms, rel=1e-10)


@pytest.mark.parametrize("name", registry.names())
def test_without_micro_steps_the_weights_are_equal_bit_for_bit(name: str) -> None:
    one, other = Net(torch.float32), Net(torch.float32)
    ordinary(one, build(one, name), STEPS, 1)
    in_backward(other, build(other, name), STEPS, 1)
    assert distance(one, other) == 0.0


@pytest.mark.parametrize("name", registry.names())
def test_with_micro_steps_fp32_weights_are_equal_to_1e_6(name: str) -> None:
    one, other = Net(torch.float32), Net(torch.float32)
    ordinary(one, build(one, name), STEPS, 4)
    in_backward(other, build(other, name), STEPS, 4)
    assert distance(one, other) < 1e-6


@pytest.mark.parametrize("micros", [1, 4])
@pytest.mark.parametrize("by", ["parameter", "previous"])
@pytest.mark.parametrize("name", ["adamw", "galore", "apollo", "sgd"])
def test_clipping_is_what_torch_makes_of_the_same_norms(name: str, by: str, micros: int) -> None:
    one, other = Net(), Net()
    norms = ordinary(one, build(one, name), STEPS, micros, clip=0.05, by=by)
    assert in_backward(other, build(other, name), STEPS, micros, clip=0.05, by=by) == pytest.approx(norms, rel=1e-10)
    assert distance(one, other) < 1e-10
    unclipped = Net()
    ordinary(unclipped, build(unclipped, name), STEPS, micros)
    assert distance(one, unclipped) > 1e-6, "the clipping has to matter"


@pytest.mark.parametrize("name", ["adamw", "galore", "fira", "sgd"])
def test_two_passes_clip_by_the_global_norm(name: str) -> None:
    one, other = Net(), Net()
    norms = ordinary(one, build(one, name), STEPS, 1, clip=0.05, by="global")
    assert in_backward(other, build(other, name), STEPS, 1, clip=0.05, by="two_pass") == pytest.approx(norms, rel=1e-10)
    assert distance(one, other) < 1e-10


def test_the_norm_of_the_step_before_can_be_saved_and_given_back() -> None:
    one, other = Net(), Net()
    ordinary(one, build(one, "adamw"), STEPS, 1, clip=0.05, by="previous")
    optimizer = build(other, "adamw")
    updates = InBackward(optimizer, clip_norm=0.05, clip_by="previous")
    for step in STEPS:
        with updates.update():
            loss_of(other, rows(step)).backward()
        updates.detach()
        saved = updates.previous
        updates = InBackward(optimizer, clip_norm=0.05, clip_by="previous")
        updates.previous = saved
    assert distance(one, other) < 1e-10


def test_a_tied_weight_steps_once_after_all_its_uses() -> None:
    net = Net()
    optimizer = build(net, "adamw")
    calls: list[str] = []
    update = optimizer.update
    optimizer.update = lambda params, group: (calls.extend(map(optimizer.name_of, params)), update(params, group))  # type: ignore[assignment]
    in_backward(net, optimizer, range(1), 1)
    assert calls.count("embed.weight") == 1 and calls[-1] == "embed.weight"
    assert len(calls) == len(list(net.parameters()))


@pytest.mark.parametrize("name", LINEAR)
def test_between_refreshes_only_projections_add_up(name: str) -> None:
    net = Net()
    optimizer = build(net, name)
    updates = InBackward(optimizer)
    matrix = net.mlp["up"].weight  # (128, 96), projected on its right to rank 24
    for step in range(4):
        with updates.keep():
            loss_of(net, rows(step)).backward()
        if step in (0, 3):  # a new basis needs the whole gradient
            assert matrix.grad is not None and optimizer.reduced == {}
        else:
            assert matrix.grad is None and optimizer.reduced[matrix].shape == (128, 24)
        assert net.norm.weight.grad is not None, "a vector has no projection"
        with updates.update():
            loss_of(net, rows(step)).backward()


def test_clipping_by_own_norms_keeps_whole_gradients() -> None:
    net = Net()
    updates = InBackward(build(net, "galore", update_proj_gap=100), clip_norm=1.0, clip_by="parameter")
    for _ in range(2):
        with updates.keep():
            loss_of(net, rows(0)).backward()
        assert net.mlp["up"].weight.grad is not None
        with updates.update():
            loss_of(net, rows(0)).backward()


class Poison(torch.autograd.Function):
    """Passes its input on, and NaN back."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * math.nan


def poisoned_loss(net: Net) -> Tensor:
    """A loss that is finite, and whose gradient of one bias is not."""
    bias = net.mlp["down"].bias
    return loss_of(net, rows(0)) + (Poison.apply(bias) * 0.5).sum()


@pytest.mark.parametrize("by", ["parameter", "previous"])
def test_a_gradient_that_is_not_finite_leaves_out_its_parameter_alone(by: str) -> None:
    net = Net()
    optimizer = build(net, "adamw")
    updates = InBackward(optimizer, clip_norm=1.0, clip_by=by)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    with updates.update() as found:
        poisoned_loss(net).backward()
    assert found.left_out == ["mlp.down.bias"] and not math.isfinite(found.norm or 0)
    changed = {name for name, p in net.named_parameters() if not torch.equal(p, before[name])}
    assert changed == before.keys() - {"mlp.down.bias"}
    state = optimizer.state[net.mlp["down"].bias]
    assert state["step"] == 0 and not state["exp_avg"].any()
    assert updates.previous is None, "such a norm is none to clip by"
    with updates.update() as found:
        loss_of(net, rows(1)).backward()
    assert found.left_out == [] and state["step"] == 1


def test_two_passes_know_of_it_before_anything_steps() -> None:
    net = Net()
    optimizer = build(net, "galore")
    updates = InBackward(optimizer, clip_norm=1.0, clip_by="two_pass")
    before = [p.detach().clone() for p in net.parameters()]
    with updates.measure() as found:
        poisoned_loss(net).backward()
    assert found.norm is not None and not math.isfinite(found.norm)
    updates.drop()
    assert all(torch.equal(p, q) for p, q in zip(net.parameters(), before, strict=True))
    assert all(state["step"] == 0 for state in optimizer.state.values())


def test_dropped_gradients_are_forgotten() -> None:
    one, other = Net(), Net()
    ordinary(one, build(one, "galore", update_proj_gap=100), STEPS, 4)
    optimizer = build(other, "galore", update_proj_gap=100)
    updates = InBackward(optimizer)
    for step in STEPS:
        with updates.keep():
            loss_of(other, rows(77)).backward()
        updates.drop()
        *earlier, last = rows(step).chunk(4)
        for tokens in earlier:
            with updates.keep():
                loss_of(other, tokens).backward()
        with updates.update():
            loss_of(other, last).backward()
    assert distance(one, other) < 1e-10


@pytest.mark.parametrize("name", ["adamw", "galore"])
def test_what_only_an_earlier_micro_step_used_is_stepped_too(name: str) -> None:
    def run(net: Net, optimizer: MemoryOptimizer, updates: InBackward | None) -> None:
        for step in range(3):
            if updates is None:
                loss_of(net, rows(step)).backward()
                net.norm(net.embed(rows(step))).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
                continue
            with updates.keep():
                loss_of(net, rows(step)).backward()
            with updates.update() as found:
                net.norm(net.embed(rows(step))).square().sum().backward()
            assert found.left_out == [] and all(p.grad is None for p in net.parameters())

    one, other = Net(), Net()
    run(one, build(one, name), None)
    optimizer = build(other, name)
    run(other, optimizer, InBackward(optimizer))
    assert distance(one, other) < 1e-10


def test_outside_of_a_pass_gradients_are_as_ever() -> None:
    net = Net()
    InBackward(build(net, "adamw"))
    before = net.norm.weight.detach().clone()
    loss_of(net, rows(0)).backward()
    assert net.norm.weight.grad is not None and torch.equal(net.norm.weight, before)


def test_a_second_gradient_in_one_backward_is_an_error() -> None:
    net = Net(torch.float32)
    updates = InBackward(build(net, "adamw"))

    def twice(x: Tensor) -> Tensor:
        return net.mlp["square"](x)

    x = torch.zeros(2, 96, requires_grad=True)
    hidden = checkpoint(twice, checkpoint(twice, x, use_reentrant=True), use_reentrant=True)
    with pytest.raises(RuntimeError, match="second gradient in one backward.*use_reentrant=False"), updates.update():
        hidden.sum().backward()


def test_sparse_gradients_are_refused_by_name() -> None:
    net = nn.ModuleDict({"embed": nn.Embedding(10, 4, sparse=True)})
    updates = InBackward(AdamW(net.named_parameters()))
    with pytest.raises(ValueError, match=r"embed\.weight is torch\.sparse_coo"), updates.update():
        net["embed"](torch.tensor([1])).sum().backward()


def test_a_way_of_clipping_that_comes_too_late_is_refused() -> None:
    with pytest.raises(ValueError, match="clip_by='global': must be one of parameter, previous, two_pass"):
        InBackward(build(Net(), "adamw"), clip_norm=1.0, clip_by="global")
