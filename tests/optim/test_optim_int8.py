"""The grid of int8 weights, and the tensor that a model and autograd see."""

import copy
import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from optim.int8 import Int8Weight, rounder, stochastic_int8
from optim.int8_grid import grid_of, stored_bytes


def normal(*shape, seed=0, scale=0.02):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


def steps_of(weight):
    """Scale of each value's group: one LSB."""
    m, n = weight.codes.shape
    return weight.scale.repeat_interleave(weight.group, 1)[:, :n]


def on_a_grid(m, n, group=64):
    """An int8 matrix whose groups use both ends of their ranges."""
    weight = Int8Weight.quantize(normal(m, n), group)
    weight.codes[:, ::group], weight.codes[:, 1::group] = 0, 255
    return weight


@pytest.mark.parametrize("width, group", [(256, 64), (100, 64), (40, 256), (7, 8), (1, 8)], ids=str)
def test_a_weight_comes_back_within_half_a_step(width, group):
    values = normal(12, width)
    weight = Int8Weight.quantize(values, group)
    assert weight.shape == values.shape and weight.dtype is torch.float32
    error = (weight.dequantize() - values).abs()
    assert bool((error <= 0.5001 * steps_of(weight)).all())
    groups = -(-width // group)
    assert tuple(weight.scale.shape) == tuple(weight.low.shape) == (12, groups)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_group_of_one_sign_comes_back_within_a_step_of_its_own_range(sign):
    """Where a zero-point cut to 0..255 is wrong by ten times that range."""
    values = sign * (1.0 + normal(4, 64).abs())
    weight = Int8Weight.quantize(values, 64)
    step = (values.amax(1) - values.amin(1)) / 255
    assert bool(((weight.dequantize() - values).abs() <= step[:, None]).all())


def test_equal_values_zeros_and_extremes_come_back():
    for value in (0.0, 3.25, -1.5, 1e30):
        values = torch.full((2, 16), value)
        assert torch.equal(Int8Weight.quantize(values, 8).dequantize(), values), value
    wide = torch.tensor([[1e-30, -1e-30, 0.0, 5e-31], [1e30, -1e30, 0.0, 5e29]])
    weight = Int8Weight.quantize(wide, 4)
    assert bool(((weight.dequantize() - wide).abs() <= steps_of(weight)).all())
    assert Int8Weight.quantize(torch.tensor([[1.0, float("nan"), 2.0, 3.0]]), 4).dequantize().isnan().all()


def test_a_grid_covers_its_group_and_is_hardly_coarser_than_it_must_be():
    ends = normal(4000, 2, scale=1.0) * torch.logspace(-20, 10, 4000)[:, None] + normal(4000, 1, seed=1, scale=1.0)
    least, most = ends.amin(1), ends.amax(1)
    scale, low = grid_of(least, most)
    end = low.double() + 255 * scale.double()
    assert bool((low <= least).all()) and bool((end >= most.double() - 1e-7 * most.abs()).all())
    tight = scale.double() / ((most.double() - least.double()) / 255)
    assert float(tight[(most - least) > 1e-2 * most.abs()].max()) < 1 + 2.0**-11


def test_values_on_the_grid_stay_bit_for_bit_when_rounded_again():
    """Oracle 9: whole numbers are unchanged, over fresh ranges of every size, powers of two passed on the way too."""
    weight = on_a_grid(2000, 128)
    for _ in range(2):
        spread = torch.logspace(-6, 6, 2000)[:, None]
        weight = Int8Weight.quantize(weight.dequantize() * spread, 64)
        weight.codes[:, ::64], weight.codes[:, 1::64] = 0, 255
        weight.write_(weight.dequantize())  # onto the grid that these ends give
        before = weight.clone()
        for draw in range(12):  # one in 10^5 would move if a value were off the grid by fp32's rounding
            stochastic_int8("w", draw, weight)(weight, weight.dequantize())
        for part in ("codes", "scale", "low"):
            assert torch.equal(getattr(weight, part), getattr(before, part)), part


@pytest.mark.parametrize("share", [0.05, 0.3, 0.5, 0.9])
def test_the_mean_of_many_draws_is_the_value_within_four_sigma_at_the_ends_too(share):
    draws, start = 4000, on_a_grid(1, 64)
    step = start.scale.item()
    values = start.dequantize() + share * step * torch.linspace(-1, 1, 64)
    values[0, 0] = values.amin() - 0.3 * step  # new ends of the range
    values[0, 1] = values.amax() + 0.3 * step
    sums = torch.zeros(1, 64, dtype=torch.float64)
    weight = start.clone()
    for draw in range(draws):
        stochastic_int8("w", draw, weight)(weight, values)
        sums += weight.dequantize(torch.float64)
    part = ((values - weight.low) / weight.scale) % 1.0
    sigma = (weight.scale * (part * (1 - part)).sqrt() / draws**0.5).double().clamp(min=1e-4 * step)
    assert bool(((sums / draws - values).abs() <= 4 * sigma).all())


def test_a_hundred_updates_of_a_twentieth_of_a_step_arrive():
    weight = on_a_grid(256, 256)
    nearest, start, step = weight.clone(), weight.dequantize(), steps_of(weight).clone()
    direction = torch.where(normal(256, 256, seed=1) > 0, 1.0, -1.0)
    for count in range(100):
        stochastic_int8("w", count, weight)(weight, weight.dequantize() + 0.05 * step * direction)
        nearest.copy_(nearest.dequantize() + 0.05 * step * direction)
    moved = ((weight.dequantize() - start) / step * direction).mean() / 5
    assert 0.99 <= float(moved) <= 1.01
    assert float(((nearest.dequantize() - start) / step * direction).mean()) < 0.5


def test_a_value_has_its_draw_whatever_rows_are_written():
    values = normal(30, 40)
    whole = Int8Weight.quantize(torch.zeros(30, 40), 16)
    pieces = whole.clone()
    stochastic_int8("w", 3, whole)(whole, values)
    store = stochastic_int8("w", 3, pieces)
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        store(pieces[begin:end], values[begin:end])
    shards = [part.clone() for part in (pieces[:11], pieces[11:11], pieces[11:])]
    for row, shard in zip((0, 11, 11), shards, strict=True):
        stochastic_int8("w", 3, shard, row=row)(shard, values[row : row + len(shard)])
    assert torch.equal(whole.codes, pieces.codes)
    assert torch.equal(whole.codes, torch.cat([shard.codes for shard in shards]))
    other = whole.clone()
    stochastic_int8("w", 4, other)(other, values)
    assert not torch.equal(whole.codes, other.codes)


@pytest.mark.parametrize("shape, group", [((12, 256), 128), ((12, 256), 256), ((5, 300), 256), ((3, 7), 256)], ids=str)
def test_bytes_are_those_of_the_formula(shape, group):
    weight = Int8Weight.quantize(torch.zeros(shape), group)
    held = sum(part.untyped_storage().nbytes() for part in (weight.codes, weight.scale, weight.low))
    assert held == stored_bytes(shape, group)
    if shape[1] % group == 0:
        assert held == shape[0] * shape[1] * (1 + 8 / group)


def test_q_galore_torch_quantizes_alike():
    """Scales to rounding; codes equal or one apart: its zero-point is rounded, and ours is not."""
    theirs = pytest.importorskip("q_galore_torch.q_galore_adamw8bit", exc_type=ImportError).AdamW8bit
    values = normal(16, 512)
    codes, scales, zeros = theirs._quantize(None, values, 256)
    ours = Int8Weight.quantize(values, 256)
    torch.testing.assert_close(ours.scale.view(-1, 1), scales, rtol=2e-4, atol=0)
    assert int((ours.codes.int() - codes.int()).abs().max()) <= 1
    back = theirs._dequantize(None, codes, torch.float32, 256, scales, zeros)
    assert bool(((back - ours.dequantize()).abs() <= 1.001 * steps_of(ours)).all())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_are_those_of_the_dequantized_weight(dtype, bias):
    layer = nn.Linear(40, 12, bias=bias, dtype=dtype)
    layer.weight = nn.Parameter(Int8Weight.quantize(layer.weight.detach(), 16))
    plain = copy.deepcopy(layer)
    plain.weight = nn.Parameter(layer.weight.dequantize())
    found = []
    for module in (layer, plain):
        x = normal(2, 3, 40, scale=1.0).to(dtype).requires_grad_()
        y = module(x)
        y.float().square().sum().backward()
        found.append((y, x.grad, module.weight.grad))
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)
    assert type(layer.weight.grad) is torch.Tensor and layer.weight.grad.dtype is dtype


def test_autograd_keeps_the_codes_and_nothing_else_of_the_weight():
    weight = nn.Parameter(Int8Weight.quantize(normal(64, 96), 32))
    x = normal(4, 96).requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved) or saved, lambda saved: saved):
        y = F.linear(x, weight)
    codes = [saved for saved in kept if isinstance(saved, Int8Weight)]
    assert [saved.codes.data_ptr() for saved in codes] == [weight.codes.data_ptr()]
    assert sum(saved.numel() for saved in kept if not isinstance(saved, Int8Weight)) == x.numel()
    y.sum().backward()


def test_a_gradient_has_the_strides_of_the_weight_as_a_plain_one():
    weight = nn.Parameter(Int8Weight.quantize(normal(8, 12), 4))
    (normal(3, 12) @ weight.t()).sum().backward()
    assert weight.grad.stride() == (12, 1)


def test_views_that_stay_int8_share_their_storage():
    weight = Int8Weight.quantize(normal(12, 40), 16)
    for view in (
        weight[3:5],
        weight.detach(),
        weight.t(),
        weight.T.T,
        weight.chunk(2)[1],
        weight.view(12, 40),
        weight[:],
    ):
        assert isinstance(view, Int8Weight)
        assert view.codes.untyped_storage().data_ptr() == weight.codes.untyped_storage().data_ptr()
    assert torch.equal(weight[3:5].dequantize(), weight.dequantize()[3:5])
    assert torch.equal(weight.T.dequantize(), weight.dequantize().T)
    assert torch.equal(weight.view(-1).dequantize(), weight.dequantize().view(-1))
    weight[3:5].copy_(torch.zeros(2, 40))
    assert not weight.dequantize()[3:5].any() and weight.dequantize()[5:].any()


def test_what_would_be_lost_is_refused_with_a_remedy():
    weight = Int8Weight.quantize(normal(12, 40), 16)
    for call in (
        lambda: weight[:, :3], lambda: weight[::2], lambda: weight[0], lambda: weight.zero_(), lambda: weight.add_(1.0),
        lambda: weight.view(20, 24), lambda: weight.chunk(2, dim=1), lambda: weight.unsqueeze(0),
    ):  # fmt: skip
        with pytest.raises(NotImplementedError, match=r"Int8Weight\(\(12, 40\).*Take weight\.dequantize\(\)"):
            call()


def test_reading_operators_see_the_values():
    weight = Int8Weight.quantize(normal(12, 40), 16)
    plain = weight.dequantize()
    assert torch.equal(weight + 1, plain + 1) and torch.equal(weight.norm(), plain.norm())
    assert torch.equal(weight.double(), plain.double()) and torch.equal(
        F.embedding(torch.tensor([2]), weight), plain[2:3]
    )
    assert torch.equal(weight.bfloat16(), plain.bfloat16()) and type(weight.float()) is Int8Weight  # its own dtype
    for made in (torch.zeros_like(weight), weight.new_zeros(3), weight.new_zeros((2, 40), dtype=torch.float32)):
        assert type(made) is torch.Tensor and not made.any()


def test_a_module_with_int8_weights_is_copied_saved_and_loaded():
    layer = nn.Linear(40, 12)
    layer.weight = nn.Parameter(Int8Weight.quantize(layer.weight.detach(), 16, torch.bfloat16))
    twin = copy.deepcopy(layer)
    assert isinstance(twin.weight, nn.Parameter) and twin.weight.requires_grad
    assert twin.weight.codes.data_ptr() != layer.weight.codes.data_ptr()
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    twin.weight.detach().copy_(torch.zeros(12, 40))
    twin.load_state_dict(torch.load(file, weights_only=True))
    for part in ("codes", "scale", "low"):
        assert torch.equal(getattr(twin.weight, part), getattr(layer.weight, part))
    assert twin.to("meta").weight.codes.is_meta


def test_a_module_is_not_cast_behind_its_codes():
    layer = nn.Linear(40, 12)
    layer.weight = nn.Parameter(Int8Weight.quantize(layer.weight.detach(), 16))
    with pytest.raises(TypeError, match=r"cannot become torch\.bfloat16; replace the parameter by weight\.dequantize"):
        layer.to(torch.bfloat16)


def test_fake_weights_go_forward_and_backward():
    with FakeTensorMode():
        weight = nn.Parameter(Int8Weight.quantize(torch.randn(12, 40), 16))
        rounder(weight, "w", 1, "stochastic")(weight.detach(), torch.randn(12, 40))
        F.linear(torch.randn(3, 40), weight).sum().backward()
    assert weight.grad.shape == (12, 40)
