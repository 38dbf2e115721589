"""The loss in pieces is the loss: against fp64, in every variant, for what is masked, and in the bytes it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from trainer import check_machine
from trainer.cli.compose import load
from trainer.data import IGNORE
from trainer.errors import UserError
from trainer.loss import head
from trainer.loss.chunked import Terms, linear_loss_sum, rows_at_once
from trainer.loss.config import LossConfig, LossKind
from trainer.loss.head import HeadLoss
from trainer.loss.libraries import cce_loss_sum, torch_loss_sum
from trainer.loss.plain import token_loss_sum
from trainer.memory import MemoryMeter

LinearLoss = Callable[[Tensor, Tensor, Tensor | None, Tensor, Terms], Tensor]
VARIANTS = {
    "plain": Terms(),
    "smoothed": Terms(label_smoothing=0.1),
    "z-loss": Terms(z_loss=1e-3),
    "all": Terms(label_smoothing=0.2, z_loss=1e-3, chunk_rows=37),
}

needs_torchs = pytest.mark.skipif(
    not hasattr(nn.functional, "linear_cross_entropy"), reason="needs a torch with linear_cross_entropy (2.13)"
)


def plain(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    logits = nn.functional.linear(hidden, weight, bias)
    return token_loss_sum(logits, labels, label_smoothing=terms.label_smoothing, z_loss=terms.z_loss)


def case(
    rows: int = 600, width: int = 24, vocabulary: int = 500, bias: bool = True, rounded: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """fp64 tensors whose values `rounded` holds exactly; one row in five is masked."""
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(rounded).double()

    labels = torch.randint(0, vocabulary, (rows,), generator=generator)
    labels[::5] = IGNORE
    return draw(rows, width), draw(vocabulary, width), draw(vocabulary) if bias else None, labels


def gradients(function: LinearLoss, tensors: Any, dtype: torch.dtype, terms: Terms) -> tuple[Tensor, list[Tensor]]:
    """Mean loss, and the gradients of hidden states, weight and bias."""
    *values, labels = tensors
    leaves = [None if t is None else t.to(dtype, copy=True).requires_grad_() for t in values]
    loss = function(*leaves, labels, terms) / max(int((labels != IGNORE).sum()), 1)
    loss.backward()
    return loss.detach(), [leaf.grad.double() for leaf in leaves if leaf is not None]


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no-bias"])
def test_in_fp32_loss_and_gradients_are_those_of_fp64(name: str, bias: bool) -> None:
    tensors, terms = case(bias=bias), VARIANTS[name]
    loss, found = gradients(linear_loss_sum, tensors, torch.float32, terms)
    exact, expected = gradients(plain, tensors, torch.float64, terms)
    assert abs(float(loss - exact)) <= 1e-6
    for one, other in zip(found, expected, strict=True):
        assert (one - other).norm() <= 1e-6 * other.norm()
    wide, _ = gradients(linear_loss_sum, tensors, torch.float64, terms)
    assert wide.dtype == torch.float64 and abs(float(wide - exact)) <= 1e-12


@pytest.mark.parametrize("chunk_rows, rows", [(None, 2048), (16, 2048), (1, 512)])
def test_in_bf16_the_reported_loss_is_right_and_gradients_are_as_good_as_the_plain_ones(
    chunk_rows: int | None, rows: int
) -> None:
    """torch's chunked loss sums in bf16: with chunks of 16 rows it is off by more than 1."""
    tensors = case(rows=rows, rounded=torch.bfloat16)
    terms = Terms(chunk_rows=chunk_rows)
    loss, found = gradients(linear_loss_sum, tensors, torch.bfloat16, terms)
    exact, expected = gradients(plain, tensors, torch.float64, terms)
    assert loss.dtype == torch.float32 and abs(float(loss - exact)) <= 1e-3
    _, usual = gradients(plain, tensors, torch.bfloat16, terms)
    for one, other, reference in zip(found, usual, expected, strict=True):
        assert (one - reference).norm() <= max(3e-3 * reference.norm(), 1.2 * (other - reference).norm())


@pytest.mark.gpu
@pytest.mark.parametrize("name", VARIANTS)
def test_on_a_gpu_too(name: str) -> None:
    """In fp32 that of fp64; in bf16 right as it is reported, with gradients as good as the plain ones."""
    tensors = [None if t is None else t.cuda() for t in case(rows=2048, rounded=torch.bfloat16)]
    exact, expected = gradients(plain, tensors, torch.float64, VARIANTS[name])
    loss, found = gradients(linear_loss_sum, tensors, torch.float32, VARIANTS[name])
    assert abs(float(loss - exact)) <= 1e-6 * max(float(exact), 1)
    assert all((one - other).norm() <= 1e-6 * other.norm() for one, other in zip(found, expected, strict=True))
    loss, found = gradients(linear_loss_sum, tensors, torch.bfloat16, VARIANTS[name])
    plain_loss, usual = gradients(plain, tensors, torch.bfloat16, VARIANTS[name])
    off, plainly_off = (abs(float(each.double() - exact)) for each in (loss, plain_loss))
    assert loss.dtype == torch.float32 and off <= 1e-3 + plainly_off  # logits are rounded to bf16 in both
    for one, other, reference in zip(found, usual, expected, strict=True):
        assert (one - reference).norm() <= max(3e-3 * reference.norm(), 1.2 * (other - reference).norm())


def test_in_bf16_gradients_are_scaled_by_one_in_all_targets_and_not_by_what_bf16_makes_of_it() -> None:
    """1/337 is 0.24 % from its bf16."""
    *values, labels = case(rows=422, rounded=torch.bfloat16)
    targets = int((labels != IGNORE).sum())
    assert abs(float(torch.tensor(1 / targets).bfloat16()) * targets - 1) > 2e-3
    sums = []
    for factor in (1.0, 1 / targets):
        leaves = [None if t is None else t.bfloat16().requires_grad_() for t in values]
        (linear_loss_sum(*leaves, labels, Terms()) * factor).backward()
        sums.append([leaf.grad.double().norm() / factor for leaf in leaves if leaf is not None])
    assert all(abs(float(scaled / plain - 1)) < 3e-4 for plain, scaled in zip(*sums, strict=True))


@pytest.mark.parametrize(
    "function", [linear_loss_sum, pytest.param(torch_loss_sum, marks=needs_torchs)], ids=["chunked", "torch"]
)
def test_a_shard_without_targets_adds_zero_and_no_gradient(function: LinearLoss) -> None:
    hidden, weight, bias, labels = case()
    loss, found = gradients(function, (hidden, weight, bias, torch.full_like(labels, IGNORE)), torch.float32, Terms())
    assert loss == 0 and all((gradient == 0).all() for gradient in found)


def test_masked_rows_count_neither_in_the_loss_nor_in_any_gradient() -> None:
    hidden, weight, bias, labels = case()
    counted = labels != IGNORE
    loss, found = gradients(linear_loss_sum, (hidden, weight, bias, labels), torch.float64, VARIANTS["all"])
    alone, rest = gradients(
        linear_loss_sum, (hidden[counted], weight, bias, labels[counted]), torch.float64, VARIANTS["all"]
    )
    assert torch.allclose(loss, alone) and torch.allclose(found[1], rest[1]) and torch.allclose(found[2], rest[2])
    assert (found[0][~counted] == 0).all() and torch.allclose(found[0][counted], rest[0])


@needs_torchs
def test_torchs_own_is_right_in_bf16_as_it_is_summed_here() -> None:
    tensors = case(rows=2048, rounded=torch.bfloat16)
    loss, _ = gradients(torch_loss_sum, tensors, torch.bfloat16, Terms(chunk_rows=16))
    exact, _ = gradients(plain, tensors, torch.float64, Terms())
    assert abs(float(loss - exact)) <= 2e-3


def test_cut_cross_entropy_agrees_where_it_is_installed() -> None:
    pytest.importorskip("cut_cross_entropy", reason="needs the package cut-cross-entropy")
    tensors = case(bias=False)
    loss, found = gradients(cce_loss_sum, tensors, torch.float32, Terms())
    exact, expected = gradients(plain, tensors, torch.float64, Terms())
    assert abs(float(loss - exact)) <= 1e-5
    assert all((a - b).norm() <= 1e-4 * b.norm() for a, b in zip(found, expected, strict=True))


def test_gradients_can_be_asked_for_once() -> None:
    hidden, weight, bias, labels = case()
    leaf = hidden.float().requires_grad_()
    loss = linear_loss_sum(leaf, weight.float(), None, labels, Terms())
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_nothing_is_kept() -> None:
    hidden, weight, bias, labels = case()
    weight.requires_grad_()
    with torch.no_grad():
        loss = linear_loss_sum(hidden, weight, bias, labels, Terms())
    assert not loss.requires_grad
    assert torch.allclose(loss, plain(hidden, weight, bias, labels, Terms()))


def test_rows_at_once_make_logits_about_as_large_as_the_hidden_states() -> None:
    assert rows_at_once(65536, 512, 512 * 32) == 2048
    assert rows_at_once(65536, 4096, 128256) == 2048
    assert rows_at_once(100, 64, 50000) == 128


def peak(function: LinearLoss, dtype: torch.dtype) -> int:
    """Bytes at the most above what was there before, forward and backward."""
    rows, width, vocabulary = 8192, 32, 32 * 32
    model = nn.Linear(width, vocabulary, bias=False, dtype=dtype)
    hidden = torch.randn(rows, width, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, vocabulary, (rows,))
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters(), lr=0.0), torch.device("cpu"))
    with meter.count_step() as timeline:
        function(hidden, model.weight, None, labels, Terms()).backward()
    return int(timeline.total.max()) - int(timeline.total[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_peak_is_at_most_a_quarter_of_the_plain_one(dtype: torch.dtype) -> None:
    assert peak(linear_loss_sum, dtype) <= peak(plain, dtype) / 4


# --- inside a model ---


def causal_model(**changed: Any) -> Any:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 96, "tie_word_embeddings": False,
    }  # fmt: skip
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changed)).train()


def model_step(model: Any, cfg: LossConfig, autocast: bool = False) -> tuple[Tensor, dict[str, Tensor]]:
    ids = torch.randint(0, 96, (3, 20), generator=torch.Generator().manual_seed(2))
    labels = ids.clone()
    labels[0] = IGNORE
    loss_of = HeadLoss(model, cfg)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        loss = loss_of(lambda: model(input_ids=ids, use_cache=False), labels)
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", [LossKind.chunked, pytest.param(LossKind.torch, marks=needs_torchs)])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("autocast", [False, True], ids=["fp32", "autocast"])
def test_a_model_has_the_same_loss_and_gradients_either_way(kind: LossKind, tied: bool, autocast: bool) -> None:
    loss, expected = model_step(causal_model(tie_word_embeddings=tied), LossConfig(kind=LossKind.plain), autocast)
    found_loss, found = model_step(causal_model(tie_word_embeddings=tied), LossConfig(kind=kind), autocast)
    assert torch.allclose(found_loss, loss, rtol=1e-3 if autocast else 1e-6)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= (2e-2 if autocast else 2e-6) * gradient.norm(), name


def test_the_heads_gradient_arrives_once_tied_or_not() -> None:
    """What an update in backward needs: its hook must see the whole gradient, and no second one."""
    for tied in (False, True):
        model = causal_model(tie_word_embeddings=tied)
        arrived: list[str] = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, to=arrived: to.append(name))
        model_step(model, LossConfig())
        assert sorted(arrived) == sorted(name for name, _ in model.named_parameters())


def test_outside_a_step_the_model_gives_logits_and_evaluation_has_no_extras() -> None:
    model = causal_model()
    ids = torch.randint(0, 96, (2, 12))
    before = model(input_ids=ids, use_cache=False).logits
    loss_of = HeadLoss(model, LossConfig(label_smoothing=0.3, z_loss=0.1))
    assert torch.equal(model(input_ids=ids, use_cache=False).logits, before)
    with torch.no_grad():
        evaluated = loss_of(lambda: model(input_ids=ids, use_cache=False), ids, evaluating=True)
        trained = loss_of(lambda: model(input_ids=ids, use_cache=False), ids)
    assert torch.allclose(evaluated, token_loss_sum(before, ids)) and trained > evaluated


def test_a_model_that_changes_its_logits_is_refused() -> None:
    config = transformers.Gemma2Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=96, final_logit_softcapping=30.0,
    )  # fmt: skip
    model = transformers.Gemma2ForCausalLM(config)
    with pytest.raises(UserError, match="loss=chunked: Gemma2ForCausalLM changes the logits.*Use loss=plain"):
        model_step(model, LossConfig())
    model_step(transformers.Gemma2ForCausalLM(config), LossConfig(kind=LossKind.plain))


def test_a_model_without_a_linear_head_is_refused() -> None:
    with pytest.raises(UserError, match="has no linear head"):
        HeadLoss(nn.Linear(2, 2), LossConfig())


def test_a_head_with_a_bias_is_refused_where_cut_cross_entropy_takes_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head, "takes_a_bias", lambda: False)
    model = causal_model()
    HeadLoss(model, LossConfig(kind=LossKind.cce))
    model.lm_head = nn.Linear(32, 96, bias=True)
    with pytest.raises(UserError, match=r"loss=cce: the head of LlamaForCausalLM has a bias.*Use loss=chunked"):
        HeadLoss(model, LossConfig(kind=LossKind.cce))


def test_a_torch_without_the_loss_is_told_before_it_is_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    assert check_machine.torch_has_the_loss() == hasattr(nn.functional, "linear_cross_entropy")
    monkeypatch.setattr(check_machine, "torch_has_the_loss", lambda: False)
    with pytest.raises(UserError, match=r"loss=torch: torch .* has no linear_cross_entropy yet; use loss=chunked"):
        load(["loss=torch"])


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["loss.label_smoothing=1.5"], "must lie in [0, 1)"),
        (["loss=plain", "loss.chunk_rows=3"], "loss=plain has no such thing; use loss=chunked or loss=torch"),
        (["loss=torch", "loss.z_loss=0.1"], "loss=torch has no such thing; use loss=chunked or loss=plain or loss=lig"),
        (["loss=liger"], "the package liger-kernel isn't installed"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_options_without_effect_are_refused(overrides: list[str], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as caught:
        load(overrides)
    assert message in str(caught.value)
