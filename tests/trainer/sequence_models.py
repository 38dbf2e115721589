"""Small models of many families, whose attention goes through transformers' interface or does not."""

from typing import Any

import transformers
from torch import nn

from trainer.linear_config import LinearLlamaConfig

VOCABULARY = 48
SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
GPT2: dict[str, Any] = {
    "vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64,
    "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip
SPLIT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", SMALL),
    "llama, one key head": ("LlamaConfig", SMALL | {"num_key_value_heads": 1}),
    "llama, as many key heads": ("LlamaConfig", SMALL | {"num_key_value_heads": 4}),
    "mistral": ("MistralConfig", SMALL | {"sliding_window": 4096}),
    "qwen2": ("Qwen2Config", SMALL),
    "qwen3": ("Qwen3Config", SMALL),
    "gemma": ("GemmaConfig", SMALL),
    "gpt2": ("GPT2Config", GPT2),
    "linear, gated": ("LinearLlamaConfig", SMALL | {"linear_attention": "gated"}),
    "hybrid": ("LinearLlamaConfig", SMALL | {"layer_types": ["linear_attention", "full_attention"]}),
}
"""Trained over split rows."""
LINEAR = ("linear, gated", "hybrid")
"""Those with states."""
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "sliding window": ("MistralConfig", SMALL | {"sliding_window": 8}, "see 8 tokens alone"),
    "dropout": ("GPT2Config", GPT2 | {"attn_pdrop": 0.1, "resid_pdrop": 0.2}, "resid_pdrop=0.2"),
    "capped scores": ("Gemma2Config", SMALL | {"sliding_window": 4096}, "caps its scores"),
    "ALiBi": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "hidden_dropout": 0.0},
        "ALiBi",
    ),
    "attention weights asked for": ("LlamaConfig", SMALL | {"output_attentions": True}, "attention weights"),
    "a state along the row": ("Qwen3NextConfig", SMALL | {"num_experts": 2, "num_experts_per_tok": 1}, "hand a state"),
}
"""What is in the message."""


def made(name: str, options: dict[str, Any]) -> transformers.PretrainedConfig:
    return (LinearLlamaConfig if name == "LinearLlamaConfig" else getattr(transformers, name))(**options)  # type: ignore[no-any-return]


def model_of(config: transformers.PretrainedConfig) -> nn.Module:
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")  # type: ignore[no-any-return]
