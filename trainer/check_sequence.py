"""Whether a model's attention can be computed over rows that several ranks share, by what its configuration says."""

from typing import Any

import transformers

from parallel.config import SequenceKind
from parallel.sequence.strategy import cut_of
from trainer.check_ranks import no_states
from trainer.errors import UserError
from trainer.schema import Attention, Config

HEAD_KEYS = ("num_attention_heads", "n_head")
LINEAR = "linear_attention"
"""transformers' name for layers with a state."""
NOT_OF_BLOCKS = ("classifier", "summary")
"""Heads of other tasks have dropouts in the same configuration."""


def check_attention(cfg: Config, config: Any, ranks: int) -> tuple[int, int]:
    """Return the model's heads and key heads.

    Args:
        config: of transformers, of the part that reads text.

    Raises:
        UserError: with everything that cannot be had at this degree.
    """
    heads, key_heads = heads_of(config)
    asked = f"parallel.sequence={cfg.parallel.sequence.value}"
    if cfg.parallel.sequence is SequenceKind.lasp2 and not linear_layers(config):
        raise UserError(no_states(type(config).__name__))
    found = [f"{asked}: {what}" for what in (*window_problems(cfg, config), *score_problems(config))]
    if not heads:
        found.append(f"{asked}: {type(config).__name__} does not say how many heads its attention has; use none")
    elif not found:
        found += head_problems(cfg, ranks, heads, key_heads)
    dropouts = dropouts_of(config)
    if dropouts:
        named = ", ".join(f"{name}={rate:g}" for name, rate in dropouts.items())
        where = "set model.dropout=0" if cfg.model.path is None else f"set it to 0 in {cfg.model.path}/config.json"
        found.append(
            f"{asked}: the model has dropout ({named}), whose draw would depend on how many ranks share a row; {where}"
        )
    if cfg.model.attention is not Attention.sdpa:
        found.append(
            f"model.attention={cfg.model.attention.value}: has no effect with {asked}, which computes attention itself "
            "(by torch's flash kernels); leave model.attention out"
        )
    if found:
        raise UserError("\n".join(found))
    return heads, key_heads


def heads_of(config: Any) -> tuple[int, int]:
    """Heads and key heads of a model's attention; 0 where its configuration has no name for them."""
    heads = next((int(getattr(config, key)) for key in HEAD_KEYS if getattr(config, key, None)), 0)
    return heads, int(getattr(config, "num_key_value_heads", None) or heads)


def linear_layers(config: Any) -> int:
    """Layers of linear attention whose states can be handed from rank to rank: those of our own models."""
    return (config.layer_types or []).count(LINEAR) if config.model_type == "linear_llama" else 0


def head_problems(cfg: Config, ranks: int, heads: int, key_heads: int) -> list[str]:
    """An exchange of heads needs one for each rank, a cut a token for each."""
    parallel, degree, length = cfg.parallel, cfg.parallel.degree(ranks), cfg.data.sequence_length
    inner = cut_of(parallel, degree, heads, key_heads).ulysses
    found = []
    if inner > heads:
        fitting = [count for count in range(2, heads + 1) if ranks % count == 0]
        option = "ulysses_degree" if parallel.sequence is SequenceKind.usp else "sequence_degree"
        use = f"parallel.{option}={' or '.join(map(str, fitting))}, or " if fitting else ""
        found.append(
            f"parallel.sequence={parallel.sequence.value}: exchanges heads between {inner} ranks, and the model has "
            f"{heads}; use {use}parallel.sequence=ring, which takes any number"
        )
    shortest = cut_of(parallel, degree, heads, key_heads).shortest
    if length < shortest:
        found.append(
            f"data.sequence_length={length}: too short to be shared by {degree} ranks; use "
            f"data.sequence_length={shortest} or more, or a smaller parallel.sequence_degree"
        )
    return found


def window_problems(cfg: Config, config: transformers.PretrainedConfig) -> list[str]:
    """Every layer must see its whole document, by softmax attention. A window as long as the row is none."""
    kinds = set(getattr(config, "layer_types", None) or ())
    length = cfg.data.sequence_length
    found = []
    windows = {"sliding_window": {"sliding_attention"}, "attention_chunk_size": {"chunked_attention"}}
    for option, of_kinds in windows.items():
        size = getattr(config, option, None)
        used = bool(kinds & of_kinds) if kinds else getattr(config, "use_sliding_window", True)
        if isinstance(size, int) and size < length and used:
            found.append(
                f"some layers see {size} tokens alone ({option}), which is not computed over split rows; use "
                f"data.sequence_length={size} or less, or parallel.sequence=none"
            )
    others = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if linear_layers(config):
        others -= {LINEAR}
    if others:
        found.append(
            f"layers of kind {', '.join(sorted(others))} hand a state along the row, which is not split; use "
            "parallel.sequence=none"
        )
    return found


def score_problems(config: transformers.PretrainedConfig) -> list[str]:
    """Scores must be plain products, and nobody may ask for them."""
    options = {
        "attn_logit_softcapping": "caps its scores",
        "alibi": "adds a bias to its scores (ALiBi)",
        "output_attentions": "is asked for its attention weights, which are never made",
    }
    found = [
        f"the model {what} ({option}={value}); use parallel.sequence=none"
        for option, what in options.items()
        if (value := getattr(config, option, None)) not in (None, False)
    ]
    if config.model_type in ("bloom", "mpt"):
        found.append(f"the model {options['alibi']}; use parallel.sequence=none")
    return found


def dropouts_of(config: transformers.PretrainedConfig) -> dict[str, float]:
    """Every rate above 0 that a block draws with."""
    return {
        name: float(value)
        for name, value in config.to_dict().items()
        if "drop" in name and isinstance(value, float) and value > 0 and not name.startswith(NOT_OF_BLOCKS)
    }
