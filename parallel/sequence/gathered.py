"""Softmax attention by gathered keys and values: what LASP-2 does in the other layers of a hybrid model (LASP-2H).

Rows lie in order over the ranks. Each gathers all keys and values in one call, and its queries attend to those that
they see: of a document that began before, everything up to here as one rectangle and its own tokens as a triangle.
Backward gathers them once more, and the ranks' parts of dk and dv are summed and scattered in one call, in fp32. Sent
by a rank of P that holds s tokens at most, for n_kv key heads of width d and b bytes a value:

    forward    2 n_kv d b s (P - 1)         backward    the same, and 2 n_kv d 4 s (P - 1) for dk and dv

As much as a ring sends, without the turns; held while it runs are all keys and values of the row. The later a rank's
tokens, the more they see: causal work is uneven. Papers: Sun et al. 2025, arXiv:2502.07563, algorithm 7; Llama team
2024, arXiv:2407.21783, section 3.3.2.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

from parallel.sequence.blockwise import Method, nothing_seen, see, see_backward
from parallel.sequence.cost import Across, Shape
from parallel.sequence.layout import Cut, Layout, Tile, alike
from parallel.sequence.links import Connection


def longest(cut: Cut, length: int) -> int:
    """Tokens of the longest piece."""
    return max(len(places) for member in range(cut.ring) for places in cut.of_member(length, member))


def tiles(layout: Layout, member: int, causal: bool) -> list[Tile]:
    """What queries of `member` see of keys that lie in the order of the row."""
    (held,) = layout.cut.of_member(layout.length, member)
    found = []
    for rows, starts in alike(layout.documents):
        for begin, end in zip(starts, (*starts[1:], layout.length), strict=True):
            low, high = max(begin, held.start), min(end, held.stop)
            if low >= high:
                continue
            q = slice(low - held.start, high - held.start)
            if not causal:
                found.append(Tile(rows, q, slice(begin, end), False))
                continue
            if begin < low:
                found.append(Tile(rows, q, slice(begin, low), False))
            found.append(Tile(rows, q, slice(low, high), True))
    return found


def gather(k: Tensor, v: Tensor, layout: Layout, links: Connection) -> tuple[Tensor, Tensor]:
    """Keys and values of whole rows, from those of this rank."""
    most = longest(layout.cut, layout.length)
    flat = torch.cat([pad(x, (0, 0, 0, most - x.shape[2])).flatten() for x in (k, v)])
    (came,) = links.all_gather(flat).wait()
    parts = torch.split(came, [k[:, :, :1].numel() * most, v[:, :, :1].numel() * most], dim=1)
    return tuple(  # type: ignore[return-value]
        torch.cat(
            [part[rank].view(*x.shape[:2], most, -1)[:, :, : layout.member_holds(rank)] for rank in range(links.count)],
            2,
        )
        for part, x in zip(parts, (k, v), strict=True)
    )


def scatter(dk: Tensor, dv: Tensor, layout: Layout, links: Connection) -> tuple[Tensor, Tensor]:
    """This rank's keys' and values' gradients, summed over what all ranks found for whole rows."""
    most = longest(layout.cut, layout.length)
    held = [layout.member_holds(rank) for rank in range(links.count)]
    parts = [torch.split(x, held, dim=2) for x in (dk, dv)]
    sent = torch.stack([
        torch.cat([pad(part[rank], (0, 0, 0, most - held[rank])).flatten() for part in parts])
        for rank in range(links.count)
    ])  # fmt: skip
    sizes = [x[:, :, :1].numel() * most for x in (dk, dv)]
    summed = torch.split(links.reduce_scatter(sent), sizes)
    return tuple(  # type: ignore[return-value]
        x.view(*like.shape[:2], most, -1)[:, :, : held[links.index]] for x, like in zip(summed, (dk, dv), strict=True)
    )


def gathered_forward(
    q: Tensor, k: Tensor, v: Tensor, layout: Layout, links: Connection, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    """Return this rank's output and log-sum-exp."""
    out, lse = nothing_seen(q, v)
    see(q, *gather(k, v, layout, links), tiles(layout, links.index, causal), out, lse, scale)
    return out.to(q.dtype), lse


def gathered_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
    layout: Layout, links: Connection, causal: bool, scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return the gradients of q, k and v, given what `gathered_forward` returned."""
    keys, values = gather(k, v, layout, links)
    dq, dk, dv = (torch.zeros_like(x, dtype=lse.dtype) for x in (q, keys, values))
    see_backward(grad, q, keys, values, out, lse, tiles(layout, links.index, causal), dq, dk, dv, scale)
    dk, dv = scatter(dk, dv, layout, links)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def gathered_cost(cut: Cut, member: int, shape: Shape, queries: int, keys: int) -> Across:
    """See the head of this file."""
    values = 2 * keys * shape.width * shape.batch
    sent, whole = values * longest(cut, shape.length), values * shape.length
    scores = queries * shape.width * sum(map(len, cut.of_member(shape.length, member))) * shape.batch
    others, both = cut.ring - 1, cut.ring * sent + whole
    return Across(
        forward=others * sent * shape.value_bytes,
        backward=others * sent * (shape.value_bytes + shape.wide_bytes),
        working=both * shape.value_bytes + (both + scores) * shape.wide_bytes,
    )


GATHERED = Method(gathered_forward, gathered_backward, gathered_cost)
