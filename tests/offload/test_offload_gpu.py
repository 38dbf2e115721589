"""On CUDA, where copies have streams of their own: the bits of a run that moves nothing.

Copies are held back and the device lags far behind the host, so that a missing wait on either would show.
"""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from offload.config import Fate
from parallel.launch import World
from tests.offload.models import llama, managed, rows, same, step
from tests.offload.test_offload_activations import EXACT
from tests.parallel.sharded import train

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda", 0)
LATE = 5 * 10**6
"""Cycles, some milliseconds, by which the device falls behind the host in each block."""


@pytest.fixture(autouse=True)
def kernels_with_fixed_bits() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    yield
    torch.use_deterministic_algorithms(False)


def on_gpu(dtype: torch.dtype = torch.float32) -> Any:
    """Four blocks, each of which begins late."""
    sizes = {"hidden_size": 128, "intermediate_size": 320, "attention_dropout": 0.2}
    model = llama(dtype, **sizes).to(CUDA)
    for block in model.model.layers:
        block.register_forward_pre_hook(lambda *_: torch.cuda._sleep(LATE))
        block.register_full_backward_pre_hook(lambda *_: torch.cuda._sleep(LATE))
    return model


@pytest.mark.parametrize("name", EXACT)
def test_exact_fates_give_the_bits_of_a_run_that_keeps_all(name: str) -> None:
    expected = step(on_gpu())
    model = on_gpu()
    policy = managed(model, delay=0.002, **EXACT[name])
    for _ in range(3):  # buffers of one step serve the next
        assert same(step(model), expected)
    assert all(policy.ledger.out[tier] == policy.ledger.back[tier] for tier in ("host", "disk"))
    assert not any(policy.ledger.held.values())


def test_the_allocator_has_what_was_moved_less() -> None:
    held = {}
    for fate in (Fate.keep, Fate.host):
        model = on_gpu(torch.bfloat16)
        policy = managed(model, fate=fate)
        ids = rows(8, 128).to(CUDA)
        before = torch.cuda.memory_allocated()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        held[fate] = torch.cuda.memory_allocated() - before
        del loss
    moved = sum(frame.moved for frame in policy.frames)
    assert held[Fate.keep] - held[Fate.host] == pytest.approx(moved, rel=0.01)
    assert moved > held[Fate.keep] / 2


def test_codes_of_8_bits_keep_the_gradients_direction() -> None:
    expected = step(on_gpu())
    model = on_gpu()
    policy = managed(model, fate=Fate.fp8)
    found = step(model)
    assert torch.equal(found[0], expected[0]) and policy.ledger.codes < 0.3 * policy.ledger.compressed
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) >= 0.99


HOST, MICRO = ["offload=host", "offload.window_mib=0.005"], "train.micro_batch=4"


@pytest.mark.parametrize(
    "method",
    [
        ["optim=adamw"],
        ["optim=galore", "optim.rank=4", "optim.update_proj_gap=2"],
        ["optim=adamw", "precision=bf16_sr"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("more", [HOST, [*HOST, "offload.gradients=true"], ["offload=disk", HOST[1]]], ids=" ".join)
def test_a_run_with_states_and_gradients_elsewhere_is_the_resident_one(method: list[str], more: list[str]) -> None:
    """Without a clip: its norm is summed on the host where gradients are, in another order."""
    case, world = ["precision=fp32", *method, MICRO, "train.clip_norm=0"], World(device=CUDA)
    resident, moved = train(case, world, 3), train([*case, *more], world, 3)
    assert resident.losses == moved.losses
    for name, tensor in {**resident.weights, **resident.states}.items():
        assert torch.equal(tensor.cpu(), {**moved.weights, **moved.states}[name].cpu()), name
    assert moved.held == {**resident.held, "states": 0}


@pytest.mark.parametrize("more", [[], ["offload.gradients=true"]], ids=" ".join)
def test_a_step_on_the_host_is_the_devices_to_rounding(more: list[str]) -> None:
    """Its kernels are the CPU's (`test_offload_states` holds it to those, to the bit)."""
    case, world = ["precision=fp32", "optim=sgd", MICRO], World(device=CUDA)
    resident, moved = train(case, world, 3), train([*case, *HOST, "offload.step=host", *more], world, 3)
    assert resident.losses == pytest.approx(moved.losses, rel=1e-6)
    for name, tensor in {**resident.weights, **resident.states}.items():
        assert torch.allclose(tensor.cpu(), {**moved.weights, **moved.states}[name].cpu(), rtol=1e-5, atol=1e-7), name
    assert moved.held == {**resident.held, "states": 0}


def test_gradients_that_leave_are_clipped_as_ever() -> None:
    case, world = ["optim=sgd", MICRO, "precision=fp32"], World(device=CUDA)
    resident, moved = train(case, world, 3), train([*case, *HOST, "offload.gradients=true"], world, 3)
    assert resident.norms == pytest.approx(moved.norms, rel=1e-6)
    for name, tensor in resident.weights.items():
        assert torch.allclose(tensor, moved.weights[name], rtol=1e-5, atol=1e-7), name


@pytest.mark.parametrize("clip", ["parameter", "previous"])
def test_an_update_in_backward_brings_each_state_in_time(clip: str) -> None:
    case = ["precision=fp32", "optim=adamw", "optim.in_backward=true", f"train.clip_by={clip}", MICRO]
    world = World(device=CUDA)
    resident, moved = train(case, world, 3), train([*case, *HOST], world, 3)
    assert all(torch.equal(tensor, moved.weights[name]) for name, tensor in resident.weights.items())
