"""A transformers configuration with other rotary positions: what is built from it, exported and opened has them."""

from typing import Any

import transformers

from trainer.errors import UserError, first_line
from trainer.rope.config import OWN, RopeConfig, RopeType, kind_of, original_length, unknown_original
from trainer.rope.frequencies import BY_LENGTH, frequencies

OF_SCALING = {
    "type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings",
    *(name for names in OWN.values() for name in names),
}  # fmt: skip
"""Keys of `rope_parameters` that say how it is scaled; others (the share of a head that turns, say) stay."""
KNOWN = ("default", "linear", "dynamic", "yarn", "llama3", "longrope")
"""Types that can be replaced; others, as `proportional`, are parts of a family's architecture."""
GLOBAL = "full_attention"
"""Layers that are scaled in a family with parameters of their own for each kind; those that see a window stay."""


def extend(config: transformers.PretrainedConfig, rope: RopeConfig) -> None:
    """Write `rope` into `config`, in place: `rope_parameters`, and `max_position_embeddings` as what it takes then.

    Raises:
        UserError: the family has no RoPE, or one that cannot be scaled so.
    """
    if rope.type is RopeType.keep:
        return
    text, asked = config.get_text_config(), f"model.rope.type={rope.type.value}"
    held = scalable(text, rope)
    original = rope.original_length or original_length(held, getattr(text, "max_position_embeddings", None))
    if original is None:
        raise UserError(unknown_original(asked, held))
    made = {key: value for key, value in held.items() if key not in OF_SCALING}
    made |= parameters(rope, original, rope.base or float(held["rope_theta"]), turned(text, held))
    label = global_label(text)
    text.rope_parameters = {**text.rope_parameters, label: made} if label else made
    text.max_position_embeddings = original if made["rope_type"] == "dynamic" else round(original * rope.times)
    if hasattr(text, "original_max_position_embeddings"):  # Phi-3: transformers lets it overrule that in the dictionary
        text.original_max_position_embeddings = original
    try:
        text.validate_rope()  # some families take one type alone, which an export would find out
        frequencies(text, label)
    except (TypeError, ValueError, ZeroDivisionError, RuntimeError, AttributeError) as error:
        raise UserError(
            f"{asked}: is not to be had for {type(config).__name__} ({first_line(error)}); choose "
            "another type, or leave model.rope out"
        ) from error


def scalable(text: Any, rope: RopeConfig) -> dict[str, Any]:
    """Return the parameters that a scaling replaces.

    Raises:
        UserError: there are none of a known kind, or `rope` has options that they cannot have.
    """
    name, asked = type(text).__name__, f"model.rope.type={rope.type.value}"
    if not getattr(text, "rope_parameters", None):
        raise UserError(
            f"{asked}: {name} has no rotary position embedding that transformers' rope_parameters describe; leave "
            "model.rope out, or take a model that has one (LLaMA, Mistral, Qwen, Gemma, ...)"
        )
    held = global_parameters(text)
    if not held or kind_of(held) not in KNOWN:
        what = f"of type {kind_of(held)}" if held else f"for layers of kind {', '.join(text.rope_parameters)} alone"
        raise UserError(f"{asked}: {name} has a rotary position embedding {what}; leave model.rope out")
    if global_label(text) and rope.truncate is not None:
        raise UserError(
            f"model.rope.truncate: transformers does not read it for {name}, whose kinds of layers have parameters of "
            "their own; leave it out"
        )
    pairs = turned(text, held) // 2
    if rope.type is RopeType.longrope and any(
        len(each or ()) != pairs for each in (rope.short_factor, rope.long_factor)
    ):
        raise UserError(
            f"{asked}: {name} turns {pairs} pairs of a head; give as many divisors in model.rope.short_factor and in "
            "model.rope.long_factor"
        )
    return held


def parameters(rope: RopeConfig, original: int, base: float, width: int) -> dict[str, Any]:
    """Return `rope_parameters` of a scaling.

    Args:
        width: values of a head that are turned.
    """
    factor = rope.times
    if rope.type is RopeType.none or (factor == 1 and rope.type is not RopeType.longrope):
        return {"rope_type": "default", "rope_theta": base}
    if rope.type is RopeType.ntk:  # bloc97's "NTK-aware scaled RoPE": no type of transformers', since it is a base
        return {"rope_type": "default", "rope_theta": base * factor ** (width / (width - 2))}
    made: dict[str, Any] = {"rope_type": rope.type.value, "rope_theta": base, "factor": factor}
    if rope.type in (RopeType.yarn, RopeType.llama3, RopeType.longrope):
        made["original_max_position_embeddings"] = original
    if rope.type is RopeType.llama3:
        made |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    own = {name: getattr(rope, name) for name in OWN.get(rope.type, ())}
    return made | {name: value for name, value in own.items() if value is not None}


def turned(config: Any, held: dict[str, Any]) -> int:
    """Values of a head that are turned, as transformers counts them."""
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(head * held.get("partial_rotary_factor", 1.0))


def longest_of(config: transformers.PretrainedConfig) -> int | None:
    """Return the most tokens that a model of `config` takes; None: it does not say."""
    text = config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None)
    return RopeConfig().longest(longest, global_parameters(text))


def global_label(text: Any) -> str | None:
    """The kind of layer that is scaled; None where all have the same parameters."""
    return GLOBAL if text.nested_rope_parameter_keys(getattr(text, "rope_parameters", None) or {}) else None


def global_parameters(text: Any) -> dict[str, Any]:
    """`rope_parameters` of the layers that see everything; empty where there are none."""
    held = getattr(text, "rope_parameters", None) or {}
    return held.get(GLOBAL) or {} if global_label(text) else held


def rope_text(config: transformers.PretrainedConfig, rope: RopeConfig, length: int) -> str | None:
    """Say how positions are scaled; None where they are those the model was first trained with.

    Args:
        config: with `rope` in it.
        length: tokens in a row.
    """
    text = config.get_text_config()
    held = global_parameters(text)
    kind = kind_of(held)
    if kind not in KNOWN or (kind == "default" and rope.type is RopeType.keep):
        return None
    _, attention = frequencies(text, global_label(text), length)
    longest, factor = longest_of(config) or 0, float(held.get("factor") or rope.times)
    said = [f"{longest:,} tokens" + (f", {factor:g} times {longest / factor:,.0f}" if factor > 1 else "")]
    said += [f"base {float(held['rope_theta']):,.0f}"]
    said += [f"cosines and sines times {attention:.4g}"] if attention != 1 else []
    said += [f"frequencies for rows of {length:,}"] if kind in BY_LENGTH else []
    return f"RoPE, {kind if rope.type is RopeType.keep else rope.type.value}: {'; '.join(said)}"
