"""A LLaMA by its sizes alone: names and shapes of its parameters, without weights, files or transformers."""

from trainer.schema import ModelConfig

ROUND_VOCABULARY = 8
"""A vocabulary is rounded up to a multiple of this, so that rows of logits stay aligned for the kernels."""
BYTES_VOCABULARY = 259
"""Of the byte tokenizer: 256 bytes and three special tokens."""


def llama_shapes(model: ModelConfig, vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters of a LLaMA in transformers' order and names; a tied head once."""
    hidden, inner, layers, heads = model.hidden_size, model.intermediate_size, model.layers, model.heads
    assert hidden and inner and layers and heads, "sizes are checked before"
    narrow = hidden // heads * (model.kv_heads or heads)
    block = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (narrow, hidden),
        "self_attn.v_proj": (narrow, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        shapes += [(f"model.layers.{layer}.{name}.weight", shape) for name, shape in block.items()]
    shapes.append(("model.norm.weight", (hidden,)))
    return shapes if model.tie_embeddings else [*shapes, ("lm_head.weight", (vocabulary, hidden))]


def vocabulary_of(model: ModelConfig, tokenizer: str) -> int | None:
    """Rows of the embedding; None where only the tokenizer's files could tell."""
    if model.vocab_size is not None or tokenizer != "byte":
        return model.vocab_size
    return -(-BYTES_VOCABULARY // ROUND_VOCABULARY) * ROUND_VOCABULARY
