"""Linear attention over the tokens that one device holds, computed in blocks.

A key head carries a state along each document, which every query head that shares it reads:

    S_i = a_i S_(i-1) + k_i^T v_i        (width of keys, width of values); a_i in (0, 1], 0 where a document begins
    o_i = q_i S_i

Several tokens at once: with A_ij the product of a over (j, i], b_i that from the block's first token to i, and w_j that
from j + 1 to its last,

    O = ((Q K^T) * A) V + b * (Q S),     S <- b_last S + (w * K)^T V

so a token costs products of its block and of the state, however long the row. Products of a are made of sums of
logarithms in fp64, counted from the document's start: what lies before it is left out by comparing documents and not by
a logarithm of 0. Without a mask (not causal) each token reads the sum of its whole document: A is 1 in the block, and
states come from both sides. Products and states are fp32 at least.

This file needs torch alone: an exported model takes it along.
Papers: Katharopoulos et al. 2020, arXiv:2006.16236; with decay: Sun et al. 2023, arXiv:2307.08621 (chunks, eq. 7).
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK = 64
"""Tokens of a block at the most: about as much work within it as with the state, for heads of usual width."""
NOBODY = -1
"""A document that no token is of."""


class Spans(NamedTuple):
    """What of the tokens at hand belongs together, and what is left from one to the next."""

    positions: Tensor
    """(batch, tokens) int64, within documents: one begins wherever they do not go on by one."""
    decay: Tensor | None
    """log a, at most 0, of each key head (key heads,), or of each token too (batch, key heads, tokens); None: a = 1."""
    document: Tensor
    """(batch, tokens) int64, ascending from 0."""
    log: Tensor | None
    """(batch, key heads, tokens) fp64: sum of log a from the document's first token here to each, both with it."""


class Weights(NamedTuple):
    """How a block's tokens take part in the state, each (batch, key heads or 1, blocks, tokens)."""

    carry: Tensor
    """What is left at a token of the state before the block; 0 where its document begins here."""
    after: Tensor
    """What is left of a token at the block's end; 0 where its document ends here."""

    @property
    def through(self) -> Tensor:
        """What is left at the block's end of the state before it: 0 unless one document is there before and after."""
        return self.carry[..., -1] * (self.after[..., -1] != 0)


def documents_of(positions: Tensor) -> Tensor:
    """Number the documents of rows (batch, tokens): one begins wherever positions do not go on by one."""
    return pad((positions[:, 1:] != positions[:, :-1] + 1).cumsum(1), (1, 0))


def spans_of(positions: Tensor, decay: Tensor | None) -> Spans:
    """Find documents, and sum up logarithms of decays; both as `Spans` has them."""
    document = documents_of(positions)
    if decay is None:
        return Spans(positions, decay, document, None)
    if decay.dim() == 1:
        first = torch.where(document == 0, positions[:, :1] - 1, -1)
        return Spans(positions, decay, document, (positions - first)[:, None] * decay.double()[:, None])
    return Spans(positions, decay, document, running_sums(decay, document))


def running_sums(values: Tensor, document: Tensor, *, backward: bool = False) -> Tensor:
    """Sum (batch, key heads, tokens) from a document's start to each token, or from each to its end; fp64.

    No other document's values take part, not even to be subtracted again, so that they cannot show in the result.
    """
    if backward:
        return running_sums(values.flip(-1), document.flip(-1)).flip(-1)
    found, step = values.double(), 1
    while step < document.shape[1]:
        same = (document[:, step:] == document[:, :-step])[:, None]
        found = torch.cat([found[..., :step], found[..., step:] + found[..., :-step].where(same, 0.0)], dim=-1)
        step *= 2
    return found


def weights_of(spans: Spans, count: int, before: Tensor, after: Tensor, wide: torch.dtype) -> Weights:
    """Weights of `count` blocks of equal length.

    Args:
        before, after: (batch,) the document of the token before the first and after the last, `NOBODY` for none here.
    """
    document = row_blocks(spans.document[:, None], count, NOBODY - 1)
    last = torch.cat([before[:, None, None], document[:, :, :-1, -1]], -1)[..., None]
    first = torch.cat([document[:, :, 1:, 0], after[:, None, None]], -1)[..., None]
    carried, left = document == last, document == first
    if spans.log is None:
        return Weights(carried.to(wide), left.to(wide))
    log = row_blocks(spans.log, count, 0.0)
    ends = log[..., -1:]
    came = pad(ends[:, :, :-1, 0], (1, 0))[..., None]
    return Weights(exponential(log - came, carried, wide), exponential(ends - log, left, wide))


def inside_of(spans: Spans, count: int, causal: bool, wide: torch.dtype) -> Tensor:
    """A of every block, (batch, key heads or 1, blocks, tokens, tokens)."""
    document = row_blocks(spans.document[:, None], count, NOBODY - 1)
    same = document[..., :, None] == document[..., None, :]
    if causal:
        same = same.tril()
    if spans.log is None:
        return same.to(wide)
    log = row_blocks(spans.log, count, 0.0)
    # Counted from the block's start where the document began before it: small numbers, and none of another document.
    log = (log - log[..., :1].where(document == document[..., :1], 0.0)).to(wide)
    return exponential(log[..., :, None] - log[..., None, :], same, wide)


def exponential(log: Tensor, of: Tensor, wide: torch.dtype) -> Tensor:
    """exp(log) where `of` holds, else 0: whatever stands there does not overflow."""
    return log.to(wide).masked_fill(~of, float("-inf")).exp()


def row_blocks(rows: Tensor, count: int, fill: float) -> Tensor:
    """(..., tokens) to (..., blocks, tokens of a block), the last filled up."""
    size = -(-rows.shape[-1] // count)
    return torch.unflatten(pad(rows, (0, size * count - rows.shape[-1]), value=fill), -1, (count, size))


def blocks(x: Tensor, keys: int, count: int, wide: torch.dtype) -> Tensor:
    """(batch, heads, tokens, width) to (batch, keys, blocks, rows, width): a row for each token of a block and each of
    the heads that share the key."""
    size = -(-x.shape[2] // count)
    x = pad(x.to(wide), (0, 0, 0, size * count - x.shape[2]))
    x = torch.unflatten(torch.unflatten(x, 2, (count, size)), 1, (keys, -1))
    return x.transpose(2, 3).flatten(3, 4)


def rows(x: Tensor, like: Tensor) -> Tensor:
    """The inverse of `blocks`, with heads and tokens of `like`."""
    x = torch.unflatten(x, 3, (like.shape[1] // x.shape[1], -1)).transpose(2, 3)
    return x.flatten(1, 2).flatten(2, 3)[:, :, : like.shape[2]]


def shared(weight: Tensor, group: int) -> Tensor:
    """Weights of a block's tokens for the rows of `blocks`, one dimension more."""
    return weight.repeat(1, 1, 1, group)[..., None]


def scan(parts: Tensor, through: Tensor, *, backward: bool = False) -> Tensor:
    """State before each block, S <- through S + part from 0 on; (batch, keys, blocks, width, width) as `parts`."""
    if backward:
        return scan(parts.flip(2), through.flip(2)).flip(2)
    found = [torch.zeros_like(parts[:, :, 0])]
    for at in range(parts.shape[2] - 1):
        found.append(torch.addcmul(parts[:, :, at], through[:, :, at, None, None], found[-1]))
    return torch.stack(found, dim=2)


class Blocks:
    """What forward and backward over the blocks of some tokens need alike.

    Args:
        q: (batch, heads, tokens, width); k: (batch, key heads, tokens, width); v: (batch, key heads, tokens, width).
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> None:
        self.like, self.group = (q, k, v), q.shape[1] // k.shape[1]
        self.wide, self.count = torch.promote_types(q.dtype, torch.float32), -(-q.shape[2] // BLOCK)
        self.q, self.k, self.v = (self.cut(x) for x in (q, k, v))
        nobody = spans.document.new_full((q.shape[0],), NOBODY)
        weights = weights_of(spans, self.count, nobody, nobody, self.wide)
        self.inside, self.through = inside_of(spans, self.count, causal, self.wide), weights.through
        carry, after = weights.carry, weights.after
        self.ways = [(after, carry, False)] if causal else [(after, carry, False), (carry, after, True)]
        """Which weights tokens go into states with, which they are read with, and whether from the row's end."""

    def cut(self, x: Tensor) -> Tensor:
        return blocks(x, self.like[1].shape[1], self.count, self.wide)

    def scores(self, one: Tensor, other: Tensor) -> Tensor:
        """(one other^T) * A."""
        found = one @ other.transpose(-1, -2)
        torch.unflatten(found, 3, (self.group, -1)).mul_(self.inside[:, :, :, None])
        return found

    def states(self, give: Tensor, from_end: bool) -> Tensor:
        parts = (self.k * give[..., None]).transpose(-1, -2) @ self.v
        return scan(parts, self.through, backward=from_end)

    def forward(self) -> Tensor:
        out = self.scores(self.q, self.k) @ self.v
        for give, take, from_end in self.ways:
            if self.count > 1:
                out += (self.q @ self.states(give, from_end)).mul_(shared(take, self.group))
        return rows(out, self.like[0])

    def backward(self, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        grad = self.cut(grad)
        d_scores = self.scores(grad, self.v)
        dq, dk = d_scores @ self.k, d_scores.transpose(-1, -2) @ self.q
        dv = self.scores(self.q, self.k).transpose(-1, -2) @ grad
        for give, take, from_end in self.ways:
            if self.count == 1:
                continue
            read = shared(take, self.group)
            dq += (grad @ self.states(give, from_end).transpose(-1, -2)).mul_(read)
            asked = (self.q * read).transpose(-1, -2) @ grad
            later = scan(asked, self.through, backward=not from_end)
            dk += (self.v @ later.transpose(-1, -2)).mul_(give[..., None])
            dv += (self.k @ later).mul_(give[..., None])
        return rows(dq, self.like[0]), rows(dk, self.like[1]), rows(dv, self.like[2])


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool) -> Tensor:
    """Return the output (batch, heads, tokens, width of values) of documents that begin with state 0, in fp32 or fp64.

    Args:
        q: (batch, heads, tokens, width); k: (batch, key heads, tokens, width).
        v: (batch, key heads, tokens, width of values).
    """
    return Blocks(q, k, v, spans, causal).forward()


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, spans: Spans, causal: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in fp32 or fp64."""
    return Blocks(q, k, v, spans, causal).backward(grad)
