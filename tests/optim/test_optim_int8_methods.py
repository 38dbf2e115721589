"""Optimizers on int8 weights."""

import copy
import io

import numpy as np
import pytest
import torch
from torch import nn

import optim.int8_grid
from optim import APOLLO, AdamW, GaLoreAdamW, registry
from optim.codebook import BOOKS
from optim.config_lowrank import ProjectedConfig, ProjType, Refresh, TargetedConfig
from optim.int8 import Int8Weight
from optim.int8_model import dequantize_weights, plain_parts, quantize_weights
from tests.reference.quantized import QGaLore

NAMED = ["qgalore", "qapollo", "qapollo_mini"]


def config(name, **options):
    cls = registry.config_class(name)
    if issubclass(cls, TargetedConfig):
        options = {"rank": 1 if "mini" in name else 48, "targets": "mlp", **options}
    if issubclass(cls, ProjectedConfig):
        options = {"update_proj_gap": 3, **options}
    return cls(name=name, **{"lr": 1e-3, "weight_decay": 0.1, **options})


def model(group=32, seed=0):
    torch.manual_seed(seed)
    net = nn.ModuleDict({"embed": nn.Embedding(50, 96), "mlp": nn.Linear(96, 64), "norm": nn.LayerNorm(64)}).bfloat16()
    quantize_weights(net, "mlp", group)
    return net


def train(net, optimizer, steps):
    """Gradients are a function of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def state_of(net):
    return [part for p in net.parameters() for part in (plain_parts(p.detach()) or {"": p.detach()}).values()]


def assert_same(one, other):
    for a, b in zip(state_of(one), state_of(other), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", registry.names())
def test_every_method_steps_int8_weights_as_fp32_ones_on_average(name):
    """From equal weights, with equal gradients: apart by a random walk of roundings whose mean is zero."""
    start = torch.randn(64, 96, generator=torch.Generator().manual_seed(1)) * 0.02
    coded = nn.Parameter(Int8Weight.quantize(start, 32, torch.bfloat16))
    plain = nn.Parameter(coded.dequantize(torch.float32))
    steps = 4
    for p in (coded, plain):
        optimizer = registry.build(config(name, lr=1e-4), [("mlp.weight", p)], rounding="stochastic")
        for step in range(steps):
            grad = torch.randn(64, 96, generator=torch.Generator().manual_seed(step)).bfloat16()
            p.grad = grad.to(p.dtype)
            optimizer.step()
    lsb = coded.scale.repeat_interleave(32, 1)
    walk = ((coded.dequantize(torch.float32) - plain.detach()) / lsb).double()
    moved = float(((plain.detach() - start) / lsb).abs().mean())
    assert moved > 0.05, "nothing to see"
    assert float(walk.abs().max()) < steps
    assert abs(float(walk.mean())) < 5 * (steps / 6 / walk.numel()) ** 0.5


@pytest.mark.parametrize("name", NAMED)
def test_training_goes_on_bit_for_bit_after_a_save(name):
    """Before and after a refresh, and with the draws of the rounding."""
    for stop in (2, 4):
        straight, begun, resumed = model(), model(), model(seed=1)
        optimizers = [registry.build(config(name), n.named_parameters(), rounding="stochastic") for n in
                      (straight, begun, resumed)]  # fmt: skip
        train(straight, optimizers[0], range(8))
        train(begun, optimizers[1], range(stop))
        file = io.BytesIO()
        torch.save({"model": begun.state_dict(), "optimizer": optimizers[1].state_dict()}, file)
        file.seek(0)
        saved = torch.load(file, weights_only=True)
        resumed.load_state_dict(saved["model"])
        optimizers[2].load_state_dict(saved["optimizer"])
        torch.manual_seed(stop)
        train(resumed, optimizers[2], range(stop, 8))
        assert_same(straight, resumed)


@pytest.mark.parametrize("name", ["adamw", "qgalore", "qapollo", "fira", "adafactor", "cosmos"])
def test_weights_do_not_depend_on_the_chunks_they_are_stepped_in(name, monkeypatch):
    nets = []
    for rows in (None, 5):
        if rows:
            pieces = [slice(start, min(start + rows, 64)) for start in range(0, 64, rows)]
            whole = optim.int8_grid._chunks
            monkeypatch.setattr(
                optim.int8_grid, "_chunks", lambda codes, w=whole, p=pieces: iter(p) if len(codes) == 64 else w(codes)
            )
            monkeypatch.setattr("optim.rules.CODED_CHUNK", 7 * 96)
            monkeypatch.setattr("optim.rules.piece", lambda tensor: 7 * 96)
        net = model()
        train(net, registry.build(config(name), net.named_parameters(), rounding="stochastic"), range(3))
        nets.append(net)
    assert_same(*nets)


def test_a_learning_rate_of_zero_changes_no_bit():
    net = model(group=96)
    net["mlp"].weight.codes[:, 0], net["mlp"].weight.codes[:, 1] = 0, 255
    before = copy.deepcopy(net)
    train(net, registry.build(config("qgalore", lr=0.0), net.named_parameters(), rounding="stochastic"), range(4))
    assert_same(net, before)


def test_q_galore_follows_its_float64_reference_through_refreshes_and_a_doubled_gap():
    rows, columns, rank = 80, 128, 64
    generator = torch.Generator().manual_seed(0)
    leading = torch.randn(rank, columns, generator=generator)
    p = nn.Parameter(Int8Weight.quantize(torch.randn(rows, columns, generator=generator) * 0.02, 128, torch.bfloat16))
    options = {"rank": rank, "scale": 0.25, "lr": 2e-3, "betas": (0.9, 0.95), "eps": 1e-8}
    cfg = registry.config_class("qgalore")(
        **{**options, "betas": [0.9, 0.95]},
        update_proj_gap=2,
        targets="w",
        refresh=Refresh.svd,
        proj_type=ProjType.right,
    )
    books = tuple(np.array(BOOKS[8, signed]()) for signed in (True, False))
    theirs = QGaLore((rows, columns), books, gap=2, threshold=0.4, **options)
    optimizer = registry.build(cfg, [("w", p)], rounding="stochastic")
    state = optimizer.state[p]
    walks = []
    for step in range(20):
        grad = (torch.randn(rows, rank, generator=generator) @ leading).bfloat16()
        expected = theirs.stepped(p.dequantize(torch.float64).numpy(), grad.double().numpy())
        p.grad = grad
        optimizer.step()
        lsb = p.scale.double().repeat_interleave(128, 1).numpy()
        walk = (p.dequantize(torch.float64).numpy() - expected) / lsb
        assert np.abs(walk).max() < 1.02, step
        assert state["refreshes"] == theirs.refreshes and state["gap"] == theirs.gap, step
        walks.append(walk)
    assert theirs.gap > 2, "the gap has doubled"
    walk = np.stack(walks)
    assert abs(walk.mean()) < 4 / np.sqrt(6 * walk.size)


def test_quantizing_a_model_takes_what_the_rule_finds_and_keeps_ties():
    net = nn.ModuleDict({"mlp": nn.Linear(96, 64), "attn": nn.Linear(96, 64), "head": nn.Linear(96, 64)})
    net["attn"].weight = net["mlp"].weight
    plain = net["mlp"].weight.detach().clone()
    assert quantize_weights(net, r"(mlp|attn)\.weight$", 32) == ["mlp.weight"]
    assert net["attn"].weight is net["mlp"].weight and isinstance(net["mlp"].weight, Int8Weight)
    assert type(net["head"].weight) is nn.Parameter and type(net["mlp"].bias) is nn.Parameter
    dequantize_weights(net)
    assert net["attn"].weight is net["mlp"].weight and type(net["mlp"].weight) is nn.Parameter
    torch.testing.assert_close(net["mlp"].weight.detach(), plain, atol=1e-3, rtol=0)


def test_a_rule_that_finds_no_matrix_is_refused_with_names():
    net = nn.ModuleDict({"mlp": nn.Linear(8, 8), "norm": nn.LayerNorm(8)})
    with pytest.raises(ValueError, match=r"precision\.int8_targets='attn': finds none .* mlp\.weight"):
        quantize_weights(net, "attn", 32)


def test_a_stochastic_step_is_the_same_one_parameter_at_a_time():
    """As in a backward hook."""
    runs = []
    for together in (True, False):
        net = model()
        optimizer = AdamW(net.named_parameters(), lr=1e-3, rounding="stochastic")
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            grads = {p: torch.randn(p.shape, generator=generator).to(p.dtype) for p in net.parameters()}
            for batch in [list(grads)] if together else [[p] for p in grads]:
                for p in batch:
                    p.grad = grads[p]
                optimizer.step()
                for p in batch:
                    p.grad = None
        runs.append(net)
    assert_same(*runs)


@pytest.mark.parametrize("build", [GaLoreAdamW, APOLLO])
def test_authors_group_keys_work_on_int8_weights(build):
    net = model()
    groups = [{"params": [net["mlp"].weight], "rank": 4, "update_proj_gap": 2, "scale": 1.0, "proj_type": "std"}]
    before = net["mlp"].weight.detach().clone()
    train(net, build(groups, lr=1e-2, rounding="stochastic"), range(3))
    assert not torch.equal(before.codes, net["mlp"].weight.codes)
