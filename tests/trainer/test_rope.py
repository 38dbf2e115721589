"""Scaled rotary positions: frequencies by formula and published figure, refusals, and what a model makes of them."""

import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from tests.reference import rope as reference
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.model import build_model, check_length, model_config
from trainer.rope.config import RopeConfig, RopeType, kind_of
from trainer.rope.frequencies import check_heeded, frequencies, pin_length, rotary
from trainer.rope.scaling import extend, longest_of, rope_text
from trainer.schema import Dtype

WIDTH = 128
TOKENIZER: Any = SimpleNamespace(bos_token_id=1, eos_token_id=2, pad_token_id=0)


def llama(length: int = 4096, base: float = 1e4, width: int = WIDTH) -> transformers.LlamaConfig:
    return transformers.LlamaConfig(
        vocab_size=32, hidden_size=2 * width, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=length, rope_parameters={"rope_type": "default", "rope_theta": base},
        initializer_range=0.2,  # positions then show in the scores
    )  # fmt: skip


def scaled(kind: str, *, length: int = 4096, base: float = 1e4, width: int = WIDTH, **options: Any) -> Any:
    config = llama(length, base, width)
    extend(config, RopeConfig(type=RopeType[kind], **options))
    return config


def built(config: Any, length: int | None = None) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config)
    if length is not None:
        pin_length(model, length)
    return model.eval()


PUBLISHED: dict[str, tuple[dict[str, Any], dict[int, float], float]] = {
    "linear": ({"kind": "linear", "factor": 8}, {0: 0.125, 63: 1e4 ** (-126 / 128) / 8}, 1.0),
    "yarn": ({"kind": "yarn", "factor": 8}, {0: 1.0, 40: 1.033822e-3, 63: 1.443477e-5}, 1.20794),
    "ntk": ({"kind": "ntk", "factor": 8}, {0: 1.0, 63: 1.443477e-5}, 1.0),
    "llama3": (
        {"kind": "llama3", "factor": 8, "length": 8192, "base": 5e5},
        {28: 3.2114461e-3, 29: 2.1665706e-3, 32: 5.2484602e-4, 35: 9.5562122e-5, 36: 7.7846555e-5},
        1.0,
    ),
    "base 5e5": ({"kind": "none", "base": 5e5}, {63: 2.455e-6}, 1.0),
}
"""Heads of 128 values: frequencies by index, and what cosines are multiplied by; 8 times 4,096 tokens at base 1e4, and
the constants of Llama 3.1."""


@pytest.mark.parametrize("case", PUBLISHED)
def test_frequencies_are_those_that_are_published(case: str) -> None:
    options, expected, attention = PUBLISHED[case]
    own = {"base": 1e4} | options
    config = scaled(**own) if case != "base 5e5" else llama(base=1e4)
    if case == "base 5e5":
        extend(config, RopeConfig(type=RopeType.none, base=5e5, factor=8))
    found, scale = frequencies(config, None)
    for index, value in expected.items():
        assert float(found[index]) == pytest.approx(value, rel=2e-4 if case == "base 5e5" else 1e-6)
    assert scale == pytest.approx(attention, rel=1e-5)


def test_the_new_base_of_ntk_is_the_published_one() -> None:
    assert scaled("ntk", factor=8).rope_parameters["rope_theta"] == pytest.approx(82684.6, rel=1e-6)


@pytest.mark.parametrize("base, longest", [(1e4, 5.44e4), (5e5, 2.56e6), (8e6, 3.92e7), (1.28e8, 6.0e8)])
def test_the_longest_wavelengths_are_the_published_ones(base: float, longest: float) -> None:
    assert 2 * math.pi / float(frequencies(llama(base=base), None)[0][-1]) == pytest.approx(longest, rel=2e-3)


DIVISORS = [1.0 + 0.1 * j for j in range(16)]
FORMULAS: list[tuple[dict[str, Any], Callable[..., list[float]], dict[str, Any]]] = [
    ({"kind": "linear", "factor": 2.5}, reference.linear, {"factor": 2.5}),
    ({"kind": "ntk", "factor": 16}, reference.ntk, {"factor": 16}),
    ({"kind": "dynamic", "factor": 4}, reference.dynamic, {"factor": 4, "original": 512, "length": 1500}),
    ({"kind": "yarn", "factor": 16}, reference.yarn, {"factor": 16, "original": 512}),
    (
        {"kind": "yarn", "factor": 3, "beta_fast": 20, "beta_slow": 2, "truncate": False},
        reference.yarn,
        {"factor": 3, "original": 512, "fast": 20, "slow": 2, "whole": False},
    ),
    ({"kind": "llama3", "factor": 4}, reference.llama3, {"factor": 4, "original": 512}),
    (
        {"kind": "llama3", "factor": 4, "low_freq_factor": 2, "high_freq_factor": 3},
        reference.llama3,
        {"factor": 4, "original": 512, "low": 2, "high": 3},
    ),
    (
        {"kind": "longrope", "factor": 4, "short_factor": [1.0] * 16, "long_factor": DIVISORS},
        reference.longrope,
        {"divisors": DIVISORS},
    ),
]


@pytest.mark.parametrize(
    ("options", "formula", "given"),
    FORMULAS,
    ids=[f"{i} {options['kind']}" for i, (options, *_) in enumerate(FORMULAS)],
)
def test_a_model_turns_by_the_formula(
    options: dict[str, Any], formula: Callable[..., list[float]], given: dict[str, Any]
) -> None:
    model = built(scaled(**options, length=512, width=32), length=1500)
    ((_, _, found),) = rotary(model)
    assert found.dtype == torch.float32
    expected = formula(32, 1e4, **given)
    torch.testing.assert_close(found.double(), torch.tensor(expected, dtype=torch.float64), rtol=2e-6, atol=0)


def test_what_is_beyond_a_bound_is_kept_or_divided() -> None:
    plain = frequencies(llama(), None)[0]
    yarn, ntk = (frequencies(scaled(kind, factor=8), None)[0] for kind in ("yarn", "ntk"))
    assert torch.equal(yarn[:21], plain[:21])
    torch.testing.assert_close(yarn[46:], plain[46:] / 8, rtol=1e-6, atol=0)
    assert ntk[0] == plain[0]
    torch.testing.assert_close(ntk[-1], plain[-1] / 8, rtol=1e-6, atol=0)


@pytest.mark.parametrize("kind", ["linear", "ntk", "dynamic", "yarn", "llama3", "none"])
def test_a_factor_of_one_is_the_plain_model_bit_for_bit(kind: str) -> None:
    config = scaled(kind, factor=1)
    ids = torch.arange(20)[None] % 32
    assert torch.equal(built(config, 20)(ids).logits, built(llama())(ids).logits)
    assert longest_of(config) == 4096


@pytest.mark.parametrize("kind", ["linear", "yarn", "llama3", "ntk"])
def test_logits_depend_on_distances_alone(kind: str) -> None:
    model = built(scaled(kind, factor=8, length=64, width=16)).double()
    ids = torch.arange(24)[None] * 5 % 32
    one, other = (model(ids, position_ids=torch.arange(24)[None] + shift).logits for shift in (0, 300))
    assert (one - other).abs().max() < 1e-4 * one.abs().max()  # angles and cosines are fp32 in transformers
    stretched = model(ids, position_ids=2 * torch.arange(24)[None]).logits
    assert (one - stretched).abs().max() > 1e-2 * one.abs().max()


def test_scores_of_yarn_grow_by_the_square_of_its_factor() -> None:
    """Queries and keys are both multiplied, once."""
    config = scaled("yarn", factor=8)
    cos, sin = next(rotary(built(config)))[0](torch.zeros(1, 1, 1), torch.arange(3)[None])
    grown = 0.1 * math.log(8) + 1
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, grown**2))
    both = scaled("yarn", factor=8, mscale=0.5, mscale_all_dim=1.0)
    assert frequencies(both, None)[1] == pytest.approx((0.05 * math.log(8) + 1) / grown)
    assert frequencies(scaled("yarn", factor=8, attention_factor=1.5), None)[1] == 1.5


def batch_logits(model: Any, *lengths: int) -> Tensor:
    """Logits of a row that packs documents of these lengths."""
    ids = torch.arange(sum(lengths))[None] * 7 % 32
    positions = torch.cat([torch.arange(count) for count in lengths])[None]
    return model(ids, position_ids=positions, use_cache=False).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_frequencies_by_length_are_those_of_the_row_whatever_was_seen_before(kind: str) -> None:
    lists = {"short_factor": [1.0] * 8, "long_factor": [1.0 + j for j in range(8)]} if kind == "longrope" else {}
    config = scaled(kind, factor=4, length=16, width=16, **lists)
    with torch.no_grad():
        model, loose = built(config, 48), built(config)
        first = batch_logits(model, 12, 36)
        assert torch.equal(first, batch_logits(loose, 12, 36)) is (kind == "longrope")  # a row is as long as its length
        short = batch_logits(model, 12)
        assert torch.equal(short, batch_logits(model, 12))
        # A rank that holds the beginning of a row alone turns by the frequencies of the whole.
        torch.testing.assert_close(short, first[:, :12])
        assert (batch_logits(built(config), 12) - first[:, :12]).abs().max() > 1e-3 * first.abs().max()
        whole = batch_logits(built(config), 48)
        torch.testing.assert_close(batch_logits(model, 48), whole)  # a text of that length: as transformers


def test_a_model_that_goes_on_asking_for_the_longest_text_is_refused() -> None:
    config = transformers.PhimoeConfig(
        vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, num_local_experts=2,
        rope_parameters={
            "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [2.0] * 8,
            "short_mscale": 1.0, "long_mscale": 1.5, "original_max_position_embeddings": 16,
        },
    )  # fmt: skip
    with pytest.raises(UserError, match="depend on the longest text in a batch"):
        built(config, 48)


def test_kinds_of_layers_with_windows_stay_as_they_are() -> None:
    config = transformers.Gemma3TextConfig(
        vocab_size=32, hidden_size=32, intermediate_size=16, num_hidden_layers=6, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=64, sliding_window=8,
    )  # fmt: skip
    before = dict(config.rope_parameters["sliding_attention"])
    rope = RopeConfig(type=RopeType.dynamic, factor=4)
    extend(config, rope)
    assert config.rope_parameters["sliding_attention"] == before
    assert kind_of(config.rope_parameters["full_attention"]) == "dynamic"
    model = built(config)
    check_heeded(model, rope)
    pin_length(model, 256)
    found = {label: held for _, label, held in rotary(model)}
    expected = torch.tensor(reference.dynamic(16, 1e6, 4, 64, 256))
    torch.testing.assert_close(found["full_attention"], expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(found["sliding_attention"], torch.tensor(reference.plain(16, 1e4)), rtol=1e-5, atol=0)
    assert "4 times 64" in str(rope_text(config, rope, 256))


def windows_alone() -> transformers.PretrainedConfig:
    config = transformers.Gemma3TextConfig(num_hidden_layers=1)
    del config.rope_parameters["full_attention"]
    return config


REFUSED: dict[str, tuple[Any, dict[str, Any], str]] = {
    "no RoPE": (transformers.GPT2Config(), {"type": RopeType.yarn, "factor": 2}, "no rotary position embedding"),
    "ALiBi": (transformers.BloomConfig(), {"type": RopeType.none, "base": 5e5}, "no rotary position embedding"),
    "scaled from nobody knows where": (
        transformers.LlamaConfig(rope_scaling={"type": "linear", "factor": 4.0}),
        {"type": RopeType.yarn, "factor": 2},
        "model.rope.original_length=N",
    ),
    "a family's own": (
        transformers.LlamaConfig(rope_parameters={"rope_type": "proportional", "rope_theta": 1e4}),
        {"type": RopeType.yarn, "factor": 2},
        "of type proportional",
    ),
    "one type alone": (transformers.Phi3Config(), {"type": RopeType.yarn, "factor": 2}, "must be one of ['longrope']"),
    "windows alone": (windows_alone(), {"type": RopeType.yarn, "factor": 2}, "of kind sliding_attention alone"),
    "an option that transformers does not read": (
        transformers.Gemma3TextConfig(), {"type": RopeType.yarn, "factor": 2, "truncate": False}, "does not read it"
    ),
    "divisors that do not fit": (
        llama(),
        {"type": RopeType.longrope, "factor": 2, "short_factor": [1.0], "long_factor": [2.0] * 64},
        "turns 64 pairs",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_a_family_that_cannot_be_extended_so_is_refused(case: str) -> None:
    config, options, said = REFUSED[case]
    with pytest.raises(UserError, match=r"model\.rope\.") as refusal:
        extend(config, RopeConfig(**options))
    assert said in str(refusal.value)


def test_a_model_whose_code_does_not_heed_the_parameters_is_refused() -> None:
    config = scaled("yarn", factor=4)
    model = built(config)
    check_heeded(model, RopeConfig(type=RopeType.yarn, factor=4))
    next(rotary(model))[2].mul_(1.001)
    with pytest.raises(UserError, match="does not compute its positions by it"):
        check_heeded(model, RopeConfig(type=RopeType.yarn, factor=4))


def test_a_scaled_model_is_scaled_from_its_first_length_and_not_twice() -> None:
    config = scaled("yarn", factor=4)
    assert (config.max_position_embeddings, longest_of(config)) == (16384, 16384)
    extend(config, RopeConfig(type=RopeType.yarn, factor=8))
    assert config.to_dict() == scaled("yarn", factor=8).to_dict()
    extend(config, RopeConfig(type=RopeType.none))
    assert config.to_dict() == llama().to_dict()
    old = transformers.LlamaConfig(rope_scaling={"type": "linear", "factor": 4.0}, max_position_embeddings=8192)
    extend(old, RopeConfig(type=RopeType.linear, factor=2, original_length=2048))
    assert old.rope_parameters == {"rope_type": "linear", "rope_theta": 1e4, "factor": 2}
    assert old.max_position_embeddings == 4096


@pytest.mark.parametrize(("kind", "own"), [("yarn", 512), ("dynamic", 128), ("ntk", 512)])
def test_rows_up_to_factor_times_the_length_are_taken(kind: str, own: int) -> None:
    config = scaled(kind, factor=4, length=128)
    assert config.max_position_embeddings == own  # transformers' formula for dynamic begins at it
    check_length(config, 512)
    with pytest.raises(UserError, match="at most 512"):
        check_length(config, 513)


@pytest.mark.parametrize("weights", [Dtype.bf16, Dtype.bf16_sr, Dtype.fp32])
def test_angles_of_neighbours_far_out_differ_in_narrow_weights(weights: Dtype) -> None:
    cfg = load(["model.max_length=8192", "model.rope.type=yarn", "model.rope.factor=16"])
    config = model_config(cfg.model, TOKENIZER, 64)
    model = build_model(cfg.model, config, weights=weights, device=torch.device("cpu"), seed=0, length=256)
    ((module, _, held),) = rotary(model)
    assert held.dtype == torch.float32
    angles = [module(torch.zeros(1, 1, 1), torch.tensor([[at]]))[0] for at in (100_000, 100_001)]
    assert not torch.equal(*angles)
    with pytest.raises(AssertionError, match="angles would be rounded"):
        check_heeded(model.to(torch.bfloat16), cfg.model.rope)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["factor=4"], "has no effect with model.rope.type=keep; use model.rope.type=linear or"),
        (["type=linear", "factor=4", "beta_fast=32"], "use model.rope.type=yarn, or leave it out"),
        (["type=yarn", "factor=4", "low_freq_factor=1"], "use model.rope.type=llama3"),
        (["type=yarn", "factor=0.5"], "must be at least 1"),
        (["type=yarn", "factor=nan"], "must be a finite number"),
        (["type=yarn"], "needs model.rope.factor, model.rope.factor=8 for data.sequence_length=512 over its 64 tokens"),
        (["type=yarn", "factor=4"], "model.rope.factor=4); use data.sequence_length=256 or less, model.max_length=512, "
         "or model.rope.factor=8"),
        ([], "or extend it, as with model.rope.type=yarn model.rope.factor=8"),
        (["type=yarn", "factor=8", "beta_fast=1", "beta_slow=4"], "must be above model.rope.beta_slow=4"),
        (["type=yarn", "factor=8", "mscale=1"], "has no effect alone"),
        (["type=yarn", "factor=8", "mscale=1", "mscale_all_dim=1", "attention_factor=1.1"], "leave one of them out"),
        (["type=yarn", "factor=1", "beta_fast=20"], "has no effect with model.rope.factor=1"),
        (["type=llama3", "factor=8", "low_freq_factor=4", "high_freq_factor=4"], "between 0 and the second"),
        (["type=longrope", "factor=8"], "needs a list of divisors above 0"),
        (["type=longrope", "factor=8", "short_factor=[1,1]", "long_factor=[2,2]"], "turns 32 pairs"),
        (["type=none", "factor=8", "base=500000"], "has model.rope_theta=10000; set that"),
        (["type=ntk", "factor=8", "original_length=64"], "has model.max_length=64; set that"),
        (["type=ntk", "factor=8", "base=0.5"], "must be above 1"),
        (["tpye=yarn"], "did you mean model.rope.type"),
        (["type=yran"], "did you mean yarn"),
    ],
)  # fmt: skip
def test_a_contradiction_is_told_before_anything_is_built(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError) as refusal:
        load(["model.max_length=64", "data.sequence_length=512", *(f"model.rope.{each}" for each in overrides)])
    assert said in str(refusal.value)
