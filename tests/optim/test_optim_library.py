"""Pass-through to bitsandbytes and torchao: their step, our states."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from optim import registry
from optim.config import LibraryConfig, States
from trainer.check_machine import check_hardware
from trainer.cli.compose import load
from trainer.errors import UserError

ROOT = Path(__file__).parents[2]
NAMES = [name for name in registry.names() if issubclass(registry.config_class(name), LibraryConfig)]
CODED, PLAIN, RAGGED = (64, 96), (40,), (70, 61)
"""RAGGED has over 4096 values and no whole number of blocks: bitsandbytes' last is shorter, torchao keeps fp32."""


def parameters(dtype=torch.float32):
    shapes = {"w": CODED, "b": PLAIN, "r": RAGGED}
    generator = torch.Generator().manual_seed(0)
    return [(name, nn.Parameter(torch.randn(s, generator=generator).to(dtype))) for name, s in shapes.items()]


def give_gradients(params, step):
    generator = torch.Generator().manual_seed(1000 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)


def theirs(cfg, params):
    options = {"lr": cfg.lr, "betas": tuple(cfg.betas), "weight_decay": cfg.weight_decay}
    module = pytest.importorskip("bitsandbytes" if cfg.package == "bitsandbytes" else "torchao").optim
    return getattr(module, cfg.kind)(params, **options)


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_20_steps_are_those_of_the_package_itself_bit_for_bit(name, dtype):
    """bf16: but for torchao's plain states, which are bf16 there and fp32 here."""
    cfg = registry.config_class(name)(lr=1e-2, weight_decay=0.1, decay_vectors=True)
    ours, others = parameters(dtype), [p for _, p in parameters(dtype)]
    first, second = registry.build(cfg, ours), theirs(cfg, others)
    for step in range(20):
        give_gradients([p for _, p in ours], step)
        give_gradients(others, step)
        first.step()
        second.step()
    for (key, p), q in zip(ours, others, strict=True):
        if dtype is torch.bfloat16 and cfg.package == "torchao" and key != "w":
            continue
        assert torch.equal(p, q), key


@pytest.mark.parametrize("name", NAMES)
def test_the_learning_rate_of_a_schedule_reaches_the_package(name):
    named = parameters()
    optimizer = registry.build(registry.config_class(name)(), named)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before = [p.detach().clone() for _, p in named]
    give_gradients([p for _, p in named], 0)
    optimizer.step()
    assert all(torch.equal(a, p) for a, (_, p) in zip(before, named, strict=True))


@pytest.mark.parametrize("name", ["bnb_adamw_8bit", "torchao_adamw_8bit"])
def test_steps_far_below_bf16s_resolution_add_up_with_stochastic_rounding(name):
    """200 steps of 1e-4 from 1, where bf16's values are 4e-3 apart below and 8e-3 above: to nearest none arrives."""
    moved = {}
    for rounding in ("nearest", "stochastic"):
        p = nn.Parameter(torch.ones(64, 96, dtype=torch.bfloat16))
        optimizer = registry.build(registry.config_class(name)(lr=1e-4), [("w", p)], rounding=rounding)
        for _ in range(200):
            p.grad = torch.full_like(p, -1.0)
            optimizer.step()
        moved[rounding] = float(p.detach().double().mean()) - 1.0
    assert moved["nearest"] == 0.0
    # a draw's variance is at most (LSB/2)^2 a step, over 6144 values
    assert abs(moved["stochastic"] - 0.02) <= 4 * 200**0.5 * 2**-8 / 6144**0.5


@pytest.mark.parametrize("name", NAMES)
def test_a_step_leaves_nothing_with_the_package(name):
    named = parameters()
    optimizer = registry.build(registry.config_class(name)(), named)
    give_gradients([p for _, p in named], 0)
    optimizer.step()
    home = sys.modules[type(optimizer).__module__]
    worker = home.worker(optimizer.param_groups[0]["kind"])
    assert not worker.state and not worker.param_groups


def test_states_another_than_the_packages_are_refused_with_ours():
    (problem,) = registry.config_class("bnb_adamw_8bit")(states=States.fp8).problems()
    assert problem == (
        "optim.states=fp8: bitsandbytes's AdamW8bit keeps int8 states; leave it out, or use optim=adamw_fp8"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_package_is_one_message_before_anything_is_built(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda package: None)
    cfg = registry.config_class(name)()
    (problem,) = cfg.problems()
    assert problem == f"optim={name}: needs the package {cfg.package}; pip install {cfg.package}"
    with pytest.raises(ValueError, match=f"needs the package {cfg.package}: pip install {cfg.package}"):
        registry.build(cfg, parameters())


@pytest.mark.parametrize("name", NAMES)
def test_fp64_weights_are_refused_since_the_packages_compute_in_fp32(name):
    with pytest.raises(ValueError, match=r"w is torch\.float64, and \w+ computes in fp32\. Use precision=fp32"):
        registry.build(registry.config_class(name)(), parameters(torch.float64))


def sharded_parameter():
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    return nn.Parameter(distribute_tensor(torch.ones(CODED), init_device_mesh("cpu", (1,)), [Shard(0)]))


@pytest.mark.parametrize("name", ["bnb_adamw_8bit", "torchao_adamw_8bit"])
def test_a_shard_is_refused_since_blocks_go_over_the_whole_parameter(name):
    try:
        with pytest.raises(ValueError, match=r"w is sharded .* lays its blocks over a whole parameter\. Use parallel"):
            registry.build(registry.config_class(name)(), [("w", sharded_parameter())])
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", [name for name in NAMES if "paged" in name])
def test_paging_on_a_cpu_is_refused_with_what_does_the_same_there(name):
    plain = "adamw" if name == "bnb_paged_adamw" else name.replace("paged_", "")
    with pytest.raises(UserError, match=f"optim={name}: pages between .*; on a CPU use optim={plain}$"):
        check_hardware(load([f"optim={name}", "run.device=cpu"]))


@pytest.mark.parametrize("kind", ["Bitsandbytes", "Torchao"])
def test_an_unknown_class_of_a_package_is_refused(kind):
    from optim.ao import Torchao
    from optim.bnb import Bitsandbytes

    with pytest.raises(ValueError, match="kind='Adam9': must be one of .*AdamW8bit"):
        {"Bitsandbytes": Bitsandbytes, "Torchao": Torchao}[kind]([nn.Parameter(torch.ones(2))], kind="Adam9")


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith("torchao")])
def test_the_compiled_step_of_torchao_is_the_eager_one(name):
    code = f"""
import torch
from optim import registry
ends = []
for compiled in (True, False):
    torch.manual_seed(0)
    p = torch.nn.Parameter(torch.randn(64, 96))
    optimizer = registry.build(registry.config_class({name!r})(compile=compiled), [("w", p)])
    for _ in range(3):
        p.grad = p.detach().sin()
        optimizer.step()
    ends.append(p.detach())
torch.testing.assert_close(*ends, rtol=0, atol=1e-5)
"""
    environment = {key: value for key, value in os.environ.items() if key != "TORCHDYNAMO_DISABLE"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_predicted_step_may_be_the_first_to_use_torchao_and_leaves_nothing_fake_behind():
    from torch._subclasses.fake_tensor import FakeTensorMode

    from optim import ao

    subclass = pytest.importorskip("torchao.optim.subclass_8bit")
    for cached in (ao.worker, subclass.get_qmap_signed, subclass.get_qmap_unsigned):
        cached.cache_clear()
    for mode in (FakeTensorMode(), torch.inference_mode(False)):
        with mode:
            p = nn.Parameter(torch.ones(CODED))
            p.grad = torch.ones_like(p)
            registry.build(registry.config_class("torchao_adamw_8bit")(), [("w", p)]).step()
    assert not torch.equal(p, torch.ones(CODED))
