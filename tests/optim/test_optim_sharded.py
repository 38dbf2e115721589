"""Sharded = whole: every optimizer on shards of rows and columns, uneven and empty ones, through refreshes."""

import functools
import tempfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from optim import registry
from optim.config import Basis, OnRefresh, ProjType, Refresh, States
from optim.config_library import LibraryConfig
from optim.config_lowrank import Products
from parallel.dtensor import Layout, local
from tests.optim.sharded import (
    LARGE,
    SMALL,
    Counted,
    config,
    differences,
    everything,
    local_bytes,
    net,
    ranks_agree,
    run,
    set_gradients,
    shard,
)
from tests.ranks import on_ranks
from trainer.state import optimizer_tensors, parameter_names

OWN = [name for name in registry.names() if not issubclass(registry.config_class(name), LibraryConfig)]
NAMED = [(name, {}) for name in OWN]
VARIANTS = [
    *(("galore", {"proj_type": side}) for side in (ProjType.reverse_std, ProjType.left, ProjType.right)),
    *(("galore", {"refresh": refresh}) for refresh in (Refresh.svd, Refresh.gram, Refresh.randomized)),
    *(("galore", {"on_refresh": on}) for on in OnRefresh if on is not OnRefresh.keep),
    ("galore", {"lazy": True, "lazy_threshold": 0.01, "update_proj_gap": 2, "stagger": True}),
    ("galore", {"proj_type": ProjType.reverse_std, "refresh": Refresh.randomized, "on_refresh": OnRefresh.rotate}),
    ("galore", {"basis_copies": True, "on_refresh": OnRefresh.procrustes}),
    ("fira", {"proj_type": ProjType.reverse_std}),
    *(("galore", {"products": Products.bf16, "proj_type": side}) for side in (ProjType.left, ProjType.right)),
    ("apollo", {"refresh": Refresh.warm, "proj_type": ProjType.left}),
    ("apollo", {"proj_type": ProjType.right}),
    ("apollo_mini", {"proj_type": ProjType.reverse_std}),
    ("apollo", {"proj_type": ProjType.left, "basis": Basis.regenerate}),
    ("galore_adafactor", {"proj_type": ProjType.left}),
    ("adafactor", {"beta1": 0.0}),
    ("cosmos", {"rank": 8}),
]
CODED = [
    *(("adamw", {"states": states}) for states in States),
    *(("galore", {"states": states, "rank": 71}) for states in States),
    ("sgd", {"states": States.fp8}),
    ("adafactor", {"states": States.int8}),
    ("galore", {"states": States.int8, "rank": 70, "basis": Basis.int4, "on_refresh": OnRefresh.rotate}),
    ("galore", {"states": States.int4, "rank": 70, "basis": Basis.int4, "proj_type": ProjType.reverse_std}),
    ("galore", {"rank": 70, "basis": Basis.int4, "basis_copies": True}),
    ("galore_adafactor", {"states": States.int8, "rank": 70, "proj_type": ProjType.left}),
    ("fira", {"states": States.fp8, "rank": 70}),
    ("apollo", {"states": States.int8, "rank": 70, "proj_type": ProjType.left}),
    ("cosmos", {"states": States.int8, "rank": 70}),
]


DEFICIENT = [
    *(("galore", {"refresh": refresh}) for refresh in (Refresh.warm, Refresh.svd, Refresh.gram)),
    ("galore", {"proj_type": ProjType.reverse_std, "on_refresh": OnRefresh.rotate}),
    ("fira", {}),
]
"""Not Adafactor: what its R holds along directions that the gradient does not have is rounding, and it divides that by
its own size. Nor a sketch, whose leading row is less exact: rounding that is 1e-17 there is 1e-8 by Adam's eps."""


def _cases(count, mesh, cases, shapes, steps, gradient_rank=None):
    """What differs from the whole, of weights, states and bytes."""
    wrong = []
    for name, options in cases:
        cfg = config(name, **options)
        plain = net(shapes)
        expected = everything(plain, run(plain, cfg, steps, gradient_rank=gradient_rank))
        for dim in (0, 1) if count > 1 else (0,):
            label = f"{name} {options} Shard({dim}) on {count}"
            module = shard(net(shapes), mesh, dim)
            try:
                optimizer = run(module, cfg, steps, gradient_rank=gradient_rank)
                found = everything(module, optimizer)
            except Exception as error:
                raise RuntimeError(label) from error
            wrong += [f"{label}: {text}" for text in differences(expected, found, 1e-10)]
            wrong += _bytes(label, module, optimizer, cfg)
            small = [torch.as_tensor(value, dtype=torch.float64).reshape(-1) for state in optimizer.state.values()
                     for value in state.values() if not isinstance(value, DTensor)]  # fmt: skip
            if count > 1 and not ranks_agree(torch.cat(small)):
                wrong.append(f"{label}: ranks disagree on numbers or small tensors")
    return wrong


def _bytes(label, module, optimizer, cfg):
    """Each state once over the ranks, but for small ones, which every rank has."""
    own, everywhere = local_bytes(optimizer)
    total = torch.tensor([own - everywhere])
    dist.all_reduce(total)
    once = registry.state_bytes(cfg, [(n, p.shape) for n, p in module.named_parameters()], torch.float64)
    if int(total) + everywhere != once:
        return [f"{label}: {int(total)} + {everywhere} bytes, not {once}"]
    return []


def _low_bits(count, mesh, rounding, dtype):
    """fp32 and bf16 weights by elementwise rules, whose arithmetic does not depend on shards."""
    wrong = []
    for name in ("adamw", "adamw_8bit", "adamw_4bit", "adamw_fp8", "sgd"):
        cfg = config(name, states=States.int8) if name == "sgd" else config(name)
        plain = net(LARGE, dtype)
        expected = everything(plain, run(plain, cfg, 4, rounding))
        for dim in (0, 1):
            module = shard(net(LARGE, dtype), mesh, dim)
            found = everything(module, run(module, cfg, 4, rounding))
            label = f"{name} {rounding} Shard({dim}) on {count}"
            for key in [key for key in expected if key.endswith(("_scale", "_power"))]:
                if not torch.equal(expected[key], found[key]):
                    wrong.append(f"{label}: {key}")
            # Uncoded moments may differ in the last bit: kernels round what their vectors leave over in another way.
            wrong += [f"{label}: {text}" for text in differences(expected, found, 1e-6)]
            weights = [key for key in expected if "/" not in key]
            if dtype is torch.bfloat16 and not all(torch.equal(expected[key], found[key]) for key in weights):
                wrong.append(f"{label}: bf16 weights")
    return wrong


SAVED = [
    ("adamw", {"states": States.int4}),
    ("adamw", {"states": States.fp8}),
    ("galore", {"states": States.int8, "rank": 70, "basis": Basis.int4, "lazy": True}),
    ("fira", {}),
    ("galore_adafactor", {}),
    ("cosmos", {}),
]


def _saved(index):
    name, options = SAVED[index]
    return f"{index}_{name}", config(name, **options, **({"update_proj_gap": 3} if name == "galore" else {}))


def _save(mesh, folder):
    """Three steps on these ranks, shards of rows and of columns, kept as the trainer keeps them."""
    for index in range(len(SAVED)):
        label, cfg = _saved(index)
        module = shard(net(LARGE), mesh, index % 2)
        optimizer = run(module, cfg, 3)
        dcp.save(_tensors(module, optimizer), checkpoint_id=str(Path(folder) / label))
        numbers = {
            name: {key: value for key, value in optimizer.state[p].items() if not isinstance(value, torch.Tensor)}
            for name, p in module.named_parameters()
        }
        if dist.get_rank() == 0:
            torch.save(numbers, Path(folder) / f"{label}.pt")


def _tensors(module, optimizer):
    weights = {f"model/{name}": p.detach() for name, p in module.named_parameters()}
    return weights | optimizer_tensors(optimizer, parameter_names(module))


def _load(count, mesh, folder):
    """Go on for three steps where two ranks have saved; shards of rows that were of columns, and the other way."""
    wrong = []
    for index in range(len(SAVED)):
        label, cfg = _saved(index)
        plain = net(LARGE)
        expected = everything(plain, run(plain, cfg, 6))
        module = shard(net(LARGE), mesh, 1 - index % 2)
        for p in module.parameters():
            nn.init.zeros_(local(p))
        optimizer = registry.build(cfg, module.named_parameters())
        dcp.load(_tensors(module, optimizer), checkpoint_id=str(Path(folder) / label))
        numbers = torch.load(Path(folder) / f"{label}.pt", weights_only=True)
        for name, p in module.named_parameters():
            optimizer.state[p].update(numbers[name])
        for step in range(3, 6):
            set_gradients(module, step)
            optimizer.step()
        found = everything(module, optimizer)
        wrong += [f"{label} on {count}: {text}" for text in differences(expected, found, 1e-10)]
        other = registry.build(cfg, module.named_parameters())
        other.load_state_dict(optimizer.state_dict())
        again = everything(module, other)
        wrong += [f"{label} on {count}, load_state_dict: {text}" for text in differences(found, again, 0.0)]
    return wrong


def _not_finite(count, mesh):
    """Some values of one rank are NaN or infinite at step 2 of 4: these tensors stand still on all, all others step."""
    wrong = []
    broken = {"mlp_tall": float("nan"), "mlp_wide": float("inf"), "embed": float("nan")}
    for name in OWN:
        cfg = config(name)
        module = shard(net(SMALL), mesh, 0)
        optimizer = registry.build(cfg, module.named_parameters())
        for step in range(4):
            set_gradients(module, step)
            before = everything(module, optimizer) if step > 1 else {}
            if step == 2 and dist.get_rank() == 0:
                for key, value in broken.items():
                    local(module.get_parameter(key).grad)[0, 1] = value
            optimizer.step()
            after = everything(module, optimizer)
            changed = {key.split("/")[0] for key in before if not torch.equal(before[key], after[key])}
            expected = {n for n, _ in module.named_parameters()} - (broken.keys() if step == 2 else set())
            if step > 1 and (changed != expected or optimizer.skipped != len(broken)):
                wrong.append(f"{name} at step {step}: moved {sorted(changed)}, {optimizer.skipped} skipped")
    return wrong


def _sent(count, mesh):
    """Values sent in a step and in a refresh against the formulas; numbers alone apart."""
    wrong = []
    m, n = 48, 24
    for name in ("adamw", "sgd", "adafactor", "galore", "copies", "apollo", "apollo_mini", "fira", "cosmos"):
        r = 1 if name == "apollo_mini" else 4
        options = {} if name in ("adamw", "sgd", "adafactor") else {"rank": r}
        cfg = config("galore", basis_copies=True, **options) if name == "copies" else config(name, **options)
        for shape, dim in [((m, n), 0), ((m, n), 1), ((n, m), 0), ((n, m), 1)]:
            module = nn.Module()
            module.register_parameter("mlp", nn.Parameter(torch.ones(shape)))
            module = shard(module, mesh, dim)
            optimizer = registry.build(cfg, module.named_parameters())
            optimizer.check_finite = False
            for step in range(8):  # the basis is found at 0 and again at 7, warm, as the gradient stays
                set_gradients(module, 0)
                with Counted() as counted:
                    optimizer.step()
                kind = {0: "first", 7: "refresh"}.get(step, "step")
                expected = _formula(name, shape, dim, r, count, kind)
                label = f"{name} {shape} Shard({dim}) on {count}, {kind} {step}"
                if counted.values != expected:
                    wrong.append(f"{label}: {counted.values} values, not {expected}: {counted.calls}")
                if counted.numbers > 10 or counted.largest >= m * n:
                    wrong.append(f"{label}: {counted.calls}")
    return wrong


def _formula(name, shape, dim, r, count, kind):
    """Values a rank sends: an all-reduce of x is 2 x, a gather or scatter of x is x, an exchange what the rank has."""
    m, n = shape
    if name in ("adamw", "sgd"):
        return 0
    if name == "adafactor":
        return 2 * (n if dim == 0 else m)
    k, o = min(m, n), max(m, n)
    cut = (m < n) == (dim == 0)
    exchange = m * n // count if cut else 0
    # Collectives want equal parts: where rows are shared out, of R or of the basis, there are as many as of ranks.
    ranks = -(-r // count) * count
    if name == "cosmos":
        found = 2 * k * k if kind == "first" else 2 * r * k
        return ranks * k + found + 2 * r * r + 10 * k * k + 2 * exchange
    basis = r * k if cut else 0 if name == "copies" else ranks * k
    low = ranks * o if m < n else r * o
    step = low + {"apollo": 6 * o, "apollo_mini": 0, "fira": low + 6 * o}.get(name, low) if cut else basis
    if kind == "step" or name.startswith("apollo"):
        return step
    return step + exchange + (2 * k * k if kind == "first" else basis + 2 * r * k)


class _Model(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.mlp = nn.ModuleDict({"up": nn.Linear(12, 30), "down": nn.Linear(30, 12)})
        self.norm = nn.LayerNorm(12)

    def forward(self, x):
        return self.norm(x + self.mlp["down"](torch.tanh(self.mlp["up"](x))))


def _train(model, build, ranks, count, dtype, seed=0):
    """20 steps. Each rank has its rows of the batch, and FSDP2 sums the gradients; one that has those of all sums them
    itself."""
    optimizer = build(model)
    for step in range(20):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        x, y = (torch.randn(12, 12, generator=generator, dtype=torch.float64).to(dtype) for _ in range(2))
        for rank in ranks:
            (model(x[rank::count]) - y[rank::count]).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    weights = {n: p.full_tensor() if isinstance(p, DTensor) else p for n, p in model.named_parameters()}
    return {name: weight.detach().double() for name, weight in weights.items()}


def _fsdp(model, mesh, dim):
    """Sums of gradients, as the trainer wants them."""
    place = None if dim == 0 else lambda p: Shard(1) if p.dim() == 2 else Shard(0)
    fully_shard(model, mesh=mesh, shard_placement_fn=place)
    model.set_gradient_divide_factor(1.0)
    model.set_force_sum_reduction_for_comms(True)
    return model


def _drift(one, other):
    """How far two ways are apart, of the size of the weights."""
    apart = sum(float((one[key] - other[key]).square().sum()) for key in one)
    return (apart / sum(float(weight.square().sum()) for weight in one.values())) ** 0.5


SEEDS = 3
"""Over which drifts are averaged: a single one is mostly that of a few weights that fell into another last digit."""
MARGIN = 1.25
"""Of drifts that are alike: means of three differ by a tenth."""


def _backward(count, mesh):
    """Forward and backward under FSDP2: fp64 equal, fp32 beside torch's AdamW and beside itself on one rank.

    A gradient that is summed in two parts differs in its last digits from one made at once. That alone, without shards,
    is what other optimizers drift further by than AdamW (`test_optim_drift.py`); shards must add nothing to it.
    """
    wrong, rank = [], dist.get_rank()
    dims = (0, 1) if 12 % count == 0 and 30 % count == 0 else (0,)
    usual = None
    for name in ["torch", *OWN]:
        cfg = config("adamw" if name == "torch" else name)

        def build(model, cfg=cfg, name=name):
            if name == "torch":
                return torch.optim.AdamW(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay)
            return registry.build(cfg, model.named_parameters())

        one = _train(_Model().double(), build, [0], 1, torch.float64)
        for dim in dims:
            other = _train(_fsdp(_Model().double(), mesh, dim), build, [rank], count, torch.float64)
            if not (drift := _drift(one, other)) <= 1e-10:
                wrong.append(f"{name} in fp64, Shard({dim}) on {count}: {drift:.1e}")
        if name not in NARROW:
            continue
        parts, shards = [], []
        for seed in range(SEEDS):
            one = _train(_Model(), build, [0], 1, torch.float32, seed)
            parts.append(_drift(one, _train(_Model(), build, range(count), count, torch.float32, seed)))
            shards.append(_drift(one, _train(_fsdp(_Model(), mesh, 0), build, [rank], count, torch.float32, seed)))
        mean = sum(shards) / SEEDS
        usual = mean if usual is None else usual  # torch's AdamW comes first
        limit = MARGIN * max(usual, sum(parts) / SEEDS) if count > 1 else 0.0
        if not mean <= limit:
            wrong.append(f"{name} in fp32 on {count}: {mean:.1e}, not below {limit:.1e}")
    return wrong


NARROW = ("torch", "adamw", "sgd", "adafactor", "galore", "galore_adafactor", "apollo", "apollo_mini", "fira", "cosmos")
"""Those whose fp32 arithmetic differs at this size, where no state is coded."""


def _other_ways():
    """Replicas of shards on 2 x 2 ranks; one parameter at a time, over a group of its own."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    group = [dist.new_group([0, 1]), dist.new_group([2, 3])][dist.get_rank() // 2]
    wrong = []
    for name in OWN:
        cfg = config(name)
        plain = net(SMALL)
        expected = everything(plain, run(plain, cfg, 9))
        module = fully_shard(net(SMALL), mesh=mesh)
        assert all(p.placements == (Replicate(), Shard(0)) for p in module.parameters())
        wrong += [
            f"{name} on 2 x 2: {t}" for t in differences(expected, everything(module, run(module, cfg, 9)), 1e-10)
        ]
        module = fully_shard(net(SMALL), mesh=mesh)
        optimizer = registry.build(cfg, module.named_parameters())
        optimizer.shard_group = group
        for step in range(9):
            set_gradients(module, step)
            for each in reversed(optimizer.param_groups):
                for p in each["params"]:
                    optimizer.step_one(p, each)
                    p.grad = None
        wrong += [f"{name} one by one: {t}" for t in differences(expected, everything(module, optimizer), 1e-10)]
    return wrong


CLAIMS = {
    "named": lambda count, mesh, folder: _cases(count, mesh, NAMED, SMALL, 20),
    "variants": lambda count, mesh, folder: _cases(count, mesh, VARIANTS, SMALL, 9),
    "deficient": lambda count, mesh, folder: _cases(count, mesh, DEFICIENT, SMALL, 9, gradient_rank=1),
    "codes": lambda count, mesh, folder: _cases(count, mesh, CODED, LARGE, 4),
    "low bits": lambda count, mesh, folder: _low_bits(count, mesh, "nearest", torch.float32),
    "draws": lambda count, mesh, folder: _low_bits(count, mesh, "stochastic", torch.bfloat16),
    "saved": lambda count, mesh, folder: _save(mesh, folder),
    "loaded": lambda count, mesh, folder: _load(count, mesh, folder),
    "not finite": lambda count, mesh, folder: _not_finite(count, mesh),
    "sent": lambda count, mesh, folder: _sent(count, mesh),
    "backward": lambda count, mesh, folder: _backward(count, mesh),
    "other ways": lambda count, mesh, folder: _other_ways(),
}


def _claim(claim, count, folder):
    dist.init_process_group("gloo")
    wrong = CLAIMS[claim](count, init_device_mesh("cpu", (count,)), folder)
    dist.destroy_process_group()
    return wrong


@functools.cache
def saved_by_two():
    folder = tempfile.TemporaryDirectory()
    on_ranks(2, _claim, "saved", 2, folder.name)
    return folder


def holds(count, claim):
    folder = saved_by_two().name if claim == "loaded" else ""
    wrong = on_ranks(count, _claim, claim, count, folder, timeout=600)[0]
    assert wrong == [], "\n".join(wrong)


ONE, TWO, FOUR = (pytest.param(count, marks=pytest.mark.slow) for count in (1, 2, 4))


@pytest.mark.parametrize("count", [ONE, TWO, 3, FOUR])
def test_every_optimizer_steps_shards_as_the_whole(count):
    """fp64 to 1e-10 after 20 steps through refreshes, and every state once over the ranks."""
    holds(count, "named")


@pytest.mark.slow
def test_so_does_every_side_refresh_and_way_to_keep_moments():
    holds(3, "variants")


def test_gradients_of_lower_rank_than_the_subspace_leave_nothing_to_chance():
    """Directions that they do not have are drawn by name, and are the same however the gradient is sharded."""
    holds(3, "deficient")


@pytest.mark.parametrize("count", [2, FOUR])
def test_codes_are_the_same_bytes_at_any_rank_count(count):
    holds(count, "codes")


def test_low_bit_states_of_fp32_weights_are_the_same_bits():
    holds(3, "low bits")


def test_stochastic_rounding_draws_the_same_for_shards():
    holds(3, "draws")


@pytest.mark.parametrize("count", [ONE, 3, FOUR])
def test_a_checkpoint_of_two_ranks_goes_on_at_any_rank_count(count):
    holds(count, "loaded")


def test_a_gradient_that_is_not_finite_on_one_rank_leaves_its_parameter_alone_on_all():
    holds(2, "not finite")


@pytest.mark.parametrize("count", [2, 3])
def test_a_step_sends_what_the_formulas_say_and_never_the_gradient(count):
    holds(count, "sent")


def test_under_fsdp_fp64_is_exact_and_fp32_drifts_as_torch_adamw_does():
    holds(2, "backward")


@pytest.mark.slow
def test_replicas_of_shards_and_single_parameters_over_another_group():
    holds(4, "other ways")


@pytest.mark.parametrize("dim", [0, 1])
def test_steps_of_shards_run_on_fake_tensors_through_a_refresh(dim):
    """So that a memory plan can run the real step of one rank among many, without the memory or the others."""
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=4)
    try:
        mesh = init_device_mesh("cpu", (4,))
        for name, options in [*NAMED, *CODED[-6:]]:
            cfg = config(name, **options)
            with FakeTensorMode():
                module = nn.Module()
                for key, shape in LARGE.items():
                    part = nn.Parameter(_part(torch.empty(shape), mesh, dim))
                    module.register_parameter(f"mlp_{key}", part)
                optimizer = registry.build(cfg, module.named_parameters())
                for _ in range(3):
                    for p in module.parameters():
                        p.grad = torch.empty_like(p)
                    optimizer.step()
                    for state in optimizer.state.values():
                        state["next_refresh"] = 0
            assert {state["step"] for state in optimizer.state.values()} <= {1, 3}, name
    finally:
        dist.destroy_process_group()


def _part(whole, mesh, dim):
    layout = replace(Layout.of(distribute_tensor(torch.empty(8, 8), mesh, [Shard(dim)], src_data_rank=None)),
                     shape=tuple(whole.shape))  # fmt: skip
    return layout.wrap(layout.cut(whole).clone())
