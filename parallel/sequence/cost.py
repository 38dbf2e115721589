"""What splitting rows costs a layer of attention: bytes sent, kept for backward, and held while it runs. Exact."""

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum
from functools import cached_property
from typing import NamedTuple

from parallel.sequence.layout import Cut
from parallel.sequence.recurrence import BLOCK
from parallel.sequence.ulysses import Heads


class Decay(Enum):
    """What a linear layer's state is multiplied by at each token."""

    none = "none"
    of_heads = "of_heads"
    of_tokens = "of_tokens"


@dataclass(frozen=True)
class Shape:
    """A layer's attention over whole rows of a micro-batch."""

    batch: int
    length: int
    """Tokens of a row."""
    heads: int
    key_heads: int
    width: int
    """Values of a head."""
    value_bytes: int
    """Of q, k, v and the output; sums of rows and of gradients take at least 4."""

    @property
    def wide_bytes(self) -> int:
        return max(4, self.value_bytes)

    @property
    def whole_kept(self) -> int:
        """Bytes that one process keeps for backward: q, k, v, the output, and a sum a row of scores."""
        values = (2 * self.heads + 2 * self.key_heads) * self.width * self.value_bytes + self.heads * self.wide_bytes
        return self.batch * self.length * values


@dataclass(frozen=True)
class Cost:
    """Of one rank, one layer and one micro-batch, in bytes."""

    forward: int
    """Sent."""
    backward: int
    """Sent."""
    again: int
    """Sent by a block that runs again in backward, where attention's results were kept."""
    kept: int
    """From forward to backward."""
    working: int
    """Held beside what is kept, at most, by backward, which holds the most: sums of gradients, and messages with what
    they are sent from; not what kernels make in passing."""


class Across(NamedTuple):
    """Of a member of the outer group, for its heads, in bytes."""

    forward: int
    """Sent."""
    backward: int
    """Sent."""
    working: int
    """As `Cost.working`."""


CostAcross = Callable[[Cut, int, Shape, int, int], Across]
"""Of a cut, the member, the shape, and how many query and key heads the member computes."""


@dataclass(frozen=True)
class ExactCost:
    """`strategy.Exact` on one rank."""

    cut: Cut
    rank: int
    shape: Shape
    across: CostAcross

    @cached_property
    def heads(self) -> Heads:
        return Heads(self.shape.heads, self.shape.key_heads, self.cut.ulysses)

    @property
    def member(self) -> int:
        return self.rank // self.cut.ulysses

    def tokens(self, rank: int) -> int:
        return sum(map(len, self.cut.of_rank(self.shape.length, rank)))

    def of(self) -> Cost:
        s, piece = self.shape, self.rank % self.cut.ulysses
        value = s.batch * s.width * s.value_bytes
        queries = width(self.heads.q(piece))
        keys = width(self.heads.k(piece)) if self.heads.groups(piece) is None else queries
        held = sum(map(len, self.cut.of_member(s.length, self.member)))
        across = self.across(self.cut, self.member, s, queries, keys)
        to_heads, to_tokens = self.exchanged(piece)
        copies = 2 * (queries + 2 * keys) * held * value if self.cut.ulysses > 1 else 0
        return Cost(
            forward=to_heads * value + across.forward,
            backward=to_tokens * value + across.backward,
            again=to_heads * value,
            kept=(2 * queries + 2 * keys) * held * value + queries * held * s.batch * s.wide_bytes,
            working=max(across.working, copies),
        )

    def exchanged(self, piece: int) -> tuple[int, int]:
        """Token-heads that a rank sends to its ulysses neighbours, forward and backward."""
        base, forward, backward = self.member * self.cut.ulysses, 0, 0
        mine, queries, keys = self.tokens(self.rank), width(self.heads.q(piece)), width(self.heads.k(piece))
        for other in range(self.cut.ulysses):
            if other == piece:
                continue
            theirs = width(self.heads.q(other)) + 2 * width(self.heads.k(other))
            forward += theirs * mine + queries * self.tokens(base + other)
            backward += (queries + 2 * keys) * self.tokens(base + other) + width(self.heads.q(other)) * mine
        return forward, backward


@dataclass(frozen=True)
class StateCost:
    """Linear attention by gathered states (`states`), on one rank. What is sent does not depend on the length; what is
    held while it runs is told to about a quarter."""

    cut: Cut
    rank: int
    shape: Shape
    decay: Decay = Decay.none

    @cached_property
    def pieces(self) -> int:
        """Of the rank that has most, which all others send as many states as."""
        return max(len(self.cut.of_rank(self.shape.length, rank)) for rank in range(self.cut.degree))

    @property
    def state(self) -> int:
        """Values of a piece's states."""
        return self.shape.batch * self.shape.key_heads * self.shape.width**2

    def kept_of(self, tokens: int) -> int:
        """Bytes that these tokens keep: q, k, v, and decays."""
        s = self.shape
        decays = s.key_heads * s.wide_bytes if self.decay is Decay.of_tokens else 0
        return s.batch * tokens * ((s.heads + 2 * s.key_heads) * s.width * s.value_bytes + decays)

    def of(self) -> Cost:
        s, others = self.shape, self.cut.degree - 1
        mine = self.cut.of_rank(s.length, self.rank)
        tokens, most = sum(map(len, mine)), max(map(len, mine))
        products = s.batch * s.key_heads if self.decay is Decay.of_tokens else 0
        of_all = sum(len(self.cut.of_rank(s.length, rank)) for rank in range(self.cut.degree))
        through = s.batch * of_all * (1 if self.decay is Decay.none else s.key_heads)
        # In blocks: q, k, v, the output's gradient and all of theirs, two tiles of scores, two rows of states.
        blocks = -(-most // BLOCK)
        held = s.batch * most * ((3 * s.heads + 4 * s.key_heads) * s.width + 2 * s.heads * min(BLOCK, most))
        sent = others * self.pieces * (self.state + products) * s.wide_bytes
        return Cost(
            forward=sent,
            backward=others * self.pieces * self.state * s.wide_bytes,
            again=sent,
            kept=self.kept_of(tokens) + (len(mine) * self.state + through) * s.wide_bytes,
            working=(2 * of_all * self.state + 2 * blocks * self.state * (blocks > 1) + held) * s.wide_bytes,
        )


def width(part: slice) -> int:
    return int(part.stop - part.start)
