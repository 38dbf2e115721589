import math

import numpy as np
import pytest
import torch

from optim import AdamW
from optim.affine import Affine4
from optim.codebook import BOOKS, dynamic_values, make_book
from optim.codec import CODECS, PLAIN, Blocks, Dynamic, codec_for, expansion, pack, unpack
from tests.reference import codecs as reference

CODED = ["int8", "int4", "fp8"]
ALL = slice(None)


def numbers(*shape, seed=0, spread=4):
    """Of both signs and of magnitudes over some decades, as moments are."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x * torch.rand(shape, generator=generator, dtype=torch.float64) ** spread


def through(codec, values, signed=True, dtype=torch.float64):
    state = codec.new("m", torch.empty(values.shape), values.shape, torch.float32)
    codec.write(state, "m", ALL, values, signed=signed)
    return codec.read(state, "m", ALL, dtype, signed=signed, width=values.shape[1])


def blocks_of(row, size):
    return [row[i : i + size] for i in range(0, len(row), size)]


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [8, 4])
def test_codes_are_those_of_the_nearest_value(bits, signed):
    book = make_book(BOOKS[bits, signed](), torch.device("cpu"))
    x = torch.cat([numbers(20000).float().clamp(-1, 1), torch.tensor([0.0, 1.0, 1.5, 1e-30]), book.values])
    x = x if signed else x.abs()
    distance = (x[:, None].double() - book.values.double()).abs()
    found = distance.gather(1, book.encode(x).long()[:, None])[:, 0]
    assert torch.equal(found, distance.amin(1))


def test_the_dynamic_map_has_the_values_of_the_spec():
    signed, unsigned = (dynamic_values(signed=s, exponents=7, bits=8) for s in (True, False))
    assert len(signed) == len(unsigned) == 256 and signed.count(0.0) == unsigned.count(0.0) == 1
    assert signed[0] == pytest.approx(-0.993, abs=1e-3) and signed[-1] == unsigned[-1] == 1.0
    assert min(v for v in signed if v > 0) == pytest.approx(5.5e-7, rel=1e-6)
    assert unsigned[1] == pytest.approx(3.25e-7, rel=1e-6)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("shape", [(5, 256), (3, 700), (2, 100)], ids=str)
@pytest.mark.parametrize("name", CODED)
def test_every_block_round_trips_as_in_the_float64_reference(name, shape, signed):
    codec = CODECS[name]
    x = numbers(*shape) if signed else numbers(*shape).square()
    expected = []
    for row in x.numpy():
        for block in blocks_of(row, codec.block):
            if name == "fp8":
                expected.append(reference.coat(block))
            else:
                expected.append(reference.nearest(block, np.array(BOOKS[codec.bits, signed]())))
    found = through(codec, x, signed).numpy().ravel()
    expected = np.concatenate(expected)
    # A number half way between two values may go either way: fp32 decides here, fp64 there.
    same = np.isclose(found, expected, rtol=1e-4, atol=1e-30)
    assert same.mean() >= 0.999
    assert np.isclose(found, expected, rtol=0.6, atol=np.abs(x.numpy()).max() * 0.3).all()


def test_codes_equal_those_of_bitsandbytes_or_their_neighbours():
    functional = pytest.importorskip("bitsandbytes.functional", reason="needs bitsandbytes")
    for signed in (True, False):
        x = numbers(64, 1024).float()
        x = x if signed else x.square()
        table = functional.create_dynamic_map(signed)
        assert torch.equal(table, torch.tensor(BOOKS[8, signed]()))
        theirs, state = functional.quantize_blockwise(x, code=table, blocksize=256)
        ours = CODECS["int8"].new("m", x, x.shape, torch.float32)
        CODECS["int8"].write(ours, "m", ALL, x, signed=signed)
        assert torch.equal(ours["m_scale"].view(-1), state.absmax)
        theirs = theirs.view(x.shape)
        apart = (ours["m"].int() - theirs.int()).abs()
        unit = (x.view(-1, 256) / state.absmax[:, None]).view(x.shape).abs()
        # Their CPU kernel finds a code through a table of 2**16 equal cells, which errs below a few of those.
        large = unit > 1e-3
        assert apart[large].max() <= 1 and (apart[large] > 0).float().mean() < 0.05
        values = table[ours["m"].int()] - table[theirs.int()]
        assert values[~large].abs().max() <= 2**-12


@pytest.mark.parametrize("width", [300, 301])
@pytest.mark.parametrize("name", CODED)
def test_whole_rows_hold_the_same_bytes_alone_as_among_others(name, width):
    codec, x = CODECS[name], numbers(12, width)
    whole = codec.new("m", torch.empty(12, width), (12, width), torch.float32)
    codec.write(whole, "m", ALL, x, signed=True)
    for rows in (slice(0, 5), slice(5, 12)):
        alone = codec.new("m", torch.empty(1), x[rows].shape, torch.float32)
        codec.write(alone, "m", ALL, x[rows], signed=True)
        assert all(torch.equal(whole[key][rows], value) for key, value in alone.items())
        part = codec.read(whole, "m", rows, torch.float32, signed=True, width=width)
        assert torch.equal(part, codec.read(alone, "m", ALL, torch.float32, signed=True, width=width))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("name", CODED)
def test_zeros_stay_zero_and_signs_never_turn(name, signed):
    x = numbers(8, 512)
    x[:, ::3] = 0
    x[2] = 0
    found = through(CODECS[name], x if signed else x.square(), signed)
    assert torch.isfinite(found).all() and (found[2] == 0).all()
    assert (found * (x if signed else x.square()) >= 0).all()
    if (name, signed) != ("int4", False):  # whose map has no zero: its root divides
        assert (found[:, ::3] == 0).all()


@pytest.mark.parametrize("name", CODED)
def test_a_fresh_state_is_zero(name):
    state = CODECS[name].new("m", torch.empty(4, 512), (4, 512), torch.float32)
    assert (CODECS[name].read(state, "m", ALL, torch.float32, signed=True, width=512) == 0).all()


def test_expansion_errs_by_a_sixteenth_over_k_at_the_top_of_the_range():
    x = torch.rand(64, 128, dtype=torch.float64) * 0.5 + 0.5
    found = through(CODECS["fp8"], x, signed=False)
    k = expansion(x.amax(1), x.amin(1))[:, None]
    normal = (x / x.amax(1, keepdim=True)) ** k * 448 >= 2**-6  # below, E4M3 has fewer digits
    error = (found - x).abs() / x
    assert normal.float().mean() > 0.5
    assert (error <= 1.04 * 2**-4 / k + 1e-6)[normal].all()  # (1 - 2^-4)^(1/k) to second order
    assert torch.equal(k * 16, (k * 16).round())


@pytest.mark.parametrize("value", [0.0, 1.0, -3e-20, 1e30, 2.0**-149])
def test_expansion_of_constant_and_single_valued_groups_is_finite_and_exact(value):
    constant = torch.full((1, 128), value, dtype=torch.float32)
    single = torch.zeros(1, 128)
    single[0, 5] = value
    for x in (constant, single):
        found = through(CODECS["fp8"], x, dtype=torch.float32)
        torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-37)


def test_expansion_halves_the_error_of_adams_update():
    """Gaussian m, chi-square v of 8 degrees, as averages of squares are."""
    generator = torch.Generator().manual_seed(0)
    m = torch.randn(512, 1024, generator=generator)
    v = torch.randn(8, 512, 1024, generator=generator).square().mean(0)

    def plain(x):
        groups = x.view(512, -1, 128)
        scale = groups.abs().amax(-1, keepdim=True) / 448
        return ((groups / scale).to(torch.float8_e4m3fn).float() * scale).view_as(x)

    def error(m2, v2):
        return (m / v.sqrt() - m2 / v2.sqrt()).square().mean()

    codec = CODECS["fp8"]
    expanded = error(through(codec, m, True, torch.float32), through(codec, v, False, torch.float32))
    assert expanded < 0.5 * error(plain(m), plain(v))


@pytest.mark.parametrize("width", [1, 6, 7, 129])
def test_packed_codes_come_back_exactly(width):
    codes = torch.randint(0, 16, (5, width), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    packed = pack(codes)
    assert packed.shape == (5, math.ceil(width / 2)) and torch.equal(unpack(packed)[:, :width], codes)


@pytest.mark.parametrize("width", [256, 300, 33])
def test_affine_bases_err_by_half_a_level_even_where_all_have_one_sign(width):
    x = torch.randn(6, width, generator=torch.Generator().manual_seed(0)) * 0.05
    x[0], x[1] = x[0].abs() + 1.0, -x[1].abs() - 1.0
    codec = Affine4(block=256)
    found = through(codec, x)
    for row, back in zip(x.double(), found, strict=True):
        for a, b in zip(blocks_of(row, 256), blocks_of(back, 256), strict=True):
            level = (max(float(a.max()), 0.0) - min(float(a.min()), 0.0)) / 15
            assert float((a - b).abs().max()) <= level * 1.02  # zero-point and scale are rounded too
    assert codec.nbytes(x.shape, torch.float32) == 6 * (math.ceil(width / 2) + 4 * math.ceil(width / 256))


@pytest.mark.parametrize(
    ("shape", "coded"),
    [
        ((64, 64), ["int8", "int4", "fp8"]),
        ((63, 64), []),
        ((8192,), []),
        ((), []),
        ((4096, 1), []),
        ((1024, 48), ["int4", "fp8"]),
        ((128, 97), ["int8", "int4", "fp8"]),
        ((64, 8, 8), ["int8", "int4", "fp8"]),
    ],
    ids=str,
)
def test_the_global_shape_decides_what_is_coded(shape, coded):
    assert {name for name in CODED if codec_for(name, shape) is not PLAIN} == set(coded)
    assert codec_for("bf16", shape) is CODECS["bf16"]


def test_blocks_that_are_no_power_of_two_are_refused():
    with pytest.raises(ValueError, match=r"block=200: must be a power of two"):
        Dynamic(bits=8, block=200)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("states", ["bf16", *CODED])
@pytest.mark.parametrize("shape", [(80, 96), (70, 10, 8), (64, 300), (64, 97), (70, 9, 9)], ids=str)
def test_a_coded_step_is_the_exact_one_from_decoded_moments(shape, states, dtype, monkeypatch):
    """Whatever the chunks: m and v are decoded, AdamW steps in at least fp32, then they are encoded."""
    monkeypatch.setattr("optim.rules.CODED_CHUNK", 1000)
    generator = torch.Generator().manual_seed(0)
    start = torch.randn(shape, generator=generator).to(dtype)
    ours = torch.nn.Parameter(start.clone())
    optimizer = AdamW([ours], lr=1e-2, states=states, weight_decay=0.1)
    wide = torch.float64 if dtype is torch.float64 else torch.float32
    moments = [torch.zeros(shape, dtype=wide) for _ in range(2)]
    codec = codec_for(states, shape)
    for step in range(3):
        exact = torch.nn.Parameter(ours.detach().to(wide))
        theirs = torch.optim.AdamW([exact], lr=1e-2, weight_decay=0.1, fused=True)
        theirs.state[exact] = {"step": torch.tensor(float(step)), "exp_avg": moments[0], "exp_avg_sq": moments[1]}
        ours.grad = torch.randn(shape, generator=generator).to(dtype)
        exact.grad = ours.grad.to(wide)
        optimizer.step()
        theirs.step()
        assert torch.equal(ours, exact.to(dtype))
        state = optimizer.state[ours]
        moments = [
            codec.read(state, key, ALL, wide, signed=signed, width=math.prod(shape[1:])).view(shape).clone()
            for key, signed in (("exp_avg", True), ("exp_avg_sq", False))
        ]
    if isinstance(codec, Blocks):
        assert state["exp_avg"].dtype is torch.uint8


@pytest.mark.parametrize("states", ["bf16", *CODED])
def test_transposed_weights_step_like_contiguous_ones_with_coded_states(states):
    straight = torch.nn.Parameter(torch.randn(80, 96, generator=torch.Generator().manual_seed(0)))
    turned = torch.nn.Parameter(straight.detach().clone().T.contiguous().T)
    first, second = AdamW([straight], states=states, lr=1e-2), AdamW([turned], states=states, lr=1e-2)
    for seed in range(3):
        straight.grad = torch.randn(80, 96, generator=torch.Generator().manual_seed(seed + 1))
        turned.grad = straight.grad.clone()
        first.step()
        second.step()
    assert torch.equal(straight, turned)


@pytest.mark.parametrize("states", CODED)
def test_a_coded_step_runs_on_fake_tensors_and_real_ones_afterwards(states):
    from torch._subclasses.fake_tensor import FakeTensorMode

    for mode in (FakeTensorMode(), torch.no_grad()):
        with mode:
            p = torch.nn.Parameter(torch.zeros(64, 128))
            optimizer = AdamW([p], states=states)
            p.grad = torch.ones(64, 128)
            optimizer.step()
    assert (p < 0).all()


@pytest.mark.parametrize(("states", "worst"), [("bf16", 0.01), ("int8", 0.03), ("fp8", 0.03), ("int4", 1.0)])
def test_coded_states_descend_like_exact_ones(states, worst):
    """A linear regression of 64 x 128 weights, 600 steps: the loss left over is close to that of fp32 states."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(256, 128, generator=generator)
    y = x @ torch.randn(128, 64, generator=generator) + 0.5 * torch.randn(256, 64, generator=generator)
    left = {}
    for name in ("fp32", states):
        w = torch.nn.Parameter(torch.zeros(64, 128))
        optimizer = AdamW([w], lr=2e-2, weight_decay=0.0, states=name)
        for _ in range(600):
            optimizer.zero_grad()
            loss = (x @ w.T - y).square().mean()
            loss.backward()
            optimizer.step()
        left[name] = float(loss.detach())
    assert left[states] <= left["fp32"] * (1 + worst), left


def test_unknown_states_are_refused_with_the_known_ones():
    with pytest.raises(ValueError, match=r"states='int3': must be one of fp32, bf16, int8, int4, fp8"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], states="int3")
