"""What splitting rows costs a layer of attention: bytes sent, kept for backward, and held while it runs. Exact."""

from dataclasses import dataclass
from functools import cached_property

from parallel.sequence.layout import Cut
from parallel.sequence.ulysses import Heads


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
    kept: int
    """From forward to backward."""
    working: int
    """Held by what runs beside what is kept and what is handed in and out, at most; backward holds the most."""


@dataclass(frozen=True)
class ExactCost:
    """`strategy.Exact` on one rank."""

    cut: Cut
    rank: int
    shape: Shape

    @cached_property
    def heads(self) -> Heads:
        return Heads(self.shape.heads, self.shape.key_heads, self.cut.ulysses)

    @property
    def member(self) -> int:
        return self.rank // self.cut.ulysses

    def tokens(self, rank: int) -> int:
        return sum(map(len, self.cut.of_rank(self.shape.length, rank)))

    def member_tokens(self, member: int) -> int:
        return sum(map(len, self.cut.of_member(self.shape.length, member)))

    def of(self) -> Cost:
        s, piece = self.shape, self.rank % self.cut.ulysses
        value, wide = s.batch * s.width * s.value_bytes, s.batch * s.width * s.wide_bytes
        queries = width(self.heads.q(piece))
        keys = width(self.heads.k(piece)) if self.heads.groups(piece) is None else queries
        held = self.member_tokens(self.member)
        hops = [self.member_tokens((self.member - hop) % self.cut.ring) for hop in range(self.cut.ring)]
        passed = 2 * keys * value * sum(hops[:-1])
        gradients = 2 * keys * wide * sum(hops) if self.cut.ring > 1 else 0
        to_heads, to_tokens = self.exchanged(piece)
        most = max(hops)
        ring_working = 2 * keys * most * (value + 2 * wide) + queries * held * wide if self.cut.ring > 1 else 0
        copies = 2 * (queries + 2 * keys) * held * value if self.cut.ulysses > 1 else 0
        return Cost(
            forward=to_heads * value + passed,
            backward=to_tokens * value + passed + gradients,
            kept=(2 * queries + 2 * keys) * held * value + queries * held * s.batch * s.wide_bytes,
            working=max(ring_working, copies),
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


def width(part: slice) -> int:
    return int(part.stop - part.start)
