"""Ulysses: an all-to-all turns "some tokens of all heads" into "all tokens of some heads", and back after attention.

Rank r of P gets query heads [r n_q // P, (r + 1) n_q // P) and the key heads that those share: with fewer key heads
than ranks a head goes to each rank that needs it, and is never repeated before it is sent. q, k and v travel together.
Sent by a rank, with n'_kv = max(n_kv, P) where they divide:

    forward    (2 n_q + 2 n'_kv) d b S/P (P - 1)/P         backward    the same

Paper: Jacobs et al. 2023, arXiv:2309.14509.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from parallel.sequence.links import Connection


@dataclass(frozen=True)
class Heads:
    """Which heads each of `count` ranks computes."""

    queries: int
    keys: int
    count: int

    def q(self, rank: int) -> slice:
        return slice(self.queries * rank // self.count, self.queries * (rank + 1) // self.count)

    def k(self, rank: int) -> slice:
        """Key heads that a rank's query heads share."""
        share, mine = self.queries // self.keys, self.q(rank)
        return slice(mine.start // share, (mine.stop - 1) // share + 1)

    def groups(self, rank: int) -> list[int] | None:
        """For each query head of a rank the place of its key head among the rank's own; None where each key head
        serves as many query heads as the next, in order, as kernels of grouped attention take it."""
        share, mine = self.queries // self.keys, self.q(rank)
        found = [head // share - self.k(rank).start for head in range(mine.start, mine.stop)]
        keys = found[-1] + 1
        even = [place * keys // len(found) for place in range(len(found))]
        return None if found == even and len(found) % keys == 0 else found


def to_heads(
    tensors: Sequence[Tensor], parts: Sequence[Sequence[slice]], tokens: Sequence[int], links: Connection
) -> list[Tensor]:
    """Give each rank its heads of this rank's tokens; return this rank's heads of all tokens.

    Args:
        tensors: (batch, heads, tokens of this rank, width) each.
        parts: for each tensor, the heads of each rank.
        tokens: of each rank.

    Returns:
        For each tensor (batch, heads of this rank, sum of tokens, width).
    """
    ranks, mine = range(links.count), links.index
    sent = [torch.cat([x[:, heads[to]].flatten() for x, heads in zip(tensors, parts, strict=True)]) for to in ranks]
    sizes = [x.shape[0] * width_of(heads[mine]) * x.shape[3] for x, heads in zip(tensors, parts, strict=True)]
    received = links.all_to_all(sent, [sum(sizes) * tokens[source] for source in ranks])
    pieces = [
        torch.split(flat, [size * tokens[source] for size in sizes])
        for source, flat in zip(ranks, received, strict=True)
    ]
    return [
        torch.cat([pieces[i][at].view(x.shape[0], -1, tokens[i], x.shape[3]) for i in ranks], dim=2)
        for at, x in enumerate(tensors)
    ]


def to_tokens(
    tensors: Sequence[Tensor], parts: Sequence[Sequence[slice]], tokens: Sequence[int], links: Connection
) -> list[Tensor]:
    """The way back: from (batch, heads of this rank, all tokens, width) to (batch, all heads, tokens of this rank,
    width) for each tensor. A head that several ranks had is the sum of what they send."""
    ranks, mine = range(links.count), links.index
    cut = [torch.split(x, list(tokens), dim=2) for x in tensors]
    sent = [torch.cat([pieces[to].flatten() for pieces in cut]) for to in ranks]
    own = tokens[mine]
    sizes = [
        [x.shape[0] * width_of(heads[i]) * own * x.shape[3] for x, heads in zip(tensors, parts, strict=True)]
        for i in ranks
    ]
    received = links.all_to_all(sent, [sum(size) for size in sizes])
    pieces = [torch.split(flat, size) for flat, size in zip(received, sizes, strict=True)]
    found = []
    for at, (x, heads) in enumerate(zip(tensors, parts, strict=True)):
        arrived = [pieces[i][at].view(x.shape[0], -1, own, x.shape[3]) for i in ranks]
        if all(heads[i].stop == heads[i + 1].start for i in ranks[:-1]):
            found.append(torch.cat(arrived, dim=1))
            continue
        total = x.new_zeros(
            x.shape[0], heads[-1].stop, own, x.shape[3], dtype=torch.promote_types(x.dtype, torch.float32)
        )
        for i in ranks:
            total[:, heads[i]] += arrived[i]
        found.append(total.to(x.dtype))
    return found


def width_of(part: slice) -> int:
    return int(part.stop - part.start)


class ToHeads(torch.autograd.Function):
    """q, k, v of this rank's tokens to those of this rank's heads."""

    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, heads: Heads, tokens: list[int], links: Connection
    ) -> tuple[Tensor, ...]:
        queries, keys = ([part(rank) for rank in range(links.count)] for part in (heads.q, heads.k))
        ctx.rest = [queries, keys, keys], tokens, links
        return tuple(to_heads([q, k, v], *ctx.rest))

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *to_tokens(gradients, *ctx.rest), None, None, None


class ToTokens(torch.autograd.Function):
    """The output of this rank's heads to that of this rank's tokens."""

    @staticmethod
    def forward(ctx: Any, out: Tensor, heads: Heads, tokens: list[int], links: Connection) -> Tensor:
        ctx.rest = [[heads.q(rank) for rank in range(links.count)]], tokens, links
        return to_tokens([out], *ctx.rest)[0]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        return to_heads([grad], *ctx.rest)[0], None, None, None
