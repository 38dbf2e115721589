"""Linear attention as a model's layer calls it: over whole rows, over rows that ranks share, and token by token.

For backward it keeps q, k and v alone and computes everything else again. Where flash-linear-attention is installed and
takes them, its kernels compute what is within rows (`parallel/sequence/fused.py`). An exported model takes this file
along; it needs torch, and the files it imports.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function

from parallel.sequence.fused import kernel_for
from parallel.sequence.recurrence import (
    NOBODY,
    Spans,
    Weights,
    attend,
    attend_backward,
    running_sums,
    spans_of,
    weights_of,
)


class Shared(Protocol):
    """How rows are computed whose tokens several ranks hold."""

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None, *, causal: bool
    ) -> Tensor:
        """As `linear_attention`, of this rank's tokens."""
        ...


def linear_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, *,
    decay: Tensor | None = None, causal: bool = True, sequence: Shared | None = None,
) -> Tensor:  # fmt: skip
    """Return o_i = q_i S_i with S_i = a_i S_(i-1) + k_i^T v_i, each document from a state of 0; differentiable.

    Args:
        q: (batch, heads, tokens, width), with feature map and scale applied.
        k: (batch, key heads, tokens, width); v: (batch, key heads, tokens, width of values).
        positions: (batch, tokens) int64, within documents: one begins wherever they do not go on by one.
        decay: log a, at most 0, (key heads,), or (batch, key heads, tokens) with a gradient; None: a = 1.
        causal: otherwise o_i = q_i times the sum of all k^T v of the document; without decay.
        sequence: given where the tokens are this rank's of rows that several share.

    Returns:
        (batch, heads, tokens, width of values) in the dtype of q.
    """
    if has_torch_function((q, k, v)):  # so that rules of fates know it by name
        return handle_torch_function(  # type: ignore[no-any-return]
            linear_attention, (q, k, v), q, k, v, positions, decay=decay, causal=causal, sequence=sequence
        )
    assert causal or decay is None, "a decay without an order of tokens means nothing"
    kind = q.device.type
    if torch.is_autocast_enabled(kind) and q.dtype is not torch.float64:  # as for torch's own attention
        q, k, v = (x.to(torch.get_autocast_dtype(kind)) for x in (q, k, v))
    if sequence is not None:
        return sequence.recur(q, k, v, positions, decay, causal=causal)
    return LinearAttention.apply(q, k, v, positions, decay, causal)  # type: ignore[no-any-return, no-untyped-call]


class LinearAttention(torch.autograd.Function):
    """Whole rows on one device."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None, causal: bool
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, positions, decay)
        ctx.causal = causal
        return within(q, k, v, spans_of(positions, decay), causal).to(q.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, positions, decay = ctx.saved_tensors
        found = within_backward(grad, q, k, v, spans_of(positions, decay), ctx.causal, ctx.needs_input_grad[4])
        gradients = narrowed(found, (q, k, v, decay))
        return *gradients[:3], None, gradients[3], None


def within(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> Tensor:
    """Attention of documents as far as they are here, by flash-linear-attention or blocks; in fp32 or fp64, or as the
    kernel gives it."""
    kernel = kernel_for(q, k, v, causal)
    return kernel(q, k, v, spans) if kernel else attend(q, k, v, spans, causal)


def within_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool, of_decay: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Gradients of q, k and v, and `of_decay` where tokens have one. A kernel runs its forward again, and keeps nothing
    in between."""
    kernel = kernel_for(q, k, v, causal)
    if kernel is None:
        dq, dk, dv = attend_backward(grad, q, k, v, spans, causal)
        if not of_decay:
            return dq, dk, dv, None
        begins = torch.ones(len(q), dtype=torch.bool, device=q.device)
        return dq, dk, dv, decay_gradient(log_gradient(q, dq, k, dk), spans.document, begins)
    with torch.enable_grad():
        decay = spans.decay.detach().requires_grad_(of_decay) if spans.decay is not None else None
        inputs = [x.detach().requires_grad_() for x in (q, k, v)]
        out = kernel(inputs[0], inputs[1], inputs[2], spans._replace(decay=decay))
        wanted = [*inputs, decay] if of_decay and decay is not None else inputs
    dq, dk, dv, *rest = torch.autograd.grad(out, wanted, grad.to(out.dtype))
    return dq, dk, dv, rest[0] if rest else None


def narrowed(gradients: Sequence[Tensor | None], of: Sequence[Tensor | None]) -> list[Tensor | None]:
    """Gradients in the dtype of what they are of."""
    pairs = zip(gradients, of, strict=True)
    return [None if gradient is None or x is None else gradient.to(x.dtype) for gradient, x in pairs]


def log_gradient(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor) -> Tensor:
    """Gradient of the logarithms that weights exp(log_i - log_j) of pairs are made of, (batch, key heads, tokens)."""
    wide = torch.promote_types(q.dtype, torch.float32)
    of_queries = torch.unflatten((q.to(wide) * dq).sum(-1), 1, (k.shape[1], -1)).sum(2)
    return of_queries - (k.to(wide) * dk).sum(-1)


def decay_gradient(d_log: Tensor, document: Tensor, begins: Tensor) -> Tensor:
    """Gradient of each token's decay from that of sums of logarithms, (batch, key heads, tokens).

    Args:
        begins: (batch,) bool, whether the first document begins with these tokens: nothing is left at its first.
    """
    new = torch.cat([begins[:, None], document[:, 1:] != document[:, :-1]], dim=1)
    return running_sums(d_log, document, backward=True).masked_fill(new[:, None], 0.0)


def edges_of(spans: Spans, before: Tensor, after: Tensor, wide: torch.dtype) -> Weights:
    """Weights of all tokens here as one block.

    Args:
        before, after: (batch,) bool, whether the first document began before these tokens and the last goes on.
    """
    first, last = spans.document[:, 0], spans.document[:, -1]
    return weights_of(spans, 1, first.where(before, NOBODY), last.where(after, NOBODY), wide)


def put_in(k: Tensor, v: Tensor, give: Tensor, keys: int) -> Tensor:
    """Sum k^T v over tokens with weights `give` of `Weights`, and over the heads that share one of `keys`.

    Args:
        k, v: (batch, heads, tokens, width).

    Returns:
        (batch, keys, width of k, width of v), in the dtype of `give`.
    """
    k, v = (torch.unflatten(x.to(give.dtype), 1, (keys, -1)) for x in (k, v))
    return (k * give[..., None]).flatten(2, 3).transpose(-1, -2) @ v.flatten(2, 3)


def read_out(q: Tensor, state: Tensor, take: Tensor) -> Tensor:
    """What queries (batch, heads, tokens, width) read of a state with weights `take`, as wide as its values."""
    grouped = torch.unflatten(q.to(take.dtype), 1, (state.shape[1], -1))
    return ((grouped @ state[:, :, None]) * take[..., None]).flatten(1, 2)


def linear_attention_step(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, state: Tensor | None, *, decay: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """As `linear_attention` over tokens that go on from a state, for generation.

    Args:
        state: (batch, key heads, width, width of values) in fp32 or fp64, which the first document goes on from unless
            it begins here, at position 0; None: nothing came before.

    Returns:
        The output, and the state after the last token.

    Raises:
        ValueError: gradients are asked for through a state.
    """
    if state is not None and torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        raise ValueError("a cache of states is for generation, under torch.no_grad(); train with use_cache=False")
    out = linear_attention(q, k, v, positions, decay=decay)
    with torch.no_grad():
        spans, wide = spans_of(positions, decay), torch.promote_types(q.dtype, torch.float32)
        edges = edges_of(spans, positions[:, 0] > 0, positions[:, -1] >= 0, wide)
        left = put_in(k, v, edges.after, k.shape[1])
        if state is not None:
            out = out + read_out(q, state, edges.carry).to(out.dtype)
            left = left + edges.through[..., None] * state
    return out, left
