"""A LLaMA by its sizes alone: names and shapes of its parameters, without weights, files or transformers."""

from trainer.schema import LinearKind, ModelConfig

ROUND_VOCABULARY = 8
"""A vocabulary is rounded up to a multiple of this, so that rows of logits stay aligned for the kernels."""
BYTES_VOCABULARY = 259
"""Of the byte tokenizer: 256 bytes and three special tokens."""


def llama_shapes(model: ModelConfig, vocabulary: int) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters of a LLaMA in transformers' order and names; a tied head once."""
    hidden, inner, layers, heads = model.hidden_size, model.intermediate_size, model.layers, model.heads
    assert hidden and inner and layers and heads, "sizes are checked before"
    keys = model.kv_heads or heads
    narrow = hidden // heads * keys
    attention = {
        "self_attn.q_proj.weight": (hidden, hidden),
        "self_attn.k_proj.weight": (narrow, hidden),
        "self_attn.v_proj.weight": (narrow, hidden),
        "self_attn.o_proj.weight": (hidden, hidden),
    }
    gates = {"self_attn.gate": (keys, hidden), "self_attn.gate_bias": (keys,)}
    linear = (gates if model.linear is LinearKind.gated else {}) | attention
    linear |= {"self_attn.norm.weight": (hidden // heads,)}
    rest = {
        "mlp.gate_proj.weight": (inner, hidden),
        "mlp.up_proj.weight": (inner, hidden),
        "mlp.down_proj.weight": (hidden, inner),
        "input_layernorm.weight": (hidden,),
        "post_attention_layernorm.weight": (hidden,),
    }
    shapes: list[tuple[str, tuple[int, ...]]] = [("model.embed_tokens.weight", (vocabulary, hidden))]
    for layer in range(layers):
        softmax = model.linear is LinearKind.none or (layer + 1) % (model.softmax_every or layers + 1) == 0
        block = (attention if softmax else linear) | rest
        shapes += [(f"model.layers.{layer}.{name}", shape) for name, shape in block.items()]
    shapes.append(("model.norm.weight", (hidden,)))
    return shapes if model.tie_embeddings else [*shapes, ("lm_head.weight", (vocabulary, hidden))]


def vocabulary_of(model: ModelConfig, tokenizer: str) -> int | None:
    """Rows of the embedding; None where only the tokenizer's files could tell."""
    if model.vocab_size is not None or tokenizer != "byte":
        return model.vocab_size
    return -(-BYTES_VOCABULARY // ROUND_VOCABULARY) * ROUND_VOCABULARY
