"""What a strategy of sequence parallelism is, and those there are.

A strategy takes queries, keys and values of this rank's tokens and returns the output of this rank's tokens, as
attention over the whole rows would give it. Where the tokens lie is told by a `Layout`, which it chooses the cut of.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from parallel.config import ParallelConfig, SequenceKind
from parallel.sequence.blockwise import BlockwiseAttention, Method
from parallel.sequence.cost import Cost, Decay, ExactCost, Shape, StateCost
from parallel.sequence.gathered import GATHERED
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.lightseq import LIGHTSEQ
from parallel.sequence.links import Connection
from parallel.sequence.ring import RING
from parallel.sequence.states import shared_linear_attention
from parallel.sequence.ulysses import Heads, ToHeads, ToTokens


class Strategy(Protocol):
    """Attention over tokens that lie on several ranks."""

    @property
    def cut(self) -> Cut:
        """How rows lie over the ranks of the group."""
        ...

    @property
    def index(self) -> int:
        """Of this rank in the group."""
        ...

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, scale: float) -> Tensor:
        """Return the output (batch, heads, tokens, width) of this rank's tokens; differentiable.

        Args:
            q: (batch, heads, tokens, width) of this rank's tokens, in the order of `layout`.
            k, v: (batch, key heads, tokens, width).
        """
        ...

    def cost(self, shape: Shape) -> Cost:
        """Return what this rank sends, keeps and holds for a layer."""
        ...


@dataclass(frozen=True)
class Exact:
    """Softmax attention: heads over the inner ranks (ulysses), tokens over the outer ones, whose queries and keys meet
    by a method: keys and values go around a ring, or some lend queries to others (LightSeq).

    With one inner rank it is ring attention or LightSeq, with one outer rank Ulysses, with several of both USP (Fang,
    Zhao 2024, arXiv:2405.07719).
    """

    cut: Cut
    index: int
    inner: Connection
    outer: Connection
    method: Method = RING

    def cost(self, shape: Shape) -> Cost:
        return ExactCost(self.cut, self.index, shape, self.method.cost).of()

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, scale: float) -> Tensor:
        if self.cut.ulysses == 1:
            return self.across(q, k, v, layout, causal, scale)
        heads = Heads(q.shape[1], k.shape[1], self.cut.ulysses)
        member = self.index // self.cut.ulysses
        tokens = [layout.held(member * self.cut.ulysses + piece) for piece in range(self.cut.ulysses)]
        q, k, v = ToHeads.apply(q, k, v, heads, tokens, self.inner)  # type: ignore[no-untyped-call]
        groups = heads.groups(self.inner.index)
        if groups is not None:  # key heads that serve different numbers of query heads
            order = torch.tensor(groups, device=k.device)
            k, v = k.index_select(1, order), v.index_select(1, order)
        out = self.across(q, k, v, layout, causal, scale)
        return ToTokens.apply(out, heads, tokens, self.inner)  # type: ignore[no-any-return, no-untyped-call]

    def across(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, causal: bool, scale: float) -> Tensor:
        """Attend to the tokens of all outer ranks, by this rank's heads."""
        return BlockwiseAttention.apply(  # type: ignore[no-any-return, no-untyped-call]
            q, k, v, self.method, layout, self.outer, causal, scale
        )


@dataclass(frozen=True)
class WithStates:
    """Any strategy for softmax layers, and gathered states for linear ones: of pieces that the strategy's cut makes."""

    softmax: Strategy
    links: Connection
    """To all ranks that share rows, in their order."""

    @property
    def cut(self) -> Cut:
        return self.softmax.cut

    @property
    def index(self) -> int:
        return self.softmax.index

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout, *, causal: bool, scale: float) -> Tensor:
        return self.softmax.attend(q, k, v, layout, causal=causal, scale=scale)

    def cost(self, shape: Shape) -> Cost:
        return self.softmax.cost(shape)

    def recur(
        self, q: Tensor, k: Tensor, v: Tensor, positions: Tensor, decay: Tensor | None, layout: Layout, *, causal: bool
    ) -> Tensor:
        """Return `linear.linear_attention` of this rank's tokens."""
        return shared_linear_attention(q, k, v, positions, decay, layout, self.index, self.links, causal=causal)

    def state_cost(self, shape: Shape, decay: Decay) -> Cost:
        """Return what this rank sends, keeps and holds for a linear layer."""
        return StateCost(self.cut, self.index, shape, decay).of()


METHODS = {SequenceKind.lightseq: LIGHTSEQ, SequenceKind.lasp2: GATHERED}


def method_of(cfg: ParallelConfig) -> Method:
    """How the outer ranks' queries and keys meet."""
    return METHODS.get(cfg.sequence, RING)


def cut_of(cfg: ParallelConfig, degree: int, heads: int, key_heads: int) -> Cut:
    """How `cfg.sequence` lays rows over `degree` ranks.

    Args:
        heads, key_heads: of the model; USP without `ulysses_degree` gives the inner ranks as many as divide both.
    """
    if cfg.sequence is SequenceKind.ulysses:
        return Cut(ulysses=degree)
    if cfg.sequence is SequenceKind.ring:
        return Cut(ring=degree)
    if cfg.sequence in METHODS:  # pieces lie in the order of the row
        return Cut(ring=degree, zigzag=False)
    inner = cfg.ulysses_degree or max(
        count for count in range(1, degree + 1) if not (degree % count or heads % count or key_heads % count)
    )
    return Cut(ring=degree // inner, ulysses=inner)
