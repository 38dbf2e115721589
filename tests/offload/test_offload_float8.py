"""Products in FP8: torchao's bits, an oracle in float64, and one byte a value kept for backward."""

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from offload.config import Fate
from offload.float8 import Recipe, Shared, linear
from offload.float8_layers import plain_products, use_float8
from offload.lean import make_lean
from tests.offload.models import llama, managed, rows, same, step
from tests.ranks import on_ranks
from trainer.adapt import blocks
from trainer.cli.compose import load
from trainer.errors import UserError

pytest.importorskip("torchao")
RECIPES = ["tensorwise", "rowwise", "rowwise_with_gw_hp"]
TARGETS = r"(attn|mlp)\..*weight$"
HIDDEN, BATCH, LENGTH = 64, 2, 32
UNIT = BATCH * LENGTH * HIDDEN * 2
SMALL = 4 * BATCH * LENGTH * 4 + 1
"""Bytes of one bf16 hidden state; numbers a token, and scales, are not counted."""


def model_in_float8(recipe: str = "tensorwise", dtype: torch.dtype = torch.bfloat16, **changed: Any) -> Any:
    sizes = {"hidden_size": HIDDEN, "intermediate_size": 160, "num_key_value_heads": 4, "attention_dropout": 0.0}
    model = llama(dtype, **sizes | changed)
    assert use_float8(blocks(model), TARGETS, recipe) == []
    return model


def operands(dtype: torch.dtype, tokens: int = 40) -> tuple[Tensor, Tensor, Tensor]:
    made = torch.Generator().manual_seed(3)
    x, weight, grad = (torch.randn(*n, generator=made) for n in ((2, tokens // 2, 64), (48, 64), (2, tokens // 2, 48)))
    return x.to(dtype), (weight / 8).to(dtype), grad.to(dtype)


def products(recipe: str, x: Tensor, weight: Tensor, grad: Tensor) -> list[Tensor]:
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = linear(x, weight, None, Recipe(recipe), Shared())
    y.backward(grad)
    assert x.grad is not None and weight.grad is not None
    return [y.detach(), x.grad, weight.grad]


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_bit_is_that_of_torchaos_own_layer(recipe: str, dtype: torch.dtype) -> None:
    from torchao.float8.float8_linear import Float8Linear

    x, weight, grad = operands(dtype)
    plain = nn.Linear(64, 48, bias=False).to(dtype)
    peer = Float8Linear.from_float(plain, config=dataclasses.replace(Recipe(recipe).cfg, emulate=True))
    peer.weight.data.copy_(weight)
    leaf = x.clone().requires_grad_()
    y = peer(leaf)
    y.backward(grad)
    assert leaf.grad is not None and peer.weight.grad is not None
    assert same(products(recipe, x, weight, grad), [y.detach(), leaf.grad, peer.weight.grad])


def rounded(x: Tensor, dtype: torch.dtype, dim: int | None, power: bool) -> Tensor:
    """The oracle, in float64: x scaled so that its largest is the format's, rounded to nearest-even by the format's
    digits and subnormals, and scaled back."""
    top, digits, least = {torch.float8_e4m3fn: (448.0, 3, -6), torch.float8_e5m2: (57344.0, 2, -14)}[dtype]
    x = x.double()
    peak = x.abs().amax() if dim is None else x.abs().amax(dim, keepdim=True)
    scale = (top / peak.clamp(min=1e-12)).float()
    scale = torch.exp2(torch.floor(torch.log2(scale))) if power else scale
    scaled = (x.float() * scale).double().clamp(-top, top)
    exponent = torch.frexp(scaled).exponent - 1  # of 1.m times 2 to it
    step = torch.exp2(exponent.clamp(min=least).double() - digits)
    return (scaled / step).round() * step / scale.double()


@pytest.mark.parametrize("recipe", RECIPES)
def test_products_are_those_of_values_rounded_in_float64(recipe: str) -> None:
    """fp32 sums of 64 products of such values against float64's: 1e-6."""
    x, weight, grad = operands(torch.float32)
    e4m3, e5m2 = torch.float8_e4m3fn, torch.float8_e5m2
    flat, g = x.view(-1, 64), grad.view(-1, 48)
    rowwise, power = recipe != "tensorwise", recipe != "tensorwise"
    last, first = (-1, 0) if rowwise else (None, None)
    g_type = e4m3 if rowwise else e5m2
    y = rounded(flat, e4m3, last, power) @ rounded(weight.t(), e4m3, first, power)
    whole = recipe == "rowwise_with_gw_hp"
    back = rounded(weight, e4m3, None if whole else first, power)
    d_x = rounded(g, g_type, last, power) @ back
    exact = g.double().t() @ flat.double()
    d_weight = exact if whole else rounded(g, g_type, first, power).t() @ rounded(flat, e4m3, first, power)
    for one, other in zip(products(recipe, x, weight, grad), (y, d_x, d_weight), strict=True):
        assert (one.view(other.shape) - other).norm() <= 1e-6 * other.norm()


def test_products_are_plain_for_a_while_and_then_again_in_fp8() -> None:
    block = nn.Sequential(nn.Linear(32, 32, dtype=torch.bfloat16))
    x = torch.randn(16, 32, dtype=torch.bfloat16)
    plain = block(x)
    use_float8([("block", block)], ".*", "tensorwise")
    coded = block(x)
    assert not torch.equal(coded, plain)
    with plain_products(block):
        assert torch.equal(block(x), plain)
    assert torch.equal(block(x), coded)


def test_the_error_of_a_product_is_the_formats() -> None:
    """E4M3 by E4M3: 3.7 % of the norm; E4M3 by E5M2: 5.8 % (two independent roundings)."""
    x, weight, grad = operands(torch.float32, 4096)
    y, d_x, d_weight = products("tensorwise", x, weight, grad)
    for one, exact, error in (
        (y, x @ weight.t(), 0.037),
        (d_x, grad @ weight, 0.058),
        (d_weight, grad.view(-1, 48).t() @ x.view(-1, 64), 0.058),
    ):
        assert float((one - exact).norm() / exact.norm()) == pytest.approx(error, rel=0.15)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_what_is_not_finite_shows_in_the_result(value: float) -> None:
    x, weight, grad = operands(torch.float32)
    x[0, 3, 5] = value
    y, _, d_weight = products("tensorwise", x, weight, grad)
    assert not y.isfinite().all() and not d_weight.isfinite().all()


def saved_by_blocks(model: nn.Module) -> float:
    """Units a block saves, each storage once."""
    policy = managed(model, fate=Fate.host, keep_last=0, min_bytes=SMALL)
    step(model, rows(BATCH, LENGTH))
    return policy.frames[1].moved / UNIT


def test_inputs_of_layers_are_kept_in_one_byte_and_once() -> None:
    """r = 2.5. Lean blocks save the norms' inputs 2, qkv's input 1, q k v 3 and attention's output 1, gate and up's
    input 1, gate and up 2r, and down's input r: 8 + 3r. In FP8 those three inputs take half, and attention's output,
    which attention keeps in bf16 anyway, is shared with it."""
    lean = llama(
        torch.bfloat16, hidden_size=HIDDEN, intermediate_size=160, num_key_value_heads=4, attention_dropout=0.0
    )
    make_lean(lean)
    assert saved_by_blocks(lean) == 8 + 3 * 2.5
    in_float8 = model_in_float8()
    make_lean(in_float8)
    assert saved_by_blocks(in_float8) == 8 + 3 * 2.5 - (0.5 + 0.5 + 2.5 / 2)
    by_rows = model_in_float8("rowwise")
    make_lean(by_rows)
    assert saved_by_blocks(by_rows) == 8 + 3 * 2.5


def test_keeping_codes_costs_no_bit() -> None:
    """FP8 storage under FP8 products changes nothing of what linear layers do: their gradients are those of codes that
    were never kept, here those that recomputation casts anew."""
    expected = step(model_in_float8())
    for fate in (Fate.recompute, Fate.selective, Fate.host, Fate.disk):
        model = model_in_float8()
        managed(model, fate=fate)
        assert same(step(model), expected), fate
    model = model_in_float8()
    policy = managed(model, "linear() -> fp8")
    assert same(step(model), expected) and policy.ledger.compressed == 0


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_model_trains_nearly_as_in_bf16(recipe: str) -> None:
    expected = step(llama(torch.bfloat16, hidden_size=HIDDEN, intermediate_size=160, num_key_value_heads=4,
                          attention_dropout=0.0))  # fmt: skip
    model = model_in_float8(recipe)
    managed(model, fate=Fate.fp8)
    found = step(model)
    assert abs(float(found[0] - expected[0])) < 0.01 * float(expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.cosine_similarity(one.flatten().float(), other.flatten().float(), dim=0) >= 0.97


def two_ranks(*recipes: str) -> list[tuple[float, float]]:
    """How far gradients summed over two ranks under FSDP2, a row on each, are from those of one process that takes both
    rows at once, and one after the other: by recipe."""
    import torch.distributed as dist

    from parallel.config import ParallelConfig
    from parallel.launch import connected
    from parallel.place import spread

    ids, found, sharded = rows(2, 24), [], ParallelConfig(zero=3)
    with connected(sharded, "cpu", 1) as world:
        for recipe in recipes:
            at_once = gradients(model_in_float8(recipe, torch.float32), ids)
            model = model_in_float8(recipe, torch.float32)
            gradients(model, ids[:1])
            in_turn = gradients(model, ids[1:])
            model = model_in_float8(recipe, torch.float32)
            spread(model, world, sharded, blocks=[block for _, block in blocks(model)], ends=[], compute=None)
            summed = [grad.full_tensor() for grad in gradients(model, ids[dist.get_rank() :][:1])]  # type: ignore[attr-defined]
            found.append((farthest(summed, at_once), farthest(summed, in_turn)))
    return found


def farthest(found: list[Tensor], expected: list[Tensor]) -> float:
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def gradients(model: nn.Module, ids: Tensor) -> list[Tensor]:
    logits = model(input_ids=ids, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten(), reduction="sum").backward()
    return [p.grad for p in model.parameters()]


def test_two_ranks_get_what_one_process_has() -> None:
    """Weights are cast where they are whole, so ranks equal the micro-batches of one process under every recipe. Under
    rowwise_with_gw_hp every other scale is of a token, and both rows at once are the same too; under tensorwise they
    are not, by more than a tenth where gradients in E5M2 nearly cancel, which shows that the comparison sees it."""
    for by_token, by_batch in on_ranks(2, two_ranks, "rowwise_with_gw_hp", "tensorwise"):
        assert max(by_token) < 1e-5
        assert by_batch[0] > 1e-3 and by_batch[1] < 1e-5


def test_layers_that_no_kernel_takes_are_left_out_by_name_and_none_left_is_refused() -> None:
    model = llama(hidden_size=HIDDEN, intermediate_size=100)
    left_out = use_float8(blocks(model), TARGETS, "tensorwise")
    assert len(left_out) == 12 and left_out[0] == "model.layers.0.mlp.gate_proj"
    with pytest.raises(ValueError, match="precision.fp8_targets='lm_head': finds none.*self_attn.q_proj"):
        use_float8(blocks(llama()), "lm_head", "tensorwise")
    odd = llama(hidden_size=40, intermediate_size=100)
    with pytest.raises(ValueError, match=r"multiples of 16.*Use precision.compute=bf16"):
        use_float8(blocks(odd), TARGETS, "tensorwise")


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["precision.fp8_recipe=rowwise"], "precision.fp8_recipe=rowwise: has no effect with precision.compute=fp32"),
        (["precision=int8_sr", "precision.compute=fp8"], "weights would be rounded twice"),
        (["precision=fp8", "precision.fp8_targets='(mlp'"], "not a regular expression"),
        (["precision=fp8", "parallel.engine=deepspeed", "parallel.zero=2"], "DeepSpeed|deepspeed"),
        (["precision=fp64", "precision.compute=fp8"], "is not available; weights/compute may be"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_cannot_compute_in_float8_is_told_before_launch(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        load(overrides)


def test_a_missing_torchao_is_told_before_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    from trainer import check_machine as check

    found = check.importlib.util.find_spec
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None if name == "torchao" else found(name))
    with pytest.raises(UserError, match="the package torchao isn't installed; install it"):
        load(["precision=fp8"])


@pytest.mark.gpu
@pytest.mark.parametrize("recipe", RECIPES)
def test_on_a_gpu_every_bit_is_that_of_torchaos_own_layer(recipe: str) -> None:
    """Its kernels, not the emulation, with a number of tokens that they pad; and near the emulation's numbers."""
    from torchao.float8.float8_linear import Float8Linear

    if torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs tensor cores for FP8: capability 8.9")
    for tokens in (64, 40):
        x, weight, grad = (tensor.cuda() for tensor in operands(torch.bfloat16, tokens))
        plain = nn.Linear(64, 48, bias=False).to("cuda", torch.bfloat16)
        peer = Float8Linear.from_float(
            plain, config=dataclasses.replace(Recipe(recipe).cfg, pad_inner_dim=tokens == 40)
        )
        peer.weight.data.copy_(weight)
        leaf = x.clone().requires_grad_()
        y = peer(leaf)
        y.backward(grad)
        assert leaf.grad is not None and peer.weight.grad is not None
        found = products(recipe, x, weight, grad)
        assert same(found, [y.detach(), leaf.grad, peer.weight.grad])
        for one, other in zip(found, products(recipe, x.cpu(), weight.cpu(), grad.cpu()), strict=True):
            assert (one.cpu().float() - other.float()).norm() <= 2**-7 * other.float().norm()
