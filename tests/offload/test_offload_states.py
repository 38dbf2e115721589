"""Optimizer states in another tier: the resident optimizer, to the bit, in less memory here."""

import copy
import errno
import os
import random
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.config import OffloadConfig, StatePlace, StepPlace, WhenFull
from offload.host_step import HostStep, states_away
from offload.pool import TierFull, TierLost
from offload.states import offloaded
from offload.streams import Copies
from offload.tiers import SpillFile
from optim import registry
from optim.base import MemoryOptimizer
from optim.residency import kept_by
from tests.offload.test_offload_activations import fail_after, open_spill_files

CPU = torch.device("cpu")
SHAPES = {
    "layers.0.mlp.weight": (64, 96),
    "layers.1.mlp.weight": (96, 64),
    "layers.2.mlp.weight": (64, 96),
    "head": (33, 5),
    "norm": (64,),
}
OURS = [name for name in registry.names() if not name.startswith(("bnb_", "torchao_"))]
THEIRS = [name for name in registry.names() if name.startswith(("bnb_", "torchao_")) and "paged" not in name]


def built(
    name: str, place: str = "none", delay: float = 0.0, device: torch.device = CPU, **options: Any
) -> tuple[MemoryOptimizer, list[Any]]:
    """An optimizer over a few parameters, its states in `place`; copies are held back for `delay` seconds each."""
    torch.manual_seed(0)
    named = [(n, nn.Parameter(torch.randn(shape).mul_(0.1).to(device))) for n, shape in SHAPES.items()]
    cfg: Any = registry.config_class(name)()
    for key, value in {"rank": 1 if "mini" in name else 8, "update_proj_gap": 2, "compile": False}.items():
        if hasattr(cfg, key):
            setattr(cfg, key, value)
    states = None
    if place != "none":
        chosen = OffloadConfig(**{"states": StatePlace[place], "window_mib": 0.02} | options)
        states = states_away(chosen, device, copies=Copies(device, delay=delay))
    with kept_by(states) if states is not None else nullcontext():
        return registry.build(cfg, named), [p for _, p in named]


def give_gradients(params: list[Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.device)


def train(optimizer: MemoryOptimizer, params: list[Any], steps: int = 4) -> None:
    for step in range(steps):
        give_gradients(params, step)
        optimizer.step()


def tensors(optimizer: MemoryOptimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


def here(optimizer: MemoryOptimizer) -> int:
    """Bytes of states on the device, each storage once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in tensors(optimizer)}
    return sum(storages.values())


def require_same(one: MemoryOptimizer, other: MemoryOptimizer, params: list[Any], others: list[Any]) -> None:
    """Weights and states are equal, to the bit."""
    assert all(torch.equal(p.cpu(), q.cpu()) for p, q in zip(params, others, strict=True)), "weights"
    saved, seen = one.state_dict()["state"], other.state_dict()["state"]
    for index, state in saved.items():
        for key, value in state.items():
            same = (
                torch.equal(value.cpu(), seen[index][key].cpu())
                if isinstance(value, Tensor)
                else value == seen[index][key]
            )
            assert same, f"{key} of parameter {index}"


ON_HOST = {"step": StepPlace.host}


def check(name: str, place: str, device: torch.device = CPU, on_host: bool = False) -> None:
    """On the host they are held against an optimizer on the CPU, whose kernels it has."""
    resident, params = built(name, device=CPU if on_host else device)
    moved, others = built(name, place, delay=0.001, device=device, **(ON_HOST if on_host else {}))
    train(resident, params)
    train(moved, others)
    assert here(moved) == 0, "between two steps no state is here"
    require_same(resident, moved, params, others)
    states = offloaded(moved)
    assert states is not None
    held = states.ledger.held[place]
    assert here(resident) <= held < here(resident) + 64 * len(tensors(resident))
    steps = 0 if on_host else 4
    assert states.ledger.out[place] == (steps + 1) * held and states.ledger.back[place] == steps * held  # once at birth
    if isinstance(states, HostStep):
        weights = sum(p.nbytes for p in others if moved.state[p])
        assert states.ledgers["weights_"].held["host"] == weights and not states.ledgers["gradients_"].held["host"]


@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("name", OURS)
def test_every_optimizer_steps_with_states_elsewhere_as_with_its_own(name: str, place: str) -> None:
    check(name, place)


@pytest.mark.parametrize("name", OURS)
def test_every_optimizer_steps_on_the_host_as_where_its_weights_are(name: str) -> None:
    check(name, "host", on_host=True)


@pytest.mark.slow
@pytest.mark.parametrize("on_host", [False, True], ids=["here", "on_the_host"])
@pytest.mark.parametrize("name", THEIRS)
def test_other_packages_optimizers_do_too(name: str, on_host: bool) -> None:
    check(name, "host", on_host=on_host)


@pytest.mark.gpu
@pytest.mark.parametrize("place", ["host", "disk"])
@pytest.mark.parametrize("name", OURS)
def test_on_cuda_too_beside_the_compute_stream(name: str, place: str) -> None:
    check(name, place, torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("name", OURS)
def test_a_step_on_the_host_of_a_gpu_is_the_cpus(name: str) -> None:
    check(name, "host", torch.device("cuda"), on_host=True)


@pytest.mark.parametrize("name", ["adamw", "galore_8bit"])
def test_parameters_may_come_one_by_one_in_any_order(name: str) -> None:
    resident, params = built(name)
    moved, others = built(name, "disk", delay=0.001)
    order = list(range(len(params)))
    for step in range(6):
        give_gradients(params, step)
        give_gradients(others, step)
        resident.step()
        if step % 3 != 1:  # the same order as before once: what was brought ahead is then right, and else wrong
            random.Random(step).shuffle(order)
        for index in order:
            moved.step_one(
                others[index], moved.param_groups[0] if len(moved.param_groups) == 1 else group(moved, index)
            )
        moved.residency.rest()
        assert here(moved) == 0
    require_same(resident, moved, params, others)


def group(optimizer: MemoryOptimizer, index: int) -> Any:
    """The group of the parameter that has this place in SHAPES."""
    name = list(SHAPES)[index]
    return next(each for each in optimizer.param_groups if name in each["param_names"])


@pytest.mark.parametrize("options", [{}, ON_HOST], ids=["here", "on_the_host"])
def test_a_step_without_gradients_changes_nothing(options: dict[str, Any]) -> None:
    moved, params = built("adamw", "host", **options)
    before = [p.clone() for p in params]
    moved.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before, strict=True)) and here(moved) == 0


def test_what_steps_on_the_host_is_made_once() -> None:
    """Optimizers keep what they know of a parameter by the tensor that steps."""
    moved, params = built("galore", "host", **ON_HOST)
    train(moved, params, 2)
    known = len(moved._known)  # type: ignore[attr-defined]
    train(moved, params, 3)
    assert len(moved._known) == known <= 2 * len(params)  # type: ignore[attr-defined]
    assert moved.state.keys() == set(params)


def test_weights_that_others_write_to_are_what_steps_on_the_host() -> None:
    """As when a checkpoint is loaded between two steps; also where no gradient comes in the step after."""
    resident, params = built("adamw")
    moved, others = built("adamw", "host", **ON_HOST)
    for optimizer, each in ((resident, params), (moved, others)):
        train(optimizer, each, 1)
        with torch.no_grad():
            each[0].mul_(2)
        give_gradients(each, 1)
        each[0].grad = None
        optimizer.step()
        train(optimizer, each, 1)
    require_same(resident, moved, params, others)


def test_three_windows_are_here_at_the_most(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, params = built("adamw", "host", window_mib=1e-6)  # one parameter each
    give_gradients(params, 0)
    sizes, seen = [8 * p.numel() for p in params], []
    inner = moved.update
    monkeypatch.setattr(moved, "update", lambda *args: (seen.append(here(moved)), inner(*args)))
    moved.step()
    ordered = [8 * p.numel() for each in moved.param_groups for p in each["params"]]
    most = [sum(ordered[max(i - 1, 0) : i + 2]) for i in range(len(ordered))]
    padding = 64 * 6
    assert len(seen) == len(sizes) and all(a <= b + padding for a, b in zip(seen, most, strict=True))


@pytest.mark.parametrize("place, options", [("disk", {}), ("host", ON_HOST)], ids=["disk", "step_on_host"])
def test_a_state_dict_loads_into_the_other_kind_of_optimizer(place: str, options: dict[str, Any]) -> None:
    resident, params = built("galore")
    moved, others = built("galore", place, **options)
    train(moved, others, 1)
    train(resident, params, 3)
    moved.load_state_dict(resident.state_dict())
    with torch.no_grad():
        for p, q in zip(params, others, strict=True):
            q.copy_(p)
    assert here(moved) == 0
    again, back = built("galore")
    again.load_state_dict(copy.deepcopy(moved).state_dict())
    for p, q in zip(params, back, strict=True):
        q.data.copy_(p)
    for optimizer, each in ((resident, params), (moved, others), (again, back)):
        train(optimizer, each, 2)
    require_same(resident, moved, params, others)
    require_same(resident, again, params, back)


def test_the_file_has_no_name_and_goes_with_the_optimizer(tmp_path: Path) -> None:
    before = open_spill_files()
    moved, params = built("adamw", "disk", disk_dir=str(tmp_path))
    train(moved, params, 1)
    assert list(tmp_path.iterdir()) == [] and open_spill_files() == before + 1
    del moved
    assert open_spill_files() == before


def test_a_disk_that_fails_on_the_way_costs_no_state(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, params = built("adamw")
    moved, others = built("adamw", "disk", delay=0.001, when_full=WhenFull.keep)
    fail_after(monkeypatch, "write", 7, errno.ENOSPC)
    train(resident, params)
    train(moved, others)
    require_same(resident, moved, params, others)
    (message,) = moved.residency.take_messages()  # type: ignore[attr-defined]
    assert "No space left on device" in message and "stays on the device" in message
    assert here(moved) > 0 and moved.residency.take_messages() == []  # type: ignore[attr-defined]


def test_a_disk_that_fails_on_the_way_stops_the_run_with_every_state_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    resident, params = built("adamw")
    moved, others = built("adamw", "disk", window_mib=1.0)
    train(resident, params, 2)
    train(moved, others, 1)
    fail_after(monkeypatch, "write", 0, errno.EIO)
    give_gradients(others, 1)
    with pytest.raises(TierFull, match="Input/output error.*when_full=stop") as caught:
        moved.step()
    assert "offload.when_full=keep" in caught.value.remedy
    kept = [t for t in tensors(moved) if t.untyped_storage().nbytes()]
    wanted = [t for t in tensors(resident) if t.shape == kept[0].shape]
    assert kept and any(torch.equal(kept[0], t) for t in wanted), "the state that was not written is here, stepped"


def test_a_disk_that_cannot_be_read_ends_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    moved, params = built("adamw", "disk")
    fail_after(monkeypatch, "read", 1, errno.EIO)
    with pytest.raises(TierLost, match="cannot be read back.*Input/output error"):
        train(moved, params, 1)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_a_budget_that_is_too_small_is_refused_with_what_is_needed(place: str) -> None:
    moved, params = built("adamw", place, **{f"{place}_gib": 5e-5})
    total = sum(-(-8 * p.numel() // 64) * 64 for p in params)
    with pytest.raises(TierFull, match=rf"offload.{place}_gib=5e-05 has no room for all.*") as caught:
        offloaded(moved).require_room()  # type: ignore[union-attr]
    needed = int(str(caught.value).partition("for all ")[2].partition(" bytes")[0].replace(",", ""))
    assert total <= needed <= total + 64 * 10
    with pytest.raises(TierFull):
        train(moved, params, 1)


@pytest.mark.parametrize("place", ["host", "disk"])
def test_what_has_no_room_stays_where_that_is_asked(place: str) -> None:
    resident, params = built("adamw")
    moved, others = built("adamw", place, when_full=WhenFull.keep, **{f"{place}_gib": 1.2e-4})
    train(resident, params)
    train(moved, others)
    require_same(resident, moved, params, others)
    assert 0 < here(moved) < here(resident)


def test_a_disk_without_room_is_found_before_the_first_step(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int, offset: int, nbytes: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    moved, _ = built("adamw", "disk")
    with pytest.raises(TierFull, match="No space left on device"):
        offloaded(moved).require_room()  # type: ignore[union-attr]


def test_bytes_on_disk_are_taken_at_the_start(tmp_path: Path) -> None:
    file = SpillFile(tmp_path)
    assert file.reserve(1 << 20, allocate=True) == 0
    assert os.fstat(file._file.fileno()).st_blocks * 512 >= 1 << 20
