"""Runs that another package began go on here."""

import io

import pytest
import torch
from torch import nn

from optim import AdamW, GaLoreAdamW
from optim.interop import adopt

ALIKE, ROWS, STRADDLING, SMALL = (32, 256), (20, 512), (70, 129), (40,)
"""The first two have rows of whole blocks; those of the third do not; the last is fp32 for all."""
SHAPES = [ALIKE, ROWS, STRADDLING, SMALL]


def parameters():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]


def train(optimizer, params, steps):
    for step in steps:
        for i, p in enumerate(params):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * step + i))
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def begun(make, steps=6):
    params = parameters()
    optimizer = make(params)
    train(optimizer, params, range(steps))
    return params, optimizer


def ours_for(params, states):
    return AdamW([(f"w{i}", p) for i, p in enumerate(params)], lr=1e-2, weight_decay=0.0, states=states)


def bitsandbytes(params):
    optim = pytest.importorskip("bitsandbytes").optim
    return optim.AdamW8bit(params, lr=1e-2, weight_decay=0.0)


def torchao(kind):
    return lambda params: getattr(pytest.importorskip("torchao").optim, kind)(params, lr=1e-2, weight_decay=0.0)


CODED = [
    pytest.param(bitsandbytes, "int8", id="bitsandbytes 8 bits"),
    pytest.param(torchao("AdamW8bit"), "int8", id="torchao 8 bits"),
    pytest.param(torchao("AdamW4bit"), "int4", id="torchao 4 bits"),
]


@pytest.mark.parametrize(("make", "states"), CODED)
def test_codes_and_scales_are_copied_as_they_are_where_rows_are_whole_blocks(make, states):
    params, theirs = begun(make)
    ours = ours_for(params, states)
    rounded = adopt(ours, through_a_file(theirs.state_dict()))
    assert set(rounded) <= {"w2"}
    for p in params[:2]:
        state, saved = ours.state[p], theirs.state[p]
        for key, other, scale in (("exp_avg", "state1", "absmax1"), ("exp_avg_sq", "state2", "absmax2")):
            codes = saved[other] if other in saved else saved[key].codes
            scales = saved[scale] if scale in saved else saved[key].scale
            assert torch.equal(state[key].flatten(), codes.flatten())
            assert torch.equal(state[key + "_scale"].flatten(), scales.flatten())


@pytest.mark.parametrize(("make", "states"), [*CODED, pytest.param(torchao("AdamWFp8"), "fp32", id="torchao FP8")])
def test_the_run_goes_on_as_theirs_would_have(make, states):
    """Weights move by 1e-2 a step: the next three differ by the next roundings of codes alone."""
    params, theirs = begun(make)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = ours_for(copies, states)
    adopt(ours, theirs.state_dict())
    train(ours, copies, range(6, 7))
    train(theirs, params, range(6, 7))
    for p, q in zip(params, copies, strict=True):
        bound = 1e-5 if p.shape != STRADDLING else 1e-3  # re-encoded there: once more to the nearest code
        assert (p - q).norm() <= bound * q.norm(), tuple(p.shape)


@pytest.mark.parametrize(("make", "states"), [*CODED, pytest.param(torchao("AdamWFp8"), "fp8", id="torchao FP8")])
def test_what_was_encoded_again_is_told(make, states):
    """w2: blocks lie otherwise, or are plain with torchao and coded with us."""
    params, theirs = begun(make)
    found = adopt(ours_for(params, states), theirs.state_dict())
    assert found == {"int8": ["w2"], "int4": ["w2"], "fp8": ["w0", "w1", "w2"]}[states]


def test_torchs_own_adamw_continues_bit_for_bit():
    params, theirs = begun(lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0, fused=True))
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    ours = ours_for(copies, "fp32")
    assert adopt(ours, through_a_file(theirs.state_dict())) == []
    train(ours, copies, range(6, 9))
    train(theirs, params, range(6, 9))
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_fp32_states_take_the_values_that_their_codes_stand_for():
    params, theirs = begun(bitsandbytes)
    ours = ours_for(params, "fp32")
    assert adopt(ours, theirs.state_dict()) == []
    for p in params[:3]:
        saved = theirs.state[p]
        scale = saved["absmax1"].repeat_interleave(256)[: p.numel()].view(p.shape)
        assert torch.equal(ours.state[p]["exp_avg"], saved["qmap1"][saved["state1"].int()] * scale)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        (lambda p: AdamW(p[:2]), lambda p: torch.optim.AdamW(p), "saved optimizer has 4 parameters, this one 2"),
        (lambda p: AdamW(p), lambda p: torch.optim.SGD(p, momentum=0.9), "is not that of an AdamW: it holds momentum"),
        (lambda p: GaLoreAdamW([{"params": p, "rank": 4}]), lambda p: torch.optim.AdamW(p), "adopt into AdamW"),
        (lambda p: AdamW([*p[1:], p[0]]), lambda p: torch.optim.AdamW(p), "has 8192 values, the parameter 10240"),
    ],
    ids=["count", "SGD", "GaLore", "order"],
)
def test_what_does_not_fit_is_refused_and_nothing_changes(ours, theirs, message):
    params, theirs = begun(theirs)
    optimizer = ours(params)
    with pytest.raises(ValueError, match=message):
        adopt(optimizer, theirs.state_dict())
    assert all(state["step"] == 0 for state in optimizer.state.values())
