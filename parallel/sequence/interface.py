"""Attention of transformers models over split rows: one function under a name of its own.

`model(..., sequence=Share(strategy, layout))` hands it to every attention, as any keyword that a model does not know.
A name unknown to transformers' mask interface means that no mask is built: documents are the layout's matter.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function

from parallel.sequence.layout import Layout
from parallel.sequence.strategy import Strategy, WithStates

NAME = "stowage_sequence"
"""Under which transformers finds it."""

CHANGES_SCORES = ("softcap", "s_aux", "sinks", "head_mask", "alibi", "position_bias", "attention_bias")
"""What attention modules pass that changes a score or a sum, and is not computed here."""


class Unsupported(ValueError):
    """A model's attention asks for what no strategy computes."""


@dataclass(frozen=True)
class Share:
    """What attention needs to know of the micro-batch: where its tokens lie, and how to reach the others."""

    strategy: Strategy
    layout: Layout

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None, *, causal: bool
    ) -> Tensor:
        """Linear attention of this rank's tokens (`linear.Shared`)."""
        if not isinstance(self.strategy, WithStates):
            raise Unsupported("linear attention was not expected in this model: no states are handed on")
        return self.strategy.recur(q, k, v, positions, decay, self.layout, causal=causal)


def register() -> None:
    """Make the function known to transformers."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention)


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    sequence: Share | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attend as transformers' own functions do, over whole rows.

    Args:
        query: (batch, heads, tokens of this rank, width); key, value: (batch, key heads, tokens of this rank, width).

    Returns:
        (batch, tokens of this rank, heads, width), and no weights.

    Raises:
        Unsupported: the module asks for more than softmax attention over documents.
    """
    name = type(module).__name__
    if sequence is None:
        raise Unsupported(f"{name} is not told where its tokens lie: its model does not pass keywords on")
    asked = [option for option in CHANGES_SCORES if options.get(option) is not None]
    if attention_mask is not None:
        asked.append("attention_mask")
    if dropout:
        asked.append("dropout")
    if sliding_window is not None and sliding_window < sequence.layout.length:
        asked.append(f"sliding_window={sliding_window}")
    if asked:
        raise Unsupported(f"{name} asks for {', '.join(asked)}, which split rows do not have")
    kind = query.device.type
    if torch.is_autocast_enabled(kind) and query.dtype is not torch.float64:  # as it casts for torch's own attention
        narrow = torch.get_autocast_dtype(kind)
        query, key, value = query.to(narrow), key.to(narrow), value.to(narrow)
    scale = scaling if scaling is not None else query.shape[-1] ** -0.5
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    out = scaled_dot_product_attention(query, key, value, sequence, causal=bool(causal), scale=float(scale))
    return out.transpose(1, 2).contiguous(), None


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, share: Share, *, causal: bool, scale: float
) -> Tensor:
    """`Strategy.attend`, as a function that rules of fates know: by the name of torch's, which it stands for, so that
    they mean the same whether rows are split or not."""
    if has_torch_function((q, k, v)):
        return handle_torch_function(  # type: ignore[no-any-return]
            scaled_dot_product_attention, (q, k, v), q, k, v, share, causal=causal, scale=scale
        )
    return share.strategy.attend(q, k, v, share.layout, causal=causal, scale=scale)
