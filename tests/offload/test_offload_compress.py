"""FP8 and int8 codes of activations: error bounds by the format, special values, and what a block holds then."""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from offload import compress
from offload.compress import FP8_GROUP, INT8_GROUP, PIECE, decode, encode, wide
from offload.config import Fate
from offload.fused import Fused
from tests.offload.models import llama, managed, rows, step


def normal(count: int = 2**16) -> Tensor:
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


def snr(x: Tensor, y: Tensor) -> float:
    return 10 * math.log10(float(x.square().sum() / (x - y).square().sum()))


@pytest.mark.parametrize("count", [1, 15, 16, 17, 1000, PIECE + 40])
@pytest.mark.parametrize("integers, group", [(False, FP8_GROUP), (False, 0), (True, INT8_GROUP)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_round_trip_is_within_half_a_step_of_the_format(
    count: int, integers: bool, group: int, dtype: torch.dtype
) -> None:
    x = normal(count).to(dtype)
    coded = encode(x, integers=integers, group=group)
    y = decode(coded)
    assert y.dtype == dtype and y.shape == x.shape
    width = group or count
    scales = coded.scales.float().repeat_interleave(width)[:count]
    wide, error = x.float(), (y.float() - x.float()).abs()
    rounding = 2**-8 * y.float().abs() if dtype is torch.bfloat16 else 2**-23 * y.float().abs()
    if integers:
        bound = 0.5 * scales + 127 * 2**-8 * scales * (wide.abs() >= 126 * scales)
    else:
        bound = torch.where(wide.abs() >= scales * 2**-6, wide.abs() * (1 / 17 + 2**-8), scales * 2**-10)
    assert (error <= bound + rounding + 1e-30).all()


@pytest.mark.parametrize("integers, group", [(False, FP8_GROUP), (True, INT8_GROUP)])
@pytest.mark.parametrize("row", [64, 682, 100])
def test_what_a_token_becomes_does_not_depend_on_the_tokens_beside_it(integers: bool, group: int, row: int) -> None:
    """Where the group divides the row and where it does not: a long batch, and each of its rows by itself."""
    rows = 2 * PIECE // row if row == 682 else 7
    x = normal(rows * row)
    coded = encode(x, integers=integers, group=group, row=row)
    assert coded.scales.numel() == rows * -(-row // group)
    together = decode(coded).view(rows, row)
    for index in (0, rows // 2, rows - 1):
        alone = decode(encode(x.view(rows, row)[index], integers=integers, group=group))
        assert torch.equal(together[index], alone)


def test_every_code_of_the_table_stands_for_what_torchs_cast_makes_of_it() -> None:
    codes = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    assert torch.equal(wide(codes).nan_to_num(999), codes.float().nan_to_num(999))


def test_the_largest_of_a_group_gets_the_largest_code() -> None:
    x = normal(4096)
    coded = encode(x, integers=False, group=FP8_GROUP)
    assert (coded.codes.float().view(-1, FP8_GROUP).abs().amax(1) == 448).all()
    coded = encode(x, integers=True, group=INT8_GROUP)
    assert (coded.codes.view(-1, INT8_GROUP).abs().amax(1) == 127).all()


def test_the_noise_is_what_the_format_promises() -> None:
    """Gaussian values, E4M3: 31.5 dB with one scale, 33.0 dB in groups of 16."""
    x = normal()
    assert snr(x, decode(encode(x, integers=False, group=0))) == pytest.approx(31.5, abs=0.2)
    assert snr(x, decode(encode(x, integers=False, group=FP8_GROUP))) == pytest.approx(33.0, abs=0.2)
    assert snr(x, decode(encode(x, integers=True, group=INT8_GROUP))) > 43


def test_groups_keep_an_outlier_to_itself() -> None:
    x = normal()
    x[::997] *= 1e6
    small = x.abs() < 10
    groups = decode(encode(x, integers=False, group=FP8_GROUP))[small]
    whole = decode(encode(x, integers=False, group=0))[small]
    assert snr(x[small], groups) > snr(x[small], whole) + 5


def test_zeros_stay_zeros_and_equal_values_equal() -> None:
    assert decode(encode(torch.zeros(40), integers=False, group=16)).abs().max() == 0
    same = decode(encode(torch.full((40,), 3.0), integers=False, group=16))
    assert (same == same[0]).all() and abs(float(same[0]) - 3) < 3 * 2**-8


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("integers, group", [(False, 16), (False, 0), (True, 64)])
def test_what_is_not_finite_is_not_hidden(value: float, integers: bool, group: int) -> None:
    x = normal(256)
    x[70] = value
    y = decode(encode(x, integers=integers, group=group))
    assert y[70].isnan()
    if group:
        begin = 70 // group * group
        assert y[:begin].isfinite().all() and y[begin + group :].isfinite().all()


@pytest.mark.parametrize("fate, least", [(Fate.fp8, 0.99), (Fate.int8, 0.999)])
def test_gradients_keep_their_direction_and_the_loss_every_bit(fate: Fate, least: float) -> None:
    expected = step(llama())
    model = llama()
    policy = managed(model, fate=fate)
    found = step(model)
    assert torch.equal(found[0], expected[0]), "forward computes with what it had"
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert torch.cosine_similarity(one.flatten(), other.flatten(), dim=0) >= least
    assert policy.ledger.codes < 0.3 * policy.ledger.compressed


def test_weights_and_attention_operands_are_never_compressed() -> None:
    model = llama()
    policy = managed(model, fate=Fate.fp8)
    seen: list[int] = []
    inner = policy._entry
    policy._entry = lambda frame, tensor, verdict: (  # type: ignore[assignment]
        seen.append(tensor.untyped_storage().data_ptr()) or inner(frame, tensor, verdict)
    )
    step(model)
    assert seen and not {p.untyped_storage().data_ptr() for p in model.parameters()} & set(seen)
    assert all(frame.kept > 0 for frame in policy.frames)


@pytest.mark.parametrize("fate", [Fate.fp8, Fate.int8])
def test_a_row_of_a_batch_gets_the_gradients_it_gets_alone(fate: Fate) -> None:
    """Widths that no group divides; int8, since COAT's one scale for a linear's input spans the batch by design."""
    model = llama(torch.float64, intermediate_size=100, attention_dropout=0.0)
    rules = ["linear() -> keep"] if fate is Fate.fp8 else []
    managed(model, *rules, fate=fate)
    ids = rows(3, 24)
    together = step_of(model, ids)
    alone = [step_of(model, ids[index : index + 1]) for index in range(3)]
    for one, *others in zip(together, *alone, strict=True):
        assert (one - sum(others)).norm() <= 1e-12 * one.norm()


def step_of(model: torch.nn.Module, ids: Tensor) -> list[Tensor]:
    """Gradients of the sum of all logits squared, in fp64: a sum over rows."""
    model.zero_grad()
    model(input_ids=ids, use_cache=False).logits.square().sum().backward()
    return [p.grad.clone() for p in model.parameters()]


def test_a_hidden_state_with_as_many_values_as_the_embedding_is_no_form_of_it() -> None:
    model = llama(attention_dropout=0.0)
    policy = managed(model, fate=Fate.host)
    ids = rows(4, 16)  # 64 tokens, as many as the vocabulary
    model(input_ids=ids, use_cache=False)
    hidden = 4 * 16 * 32 * 4
    assert policy.frames[0].moved == policy.frames[1].moved >= 10 * hidden


@contextmanager
def compiling() -> Iterator[None]:
    """torch.compile as users have it; the other tests are spared its seconds."""
    names = ("raise_peaks", "write_codes", "write_values")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch._dynamo.config, "disable", False)
        for name in names:
            patch.setattr(compress, name, Fused(getattr(compress, name).function))
        yield
        assert all(getattr(compress, name).works for name in names)


def require_same_codes_fused(device: str) -> None:
    """Fused on `device`, in pieces on `device`, and on a CPU: codes, scales and what they stand for are the same."""
    x = (normal(192 * 512) * torch.linspace(-6, 6, 192 * 512).exp()).bfloat16()
    for integers, group in [(False, FP8_GROUP), (False, 0), (True, INT8_GROUP)]:
        cpu = encode(x, integers=integers, group=group, row=512, fused=False)
        for fused in (True, False):
            coded = encode(x.to(device), integers=integers, group=group, row=512, fused=fused)
            assert coded.fused is fused and torch.equal(coded.scales.cpu(), cpu.scales)
            assert torch.equal(coded.codes.cpu().view(torch.uint8), cpu.codes.view(torch.uint8)), (group, fused)
            with ThreadPoolExecutor(1) as backward:  # which decodes on a thread of its own
                assert torch.equal(backward.submit(decode, coded).result().cpu(), decode(cpu))


@pytest.mark.slow
def test_one_kernel_makes_the_codes_that_operators_make() -> None:
    with compiling():
        require_same_codes_fused("cpu")


@pytest.mark.gpu
def test_a_gpu_makes_the_codes_that_a_cpu_makes() -> None:
    with compiling():
        require_same_codes_fused("cuda")


def test_what_cannot_be_compiled_runs_as_it_is_written_and_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no compiler")

    fill = Fused(lambda out, value: out.copy_(value))
    monkeypatch.setattr(torch, "compile", lambda *args, **options: broken)
    out = torch.zeros(3)
    with pytest.warns(UserWarning, match="torch.compile does not work here .no compiler."):
        fill(out, torch.tensor(2.0))
    fill(out, torch.tensor(3.0))
    assert not fill.works and (out == 3).all()
    with FakeTensorMode():
        fill(torch.empty(3), torch.empty(3))


def test_ragged_rows_are_never_fused() -> None:
    assert not encode(normal(200), integers=False, group=16, row=100, fused=True).fused
