"""A LLaMA whose attention is linear, in all layers or in all but every N-th: a model of transformers' own kind.

Norms, MLP, rotary embedding, cache and softmax layers are transformers' LLaMA. A linear layer has the same four
matrices; with features phi(x) = elu(x) + 1 (Katharopoulos et al. 2020, arXiv:2006.16236), each key head carries a state
of width x width along a document, which the heads that share it read:

    S_i = a_i S_(i-1) + phi(k_i)^T v_i,       o_i = norm(phi(q_i) S_i)

rotated after phi (RoFormer, arXiv:2104.09864, section 3.3) and with an RMSNorm of each head in place of a denominator
(Qin et al. 2022, arXiv:2210.10340). Features are positive whatever the kind: of signed ones, as some of the papers
have, what a document's first token reads of itself may be next to nothing, which the norm blows up. Kinds differ in a:
see `linear_config`.

An exported model takes this file along, so that others can open it with trust_remote_code=True.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import elu, linear, logsigmoid
from transformers import initialization
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationConfig, GenerationMixin
from transformers.masking_utils import create_causal_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaMLP,
    LlamaRMSNorm,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)
from transformers.utils import can_return_tuple
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from parallel.sequence.linear import linear_attention, linear_attention_step
from trainer.linear_config import LINEAR, SOFTMAX, LinearLlamaConfig, head_decays, kinds

GATE_POWER = 16
"""Root that gates are taken of, so that a state lasts for some tens of tokens at first."""


class LinearLlamaAttention(nn.Module):
    """Linear attention with LLaMA's matrices. Key heads have states, which all heads that share them read."""

    def __init__(self, config: LinearLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        self.config, self.layer_idx, self.kind = config, layer_idx, config.linear_attention
        self.head_dim: int = config.head_dim  # type: ignore[assignment]
        self.is_causal = True
        hidden, bias = config.hidden_size, config.attention_bias
        queries, keys = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(hidden, queries, bias=bias)
        self.k_proj = nn.Linear(hidden, keys, bias=bias)
        self.v_proj = nn.Linear(hidden, keys, bias=bias)
        self.o_proj = nn.Linear(queries, hidden, bias=bias)
        self.norm = LlamaRMSNorm(self.head_dim, eps=config.rms_norm_eps)
        gated = self.kind == "gated"  # parameters of their own: a few rows, which neither low-rank nor 8 bits are for
        self.gate = nn.Parameter(torch.empty(config.num_key_value_heads, hidden)) if gated else None
        self.gate_bias = nn.Parameter(torch.empty(config.num_key_value_heads)) if gated else None

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        sequence: Any = None,
        **kwargs: Any,
    ) -> tuple[Tensor, None]:
        """Attend as transformers' attention modules do.

        Args:
            attention_mask: (batch, tokens), 0 where a token is padding and leaves nothing.
            position_ids: (batch, tokens), within documents.
            sequence: of a trainer whose ranks share rows.
        """
        shape = (*hidden_states.shape[:-1], -1, self.head_dim)
        q, k, v = (
            project(hidden_states).view(shape).transpose(1, 2) for project in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = apply_rotary_pos_emb(elu(q) + 1, elu(k) + 1, *position_embeddings)
        if attention_mask is not None:
            v = v * attention_mask[:, None, :, None].to(v.dtype)
        assert position_ids is not None, "the model makes them where nobody gives any"
        positions = position_ids.expand(len(q), -1)
        options = {"decay": self.decay(hidden_states)}
        if past_key_values is None:
            out = linear_attention(q, k, v, positions, causal=self.is_causal, sequence=sequence, **options)
        else:
            held = past_key_values.layers[self.layer_idx]
            before = held.recurrent_states[0] if held.has_previous_state[0] else None
            out, state = linear_attention_step(q, k, v, positions, before, **options)
            held.update_recurrent_state(state)
            held.has_previous_state[0] = True
        out = self.norm(out.transpose(1, 2)).flatten(2)
        return self.o_proj(out), None

    def decay(self, hidden_states: Tensor) -> Tensor | None:
        """Logarithms of decays, of key heads, or of tokens too (batch, key heads, tokens)."""
        if self.gate is not None:
            gates = linear(hidden_states, self.gate, self.gate_bias)
            return logsigmoid(gates.to(torch.promote_types(gates.dtype, torch.float32))).transpose(1, 2) / GATE_POWER
        heads, layers = self.config.num_key_value_heads, self.config.num_hidden_layers
        return head_decays(self.kind, heads, self.layer_idx, layers, hidden_states.device)


class LinearLlamaDecoderLayer(GradientCheckpointingLayer):  # type: ignore[misc]
    """A LLaMA block with attention of the kind that its layer has."""

    def __init__(self, config: LinearLlamaConfig, layer_idx: int) -> None:
        super().__init__()
        of_kind = LinearLlamaAttention if kinds(config)[layer_idx] == LINEAR else LlamaAttention
        self.self_attn = of_kind(config, layer_idx)
        self.mlp = LlamaMLP(config)
        self.input_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.post_attention_layernorm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(self.input_layernorm(hidden_states), **kwargs)
        hidden_states = hidden_states + attended
        out: Tensor = hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
        return out


class StateCache(DynamicCache):  # type: ignore[misc]
    """States alone, which do not know how many tokens they are of."""

    is_compileable = False

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config=config)
        self.tokens = 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self.tokens

    def reset(self) -> None:
        super().reset()
        self.tokens = 0


def cache_of(config: LinearLlamaConfig) -> Cache:
    """An empty cache: states, and keys and values of softmax layers, which then count the tokens."""
    return DynamicCache(config=config) if SOFTMAX in kinds(config) else StateCache(config)


class LinearLlamaPreTrainedModel(PreTrainedModel):  # type: ignore[misc]
    config_class = LinearLlamaConfig
    config: LinearLlamaConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["LinearLlamaDecoderLayer"]
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_attention_backend = True
    _is_stateful = True
    _can_set_attn_implementation_cached_value = True  # transformers looks for its interface in this file
    _can_record_outputs = {"hidden_states": LinearLlamaDecoderLayer, "attentions": LlamaAttention}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, LinearLlamaAttention) and module.gate is not None:
            initialization.normal_(module.gate, mean=0.0, std=self.config.initializer_range)
            initialization.zeros_(module.gate_bias)


class LinearLlamaModel(LinearLlamaPreTrainedModel):
    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([LinearLlamaDecoderLayer(config, i) for i in range(config.num_hidden_layers)])
        self.norm = LlamaRMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LlamaRotaryEmbedding(config)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults  # type: ignore[untyped-decorator]
    @capture_outputs  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return hidden states; arguments as of transformers' `LlamaModel`."""
        hidden_states = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        if use_cache and past_key_values is None:
            past_key_values = cache_of(self.config)
        tokens = hidden_states.shape[1]
        if position_ids is None:
            before = past_key_values.get_seq_length() if past_key_values is not None else 0
            position_ids = torch.arange(before, before + tokens, device=hidden_states.device)[None]
        masks: dict[str, Any] = {LINEAR: padding_of(attention_mask, tokens)}
        if SOFTMAX in kinds(self.config):
            masks[SOFTMAX] = create_causal_mask(
                config=self.config, inputs_embeds=hidden_states, attention_mask=attention_mask,
                past_key_values=past_key_values, position_ids=position_ids,
            )  # fmt: skip
        embeddings = self.rotary_emb(hidden_states, position_ids)
        for kind, layer in zip(kinds(self.config), self.layers, strict=True):
            hidden_states = layer(
                hidden_states,
                attention_mask=masks[kind],
                position_ids=position_ids,
                position_embeddings=embeddings,
                past_key_values=past_key_values,
                **kwargs,
            )
        if isinstance(past_key_values, StateCache):
            past_key_values.tokens += tokens
        return BaseModelOutputWithPast(last_hidden_state=self.norm(hidden_states), past_key_values=past_key_values)


def padding_of(attention_mask: Tensor | None, tokens: int) -> Tensor | None:
    """The part of a mask (batch, tokens so far) that is of the tokens at hand."""
    return None if attention_mask is None else attention_mask[:, -tokens:]


class LinearLlamaForCausalLM(LinearLlamaPreTrainedModel, GenerationMixin):  # type: ignore[misc]
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: LinearLlamaConfig) -> None:
        super().__init__(config)
        self.model = LinearLlamaModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    @can_return_tuple  # type: ignore[untyped-decorator]
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return logits and, where labels are given, the loss; arguments as of transformers' `LlamaForCausalLM`."""
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(out.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=out.past_key_values,
            hidden_states=out.hidden_states,
            attentions=out.attentions,
        )

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *rest: Any, **options: Any
    ) -> None:
        """`generate` asks its cache for the number of tokens."""
        asked = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if asked and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = cache_of(self.config)
            return
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *rest, **options)
