"""Whether a model can be extended as `model.rope` asks, by its sizes or its config.json alone. No torch."""

import math

from trainer.check_model import file_rope, is_read, length_before
from trainer.rope.config import RopeType, original_length, unknown_original
from trainer.schema import ModelConfig


def rope_problems(model: ModelConfig, length: int) -> list[str]:
    """Hold `model.rope` against the model it is for.

    Args:
        length: tokens in a row.
    """
    rope = model.rope
    if rope.type is RopeType.keep or rope.problems():
        return []
    asked, found = f"model.rope.type={rope.type.value}", []
    held, before = file_rope(model), length_before(model)
    if not is_read(model):
        found += new_problems(model)
    if rope.type is not RopeType.none and rope.factor is None:
        original = rope.original_length or original_length(held, before)
        found.append(f"{asked}: needs model.rope.factor, {factor_text(original, length)}")
    if before is not None and rope.original_length is None and original_length(held, before) is None:
        found.append(unknown_original(asked, held))
    return found


def new_problems(model: ModelConfig) -> list[str]:
    """A model from sizes has its length and base by names of their own."""
    rope, found = model.rope, []
    for name, own in (("original_length", "max_length"), ("base", "rope_theta")):
        if getattr(rope, name) is not None:
            found.append(
                f"model.rope.{name}={getattr(rope, name):g}: has no effect with model={model.name}, which has "
                f"model.{own}={getattr(model, own):g}; set that"
            )
    pairs = (model.hidden_size or 0) // (model.heads or 1) // 2
    for name in ("short_factor", "long_factor") if rope.type is RopeType.longrope else ():
        if len(getattr(rope, name)) != pairs:
            found.append(
                f"model.rope.{name}: has {len(getattr(rope, name))} divisors, and a head of model.hidden_size="
                f"{model.hidden_size} and model.heads={model.heads} turns {pairs} pairs; give one for each"
            )
    return found


def factor_text(original: int | None, length: int) -> str:
    """Say which factor rows of `length` tokens need."""
    if original is None:
        return "the new length over the original one"
    if length <= original:
        return f"the new length over the model's {original} tokens, such as model.rope.factor=4"
    return (
        f"model.rope.factor={math.ceil(length / original)} for data.sequence_length={length} over its {original} tokens"
    )
