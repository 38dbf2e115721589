"""Kernels = torch's operators. On a machine without CUDA they run in Triton's interpreter, if Triton is installed."""

import importlib.util
import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from optim import AdamW, APOLLOMini, GaLoreAdamW, fused
from optim.apollo import APOLLO
from optim.codec import CODECS, codec_for
from optim.fused import Draws, Rates
from optim.projection import add_back_
from optim.rounding import Stochastic
from optim.rules import AdamRule, Stepped
from parallel.dtensor import Layout

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
needs_triton = pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="needs Triton: pip install triton")
needs_cuda = [pytest.mark.gpu, pytest.mark.skipif(not CUDA, reason="needs a CUDA device")]
SHAPES = [(20, 300), (9, 515)]
"""Rows that end inside a block, or a byte with two codes, and more of them than a program takes."""


def interpreted(test):
    """Of both suites: on CUDA for real, else interpreted."""
    return pytest.mark.gpu(needs_triton(test)) if CUDA else needs_triton(test)


def gradient(shape, step, dtype=torch.float32):
    generator = torch.Generator().manual_seed(step)
    return (torch.randn(shape, generator=generator) * torch.linspace(0.01, 2, shape[-1])).to(DEVICE, dtype)


def held(state, bits):
    """Tensors of a state; packed codes one by one."""
    return {
        key: torch.stack([value >> 4, value & 15]) if bits == 4 and value.dtype is torch.uint8 else value
        for key, value in state.items()
        if isinstance(value, torch.Tensor)
    }


def agree(expected, found, bits):
    """Codes are equal or one apart, and nearly all equal; numbers differ in their last digits."""
    for key, want in held(expected, bits).items():
        have = held(found, bits)[key]
        if want.dtype is torch.uint8:
            apart = (want.int() - have.int()).abs()
            if key + "_power" in expected:  # codes of another power are others
                same = expected[key + "_power"] == found[key + "_power"]
                assert float(same.float().mean()) > 0.9, key
                apart = apart * same.repeat_interleave(128, 1)[:, : apart.shape[1]]
            assert int(apart.max()) <= 1 and float((apart > 0).float().mean()) < 0.01, key
        elif want.dtype is torch.bfloat16:
            assert float((want.float() - have.float()).abs().max()) <= 2**-7 * float(want.float().abs().max()), key
        elif key.endswith("_power"):  # multiples of 1/16, which a last digit may carry over
            assert float((want - have).abs().max()) <= 1 / 16, key
        else:
            torch.testing.assert_close(have, want, rtol=1e-6, atol=1e-7 * float(want.abs().max()))


@interpreted
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("states", CODECS)
def test_a_step_of_coded_states_is_that_of_the_operators(states, shape):
    group = {"states": states, "betas": (0.9, 0.99), "eps": 1e-8}
    rule, codec = AdamRule(), codec_for(states, shape)
    assert codec is CODECS[states]
    weight = gradient(shape, 100)
    other = weight.clone()
    state, twin = (rule.new_state(weight, Layout(shape), group) for _ in range(2))
    cut_off = states == "bf16" and not CUDA  # the interpreter does not round to bf16
    for step in range(1, 2 if cut_off else 4):
        with fused.eager():
            rule.step_([Stepped(weight, gradient(shape, step), state)], group, lr=0.01, weight_decay=0.1)
        rates = Rates.of(step, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
        fused.adamw_(other, gradient(shape, step), twin, codec, rates)
        agree(state, twin, getattr(codec, "bits", 8))
        assert float((weight - other).norm()) <= 1e-6 * float(weight.norm())
        for key, value in held(state, 8).items():
            twin[key].copy_(value)


@interpreted
@pytest.mark.parametrize("authors", [False, True])
@pytest.mark.parametrize("raw", [False, True])
def test_a_step_from_zeros_that_are_not_there_is_one_from_zeros(authors, raw):
    shape = (20, 300)
    group = {"states": "int8", "betas": (0.9, 0.99), "eps": 1e-3, "compat": "authors" if authors else "torch"}
    rule, codec = AdamRule(), codec_for("int8", shape)
    nothing, missing = torch.zeros(shape, device=DEVICE), torch.full(shape, torch.nan, device=DEVICE)
    state, twin = (rule.new_state(nothing, Layout(shape), group) for _ in range(2))
    with fused.eager():
        rule.step_([Stepped(nothing, gradient(shape, 1), state)], group, lr=0.01, weight_decay=0.0, raw=raw)
    rates = Rates.of(1, lr=0.01, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.0, authors=authors, raw=raw)
    fused.adamw_(missing, gradient(shape, 1), twin, codec, rates, fresh=True)
    torch.testing.assert_close(missing, nothing, rtol=2e-6, atol=0.0)
    agree(state, twin, 8)


@interpreted
@pytest.mark.parametrize("rows", [slice(None), slice(3, 11)], ids=str)
def test_stochastic_rounding_draws_the_same_bits(rows):
    weight = gradient((20, 300), 1, torch.bfloat16)
    wide = gradient((20, 300), 2)[rows]
    expected, found = weight.clone(), weight.clone()
    Stochastic("w", 3, expected, row=2)(expected[rows], wide)
    fused.round_bf16_(found[rows], wide, Draws("w", 3, found, row=2))
    assert torch.equal(expected, found)


@interpreted
@pytest.mark.parametrize("states", ["fp32", "int8"])
def test_a_stochastic_step_of_bf16_weights_is_that_of_the_operators(states):
    shape = (20, 300)
    group = {"states": states, "betas": (0.9, 0.99), "eps": 1e-8}
    rule, codec = AdamRule(), codec_for(states, shape)
    weight = gradient(shape, 100, torch.bfloat16)
    other = weight.clone()
    state, twin = (rule.new_state(weight, Layout(shape), group) for _ in range(2))
    grad = gradient(shape, 1, torch.bfloat16)
    with fused.eager():
        rule.step_([Stepped(weight, grad, state, Draws("w", 0, weight))], group, lr=0.01, weight_decay=0.1)
    rates = Rates.of(1, lr=0.01, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    fused.adamw_(other, grad, twin, codec, rates, store=Draws("w", 0, other))
    # A last bit of the fp32 step turns one draw in 2**16.
    assert float((weight != other).float().mean()) < 1e-3
    agree(state, twin, 8)


@interpreted
@pytest.mark.parametrize("size", [(20, 1), (1, 300), (1, 1)], ids=str)
def test_a_scaled_gradient_is_added_by_rows_columns_or_whole(size):
    weight, grad, factor = gradient((20, 300), 1), gradient((20, 300), 2), gradient(size, 3)
    expected = 0.9 * weight + grad * factor
    fused.scaled_add_(weight, grad, factor, beta=0.9)
    torch.testing.assert_close(weight, expected, rtol=1e-6, atol=1e-7)


@interpreted
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("products", ["fp32", "bf16"])
def test_a_step_comes_back_into_bf16_weights_by_pieces_as_by_the_operators(side, products, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 7 * 300)
    monkeypatch.setattr("optim.base.CUDA_CHUNK", 7 * 300)
    expected = gradient((20, 300), 1, torch.bfloat16)
    found = expected.clone()
    low = gradient((4, 300) if side == "left" else (20, 4), 2)
    basis = gradient((4, 20 if side == "left" else 300), 3)
    for weight, by_kernel in ((expected, False), (found, True)):
        monkeypatch.setattr(fused, "usable", lambda *_, by_kernel=by_kernel: by_kernel)
        store = Draws("w", 0, weight)
        add_back_(weight, low, basis, side, beta=0.9, alpha=-0.5, store=store, products=products)
    # A last bit of the fp32 step turns one draw in 2**16.
    assert float((expected != found).float().mean()) < 2e-3 and not torch.equal(
        found, gradient((20, 300), 1, found.dtype)
    )


def test_kernels_are_left_to_cuda_and_to_tensors_that_they_can_walk():
    assert not fused.usable(torch.zeros(4, 4))
    assert not fused.usable(torch.zeros(4, 4, device="meta"))
    assert fused.writes(torch.Tensor.copy_) and fused.writes(Draws("w", 0, torch.zeros(1)))
    assert not fused.writes(Draws("w", 0, torch.zeros(1), pitch=4)) and not fused.writes(lambda target, wide: None)


@pytest.mark.parametrize(
    "build",
    [
        *(lambda params, states=states: AdamW(params, lr=1e-2, states=states) for states in CODECS),
        lambda params: GaLoreAdamW([{"params": params, "rank": 32}], lr=1e-2, weight_decay=0.1, products="bf16"),
        lambda params: GaLoreAdamW([{"params": params, "rank": 128}], lr=1e-2, states="int8"),
        lambda params: APOLLO([{"params": params, "rank": 64}], lr=1e-2, weight_decay=0.1),
        lambda params: APOLLOMini([{"params": params, "rank": 1}], lr=1e-2),
    ],
    ids=[*CODECS, "galore", "galore_8bit", "apollo", "apollo_mini"],
)
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, "nearest"), (torch.bfloat16, "nearest"), (torch.bfloat16, "stochastic")],
    ids=["fp32", "bf16", "bf16_sr"],
)
class TestOnCuda:
    pytestmark = needs_cuda

    def test_optimizers_step_with_kernels_as_without(self, build, dtype, rounding):
        """12 steps through a first basis; bf16 weights may differ by a digit where an fp32 step does in its last."""
        trained = []
        for kernels in (True, False):
            params = [torch.nn.Parameter(gradient(s, i, dtype)) for i, s in enumerate([(512, 256), (200, 512)])]
            optimizer = build(params)
            for group in optimizer.param_groups:
                group["rounding"] = rounding
            for step in range(12):
                for i, p in enumerate(params):
                    p.grad = gradient(p.shape, 100 + 10 * step + i, dtype)
                if kernels:
                    optimizer.step()
                else:
                    with fused.eager():
                        optimizer.step()
            trained.append([p.detach().double() for p in params])
        tolerance = {torch.float32: 1e-4, torch.bfloat16: 2**-8}[dtype]
        for with_them, without in zip(*trained, strict=True):
            assert float((with_them - without).norm()) <= tolerance * float(without.norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
class TestWaiting:
    pytestmark = needs_cuda

    @pytest.mark.parametrize(
        "build",
        [
            lambda params: AdamW(params, states="int8", rounding="stochastic"),
            lambda params: GaLoreAdamW([{"params": params, "rank": 32}], products="bf16", rounding="stochastic"),
            lambda params: APOLLO([{"params": params, "rank": 32}], rounding="stochastic"),
        ],
        ids=["adamw_8bit", "galore", "apollo"],
    )
    def test_a_step_without_a_refresh_waits_for_nothing(self, build, dtype):
        params = [torch.nn.Parameter(gradient(s, 0, dtype)) for s in [(512, 256), (256, 512), (40,)]]
        optimizer = build(params)
        optimizer.check_finite = False
        for p in params:
            p.grad = gradient(p.shape, 1, dtype)
        for _ in range(2):
            optimizer.step()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            optimizer.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
