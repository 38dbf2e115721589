"""Step by step against torchao 0.18 and bitsandbytes 0.50.2: weights to 1e-5, codes equal or one apart.

Rows of 256 and 512 values are whole blocks, so that both packages' blocks, counted through the whole tensor, are ours.
"""

import pytest
import torch
from torch import nn

from optim import AdamW

SQUARE, WIDE, TALL, RAGGED_ROWS = (256, 256), (16, 512), (512, 256), (37, 256)
SHAPES = [SQUARE, WIDE, TALL, RAGGED_ROWS]
STRADDLING = (130, 258)
"""Its rows end inside a block of bitsandbytes."""


def pair(build_theirs, states, shapes):
    """Ours and theirs after 20 steps of the same gradients, whose rows differ in size."""
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    ours, theirs = ([nn.Parameter(w.clone()) for w in start] for _ in range(2))
    first = AdamW(ours, lr=1e-2, weight_decay=0.1, states=states)
    second = build_theirs(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(20):
        for i, (p, q) in enumerate(zip(ours, theirs, strict=True)):
            generator = torch.Generator().manual_seed(1000 * step + i)
            p.grad = torch.randn(p.shape, generator=generator) * torch.rand(len(p), 1, generator=generator)
            q.grad = p.grad.clone()
        first.step()
        second.step()
    return [(p, q, first.state[p], second.state[q]) for p, q in zip(ours, theirs, strict=True)]


def codes_of(codes, bits):
    flat = codes.flatten().int()
    return flat if bits == 8 else torch.stack([flat >> 4, flat & 15], dim=-1).flatten()


def assert_close(p, q, bound):
    assert (p - q).norm() <= bound * q.norm(), f"{tuple(p.shape)}: {((p - q).norm() / q.norm()).item():.2g}"


@pytest.mark.parametrize(("kind", "states", "bits"), [("AdamW8bit", "int8", 8), ("AdamW4bit", "int4", 4)])
def test_20_steps_of_torchao(kind, states, bits):
    """4 bits: where one of 65,536 codes falls to the other side of a middle, a weight moves by 1e-3 of its size."""
    optim = pytest.importorskip("torchao").optim
    for p, q, state, saved in pair(getattr(optim, kind), states, SHAPES):
        assert_close(p, q, 1e-5 if bits == 8 else 2e-5)
        for key in ("exp_avg", "exp_avg_sq"):
            apart = (codes_of(state[key], bits) - codes_of(saved[key].codes, bits)).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3
            scales = saved[key].scale.view(state[key + "_scale"].shape)
            torch.testing.assert_close(state[key + "_scale"], scales, rtol=1e-5, atol=0)


def test_20_steps_of_bitsandbytes_with_its_codes_exact(monkeypatch):
    """Its CPU kernel looks codes up in 2**16 equal cells, which misses the nearest by up to 7 below 1e-4 of a block's
    largest value (next test). With the nearest code in its place the rest of its step is ours."""
    optim = pytest.importorskip("bitsandbytes").optim
    cpu = pytest.importorskip("bitsandbytes.backends.cpu.ops")

    def nearest(values, table, absmax, codes, block):
        largest = values.view(-1, block).abs().amax(1)
        unit = values.view(-1, block) / largest[:, None]
        absmax.copy_(largest)
        codes.copy_(torch.bucketize(unit, (table[1:] + table[:-1]) / 2).view(codes.shape))

    monkeypatch.setattr(cpu, "_quant_blockwise_fp32_direct", nearest)
    for p, q, state, saved in pair(optim.AdamW8bit, "int8", SHAPES):
        assert_close(p, q, 1e-5)
        for key, number in (("exp_avg", 1), ("exp_avg_sq", 2)):
            apart = (state[key].int() - saved[f"state{number}"].int()).abs()
            assert apart.max() <= 1 and (apart > 0).float().mean() <= 1e-3


def test_20_steps_of_bitsandbytes_as_it_is_differ_by_its_inexact_codes_alone():
    """3 % of the codes of m and 5 % of those of v are not the nearest."""
    optim = pytest.importorskip("bitsandbytes").optim
    for p, q, state, saved in pair(optim.AdamW8bit, "int8", SHAPES):
        assert_close(p, q, 3e-4)
        for key, number, bound in (("exp_avg", 1, 0.03), ("exp_avg_sq", 2, 0.05)):
            apart = (state[key].int() - saved[f"state{number}"].int()).abs()
            assert (apart > 0).float().mean() <= bound


@pytest.mark.parametrize("package", ["bitsandbytes", "torchao"])
def test_rows_that_end_inside_a_block_cost_no_more_than_the_codes_themselves(package):
    """Blocks lie otherwise there (or torchao keeps fp32): both are as far from fp32 as from each other."""
    optim = pytest.importorskip(package).optim
    ((p, q, *_),) = pair(optim.AdamW8bit, "int8", [STRADDLING])
    ((p, exact, *_),) = pair(lambda params, **options: torch.optim.AdamW(params, **options), "int8", [STRADDLING])
    own = float(((p - exact).norm() / exact.norm()).detach())
    assert_close(p, q, 1.5 * own)
    assert own <= 2e-3


def test_fp8_is_coats_and_closer_to_fp32_than_torchaos_plain_e4m3():
    optim = pytest.importorskip("torchao").optim
    for (p, q, *_), (_, exact, *_) in zip(
        pair(optim.AdamWFp8, "fp8", SHAPES),
        pair(lambda params, **options: torch.optim.AdamW(params, **options), "fp8", SHAPES),
        strict=True,
    ):
        ours, theirs = (float(((x - exact).norm() / exact.norm()).detach()) for x in (p, q))
        assert ours <= 0.7 * theirs and theirs <= 3e-3
