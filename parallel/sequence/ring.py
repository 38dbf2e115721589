"""Ring attention: keys and values go round, each rank's queries see them block by block; nothing is approximated.

At hop t of R a member r holds keys and values of member r - t. While it computes the tiles that its queries have with
them (`Layout.tiles`), they travel on to r + 1. Blocks are put together by their log-sum-exp, in fp32 at least:

    out <- out - sigmoid(lse_b - lse) (out - out_b)
    lse <- logaddexp(lse, lse_b)

Backward goes round once more. dq stays; dk and dv travel with the keys they belong to, gathering each member's part in
fp32, and after R hops are home. Sent by a rank, for n_kv key heads of width d and b bytes a value:

    forward    2 n_kv d b S (R - 1) / R         backward    the same, and 2 n_kv d 4 S for dk and dv

Paper: Liu, Zaharia, Abbeel 2023, arXiv:2310.01889; zigzag order: zhuzilin/ring-flash-attention.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.sequence.kernels import attend, attend_backward
from parallel.sequence.layout import Layout, Tile
from parallel.sequence.links import Connection


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


def is_whole(tiles: list[Tile], q: Tensor) -> bool:
    """Whether one tile is everything, as of unpacked rows on a member alone."""
    batch, tokens = q.shape[0], q.shape[2]
    return len(tiles) == 1 and tiles[0].q == slice(0, tokens) and len(range(*tiles[0].rows.indices(batch))) == batch


def ring_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, links: Connection, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return this member's output in the dtype of q, and the log-sum-exp of its queries' rows in at least fp32.

    Args:
        q: (batch, heads, tokens of this member, width).
        k, v: (batch, key heads, tokens of this member, width).
    """
    mine = links.index
    own = layout.tiles(mine, mine, causal)
    if links.count == 1 and is_whole(own, q):
        return attend(q, k, v, own[0].causal, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    # Tokens outermost in memory, as the next layer takes them: what is saved here is then saved once.
    out = q.new_zeros(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=wide).transpose(1, 2)
    lse = q.new_full(q.shape[:-1], float("-inf"), dtype=wide)
    held = [k, v]
    for hop in range(links.count):
        coming = pass_on(held, layout, links, hop)
        see(q, held[0], held[1], layout.tiles(mine, (mine - hop) % links.count, causal), out, lse, scale)
        if coming is not None:
            held = coming.wait()
    return out.to(q.dtype), lse


def pass_on(held: list[Tensor], layout: Layout, links: Connection, hop: int) -> Any:
    """Begin to send on what is held at `hop`, and to receive what will be held at the next; None at the last."""
    if hop == links.count - 1:
        return None
    tokens = layout.member_holds((links.index - hop - 1) % links.count)
    shapes = [(*tensor.shape[:2], tokens, tensor.shape[3]) for tensor in held]
    following, before = (links.index + 1) % links.count, (links.index - 1) % links.count
    return links.exchange(held, following, shapes, before, like=held[0])


def ring_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    layout: Layout, links: Connection, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, given what `ring_forward` returned."""
    mine, count = links.index, links.count
    own = layout.tiles(mine, mine, causal)
    if count == 1 and is_whole(own, q):
        return attend_backward(grad, q, k, v, out, lse, own[0].causal, scale)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.zeros_like(q, dtype=wide)
    held, travelling = [k, v], None
    for hop in range(count):
        source = (mine - hop) % count
        coming = pass_on(held, layout, links, hop)
        dk, dv = (torch.zeros_like(tensor, dtype=wide) for tensor in held)
        tiles = layout.tiles(mine, source, causal)
        see_backward(grad, q, held[0], held[1], out, lse, tiles, dq, dk, dv, scale)
        if travelling is not None:  # sent after the hop before, so that it came while this one was computed
            for total, part in zip((dk, dv), travelling.wait(), strict=True):
                total += part
        if count > 1:
            after = (source - 1) % count if hop < count - 1 else mine
            tokens = layout.member_holds(after)
            shapes = [(*tensor.shape[:2], tokens, tensor.shape[3]) for tensor in (dk, dv)]
            travelling = links.exchange([dk, dv], (mine + 1) % count, shapes, (mine - 1) % count, like=dk)
        if coming is not None:
            held = coming.wait()
    if travelling is not None:
        dk, dv = travelling.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


class RingAttention(torch.autograd.Function):
    """Exact attention over all tokens of the rows of which each member of a ring holds some."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, layout: Layout, links: Connection, causal: bool, scale: float
    ) -> Tensor:
        out, lse = ring_forward(q, k, v, layout, links, causal, scale)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.rest = layout, links, causal, scale
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, out, lse = ctx.saved_tensors
        return *ring_backward(grad, q, k, v, out, lse, *ctx.rest), None, None, None, None
