"""Exact attention over rows of which each member of a group holds some tokens, differentiable; and parts of it put
together.

A method computes blocks of it, each with the log-sum-exp of its rows, wherever their queries and keys meet. Blocks are
merged in fp32 at least:

    out <- out - sigmoid(lse_b - lse) (out - out_b)
    lse <- logaddexp(lse, lse_b)

and backward, which needs no more than the whole rows' output and log-sum-exp, adds up gradients block by block.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.sequence.cost import CostAcross
from parallel.sequence.kernels import attend, attend_backward
from parallel.sequence.layout import Tile
from parallel.sequence.once import once


class Method(NamedTuple):
    """How queries and keys of different members meet."""

    forward: Callable[..., tuple[Tensor, Tensor]]
    """(q, k, v, layout, links, causal, scale) to this member's output in the dtype of q, and the log-sum-exp of its
    queries' rows in at least fp32. q is (batch, heads, tokens of this member, width), k and v have the key heads."""
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    """(gradient of the output, q, k, v, output, log-sum-exp, and the rest as forward) to the gradients of q, k, v."""
    cost: CostAcross


class BlockwiseAttention(torch.autograd.Function):
    """Attention by a `Method`, which is not asked again for what a first run has kept."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, method: Method, *rest: Any) -> Tensor:
        out, lse = once(lambda: method.forward(q, k, v, *rest))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.method, ctx.rest = method, rest
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *ctx.method.backward(grad, q, k, v, out, lse, *ctx.rest), None, *(None for _ in ctx.rest)


def nothing_seen(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries (batch, heads, tokens, width) that have seen no key, in fp32 at least."""
    wide = torch.promote_types(q.dtype, torch.float32)
    # Tokens outermost in memory, as the next layer takes them: what is saved here is then saved once.
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=wide).transpose(1, 2)
    return out, q.new_full(q.shape[:-1], float("-inf"), dtype=wide)


def merge_(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add a block's `part` of rows (batch, heads, queries, width) to `out`, both normalised by their own sums.

    A row that has seen nothing yet has an lse of -inf and takes over the part as it is.
    """
    out.sub_(torch.sigmoid(part_lse - lse)[..., None] * (out - part))
    lse.copy_(torch.logaddexp(lse, part_lse))


def see(q: Tensor, k: Tensor, v: Tensor, tiles: list[Tile], out: Tensor, lse: Tensor, scale: float) -> None:
    """Add to `out` and `lse` what queries see of these keys."""
    for tile in tiles:
        part, part_lse = attend(*cut(q, k, v, tile), tile.causal, scale)
        merge_(out[tile.rows, :, tile.q], lse[tile.rows, :, tile.q], part, part_lse)


def see_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    tiles: list[Tile], dq: Tensor, dk: Tensor, dv: Tensor, scale: float,
) -> None:  # fmt: skip
    """Add to dq, dk and dv what comes of these tiles."""
    for tile in tiles:
        at = tile.rows, slice(None), tile.q
        found = attend_backward(grad[at], *cut(q, k, v, tile), out[at], lse[at], tile.causal, scale)
        dq[at] += found[0]
        dk[tile.rows, :, tile.k] += found[1]
        dv[tile.rows, :, tile.k] += found[2]


def cut(q: Tensor, k: Tensor, v: Tensor, tile: Tile) -> tuple[Tensor, Tensor, Tensor]:
    return q[tile.rows, :, tile.q], k[tile.rows, :, tile.k], v[tile.rows, :, tile.k]
