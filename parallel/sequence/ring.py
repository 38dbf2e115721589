"""Ring attention: keys and values go round, each rank's queries see them block by block; nothing is approximated.

At hop t of R a member r holds keys and values of member r - t. While it computes the tiles that its queries have with
them (`Layout.tiles`), they travel on to r + 1. Backward goes round once more. dq stays; dk and dv travel with the keys
they belong to, gathering each member's part in fp32, and after R hops are home. Sent by a rank, for n_kv key heads of
width d and b bytes a value:

    forward    2 n_kv d b S (R - 1) / R         backward    the same, and 2 n_kv d 4 S for dk and dv

Paper: Liu, Zaharia, Abbeel 2023, arXiv:2310.01889; zigzag order: zhuzilin/ring-flash-attention.
"""

import torch
from torch import Tensor

from parallel.sequence.blockwise import Method, nothing_seen, see, see_backward
from parallel.sequence.cost import Across, Shape
from parallel.sequence.kernels import attend, attend_backward
from parallel.sequence.layout import Cut, Layout, Tile
from parallel.sequence.links import Connection, Pending


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
    out, lse = nothing_seen(q, v)
    held = [k, v]
    for hop in range(links.count):
        coming = pass_on(held, layout, links, hop)
        see(q, held[0], held[1], layout.tiles(mine, (mine - hop) % links.count, causal), out, lse, scale)
        if coming is not None:
            held = coming.wait()
    return out.to(q.dtype), lse


def pass_on(held: list[Tensor], layout: Layout, links: Connection, hop: int) -> Pending | None:
    """Begin to send on what is held at `hop`, and to receive what will be held at the next; None at the last."""
    if hop == links.count - 1:
        return None
    tokens = layout.member_holds((links.index - hop - 1) % links.count)
    coming = [tensor.new_empty((*tensor.shape[:2], tokens, tensor.shape[3])) for tensor in held]
    return links.exchange(held, (links.index + 1) % links.count, coming, (links.index - 1) % links.count)


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
        # As they are sent: a rank's own keys may lie otherwise in memory.
        dk, dv = (torch.zeros(tensor.shape, dtype=wide, device=tensor.device) for tensor in held)
        tiles = layout.tiles(mine, source, causal)
        see_backward(grad, q, held[0], held[1], out, lse, tiles, dq, dk, dv, scale)
        if travelling is not None:  # sent after the hop before, so that it came while this one was computed
            add([dk, dv], travelling.wait())
        if count > 1:
            after = (source - 1) % count if hop < count - 1 else mine
            tokens = layout.member_holds(after)
            arriving = [tensor.new_empty((*tensor.shape[:2], tokens, tensor.shape[3])) for tensor in (dk, dv)]
            travelling = links.exchange([dk, dv], (mine + 1) % count, arriving, (mine - 1) % count)
        if coming is not None:
            held = coming.wait()
    if travelling is not None:
        dk, dv = travelling.wait()
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def add(totals: list[Tensor], parts: list[Tensor]) -> None:
    for total, part in zip(totals, parts, strict=True):
        total += part


def ring_cost(cut: Cut, member: int, shape: Shape, queries: int, keys: int) -> Across:
    """See the head of this file."""
    if cut.ring == 1:
        return Across(0, 0, 0)
    value, wide = (shape.batch * shape.width * each for each in (shape.value_bytes, shape.wide_bytes))
    hops = [sum(map(len, cut.of_member(shape.length, (member - hop) % cut.ring))) for hop in range(cut.ring)]
    passed, gradients = 2 * keys * value * sum(hops[:-1]), 2 * keys * wide * sum(hops)
    most = 0
    for here, before, after in zip(hops, [0, *hops[:-1]], [*hops[1:], 0], strict=True):
        arrived = here if before else 0  # gradients that came along; those of the hop before are on their way meanwhile
        on = after or hops[0]
        most = max(most, (here + after) * value + (here + arrived + max(before, on)) * wide)
    return Across(passed, passed + gradients, queries * hops[0] * wide + 2 * keys * most)


RING = Method(ring_forward, ring_backward, ring_cost)
