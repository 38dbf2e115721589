"""LASP-2: linear attention of rows that ranks share, by one gather of states a layer, however long the rows.

Each rank computes its own tokens as if nothing came before, and the state that they leave, M = sum of w_j k_j^T v_j.
All ranks send each other theirs; what came before a piece of neighbouring tokens then follows by the recurrence over
the pieces before it, and is read by the queries of the document that goes on there:

    S_p = through_(p-1) S_(p-1) + M_(p-1),        O_p = [as if alone] + b * (Q S_p)

Backward sends as much: dS_p = (b * Q)^T dO, gathered, gives by the same recurrence from the row's end what keys and
values get from tokens after them. Both gathers run while what is within the rank is computed. Documents end where
`through` and b are 0, which follows from the layout; a decay that depends on the token sends its products along.
Without a mask states come from both sides: in one sum where rows are one document, else in two that travel together.
Sent by a rank of P for c pieces (one, or two of a zigzag order) of n key heads, 4 bytes a value (8 in fp64):

    forward    c (P - 1) n d_k d_v 4         backward    the same

Paper: Sun et al. 2025, arXiv:2502.07563, algorithms 1 to 4.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.sequence.layout import Cut, Layout
from parallel.sequence.linear import (
    decay_gradient,
    edges_of,
    log_gradient,
    narrowed,
    put_in,
    read_out,
    within,
    within_backward,
)
from parallel.sequence.links import Connection
from parallel.sequence.recurrence import scan, spans_of


class Piece(NamedTuple):
    """Neighbouring tokens of a row, on one rank."""

    rank: int
    slot: int
    """Its number among the rank's."""
    places: range
    """In the row."""
    at: slice
    """Of the tokens that the rank holds."""


@functools.lru_cache(maxsize=64)
def pieces_of(cut: Cut, length: int) -> tuple[Piece, ...]:
    """All pieces of a row, in its order."""
    found = []
    for rank in range(cut.degree):
        at = 0
        for slot, places in enumerate(cut.of_rank(length, rank)):
            found.append(Piece(rank, slot, places, slice(at, at + len(places))))
            at += len(places)
    return tuple(sorted(found, key=lambda piece: piece.places.start))


@functools.lru_cache(maxsize=64)
def goes_on(cut: Cut, length: int, documents: tuple[tuple[int, ...], ...]) -> tuple[tuple[bool, ...], ...]:
    """For each piece and after the last, for each row, whether a document goes on across its first place."""
    starts = [set(row) for row in documents]
    firsts = [piece.places.start for piece in pieces_of(cut, length)]
    return (*(tuple(first not in row for row in starts) for first in firsts), (False,) * len(documents))


@functools.lru_cache(maxsize=64)
def passes(cut: Cut, length: int, documents: tuple[tuple[int, ...], ...]) -> tuple[tuple[bool, ...], ...]:
    """For each row and each piece, whether one document is there before, all through, and after."""
    across = goes_on(cut, length, documents)
    inner = [
        [any(piece.places.start < start < piece.places.stop for start in row) for piece in pieces_of(cut, length)]
        for row in documents
    ]
    return tuple(
        tuple(across[p][row] and across[p + 1][row] and not begins for p, begins in enumerate(pieces))
        for row, pieces in enumerate(inner)
    )


class Own:
    """What forward and backward of this rank need alike.

    Args:
        positions: (batch, tokens of this rank).
    """

    def __init__(
        self, layout: Layout, rank: int, positions: Tensor, decay: Tensor | None, causal: bool, wide: torch.dtype
    ) -> None:
        self.pieces = pieces_of(layout.cut, layout.length)
        self.slots = max(piece.slot for piece in self.pieces) + 1
        self.mine = [index for index, piece in enumerate(self.pieces) if piece.rank == rank]
        self.at = [self.pieces[index].at for index in self.mine]
        of_tokens = decay is not None and decay.dim() == 3
        self.spans = [
            spans_of(positions[:, at], decay[..., at] if decay is not None and of_tokens else decay) for at in self.at
        ]
        across = torch.tensor(goes_on(layout.cut, layout.length, layout.documents), device=positions.device)
        self.begins = [~across[index] for index in self.mine]
        self.edges = [
            edges_of(spans, across[index], across[index + 1], wide)
            for index, spans in zip(self.mine, self.spans, strict=True)
        ]
        self.ways = (False,) if causal else (False, True)
        """Whether states come from the row's end."""
        self.one_sum = not causal and all(len(starts) == 1 for starts in layout.documents)
        """Whether what a piece leaves to both sides is the same sum, which then travels once."""

    def give(self, piece: int, from_end: bool) -> Tensor:
        return self.edges[piece].carry if from_end else self.edges[piece].after

    def take(self, piece: int, from_end: bool) -> Tensor:
        return self.edges[piece].after if from_end else self.edges[piece].carry

    def each(self) -> list[tuple[int, bool]]:
        """Every way of every piece of this rank."""
        return [(piece, from_end) for from_end in self.ways for piece in range(len(self.mine))]

    def packed(self, x: Tensor, y: Tensor, weight: Callable[[int, bool], Tensor], keys: int) -> Tensor:
        """States x^T y of pieces in one tensor as large on every rank, (ways, slots, batch, keys, width, width)."""
        if self.one_sum:
            weight = self.everything
        states = [
            [put_in(x[:, :, at], y[:, :, at], weight(piece, from_end), keys) for piece, at in enumerate(self.at)]
            for from_end in (self.ways[:1] if self.one_sum else self.ways)
        ]
        empty = [torch.zeros_like(states[0][0])] * (self.slots - len(self.mine))
        return torch.stack([torch.stack(way + empty) for way in states])

    def everything(self, piece: int, from_end: bool) -> Tensor:
        return torch.ones_like(self.edges[piece].carry)

    def arrived(self, gathered: Tensor, through: Tensor, *, backward: bool) -> list[Tensor]:
        """What comes to each way of each piece of this rank, from the packed states of all ranks."""
        found = []
        for way, from_end in enumerate(self.ways):
            sent = gathered[:, 0 if self.one_sum else way]
            parts = torch.stack([sent[piece.rank, piece.slot] for piece in self.pieces], dim=2)
            before = scan(parts, through, backward=from_end != backward)
            found += [before[:, :, index] for index in self.mine]
        return found


class SharedLinearAttention(torch.autograd.Function):
    """Linear attention of this rank's tokens of rows that a group shares."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None,
        layout: Layout, rank: int, links: Connection, causal: bool,
    ) -> Tensor:  # fmt: skip
        own = Own(layout, rank, positions, decay, causal, torch.promote_types(q.dtype, torch.float32))
        states = own.packed(k, v, own.give, k.shape[1])
        products = own_products(own) if decay is not None and decay.dim() == 3 else states.new_empty(0)
        coming = links.all_gather(torch.cat([states.flatten(), products.flatten()]))
        outs = [
            within(q[:, :, at], k[:, :, at], v[:, :, at], spans, causal)
            for at, spans in zip(own.at, own.spans, strict=True)
        ]
        states_came, products_came = torch.split(coming.wait()[0], [states.numel(), products.numel()], dim=1)
        if products.numel():
            through = sent_through(own, torch.unflatten(products_came, 1, products.shape))
        else:
            through = known_through(layout, decay, states)
        came = own.arrived(torch.unflatten(states_came, 1, states.shape), through, backward=False)
        for (p, from_end), state in zip(own.each(), came, strict=True):
            outs[p] = outs[p] + read_out(q[:, :, own.at[p]], state, own.take(p, from_end))
        ctx.save_for_backward(q, k, v, positions, decay, through, *came)
        ctx.rest = layout, rank, links, causal
        return torch.cat(outs, dim=2).to(q.dtype)

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, positions, decay, through, *came = ctx.saved_tensors
        layout, rank, links, causal = ctx.rest
        own = Own(layout, rank, positions, decay, causal, through.dtype)
        coming = links.all_gather(own.packed(q, grad, own.take, k.shape[1]))
        of_decay = ctx.needs_input_grad[4]
        found = [
            within_backward(grad[:, :, at], q[:, :, at], k[:, :, at], v[:, :, at], spans, causal, of_decay)
            for at, spans in zip(own.at, own.spans, strict=True)
        ]
        later = own.arrived(coming.wait()[0], through, backward=True)
        for (p, from_end), state, asked in zip(own.each(), came, later, strict=True):
            at, (dq, dk, dv, d_decay) = own.at[p], found[p]
            given = read_out(v[:, :, at], asked.transpose(-1, -2), own.give(p, from_end))
            taken = read_out(grad[:, :, at], state.transpose(-1, -2), own.take(p, from_end))
            if d_decay is not None:
                passed = through[..., own.mine[p]] * (state * asked).sum((2, 3))
                d_log = log_gradient(q[:, :, at], taken, k[:, :, at], given)
                d_log[..., -1] += (k[:, :, at] * given).sum((2, 3)) + passed  # of the piece's end
                d_decay = d_decay + decay_gradient(d_log, own.spans[p].document, own.begins[p])
            found[p] = dq + taken, dk + given, dv + read_out(k[:, :, at], asked, own.give(p, from_end)), d_decay
        parts = [torch.cat(x, dim=2) if x[0] is not None else None for x in zip(*found, strict=True)]
        gradients = narrowed(parts, (q, k, v, decay))
        return *gradients[:3], None, gradients[3], None, None, None, None


def own_products(own: Own) -> Tensor:
    """`through` of this rank's pieces, (slots, batch, key heads)."""
    found = [edges.through[..., 0] for edges in own.edges]
    return torch.stack(found + [torch.zeros_like(found[0])] * (own.slots - len(found)))


def sent_through(own: Own, sent: Tensor) -> Tensor:
    """`through` of all pieces, (batch, key heads, pieces), from what the ranks sent."""
    return torch.stack([sent[piece.rank, piece.slot] for piece in own.pieces], dim=2)


def known_through(layout: Layout, decay: Tensor | None, like: Tensor) -> Tensor:
    """`through` of all pieces, (batch, key heads or 1, pieces), where it follows from their lengths."""
    one = torch.tensor(passes(layout.cut, layout.length, layout.documents), device=like.device)[:, None]
    if decay is None:
        return one.to(like.dtype)
    lengths = [len(piece.places) for piece in pieces_of(layout.cut, layout.length)]
    log = decay.double()[:, None] * torch.tensor(lengths, device=like.device)
    return log.exp().to(like.dtype) * one


def shared_linear_attention(
    q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None,
    layout: Layout, rank: int, links: Connection, *, causal: bool,
) -> Tensor:  # fmt: skip
    """`linear.linear_attention` of this rank's tokens of rows that a group shares.

    Args:
        links: to all ranks of the group, in their order.
    """
    return SharedLinearAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
        q, k, v, positions, decay, layout, rank, links, causal
    )
