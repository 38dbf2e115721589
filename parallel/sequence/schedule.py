"""LightSeq's balanced schedule: which block of causal attention each member computes when, and who sends what for it.

Of P members with contiguous parts of a row, r has the pairs (r, j), j <= r, of its queries with keys of j: the last
one P times as many as the first. In steps t = 0 .. P // 2 it computes

    t = 0           (r, r), a triangle
    r >= t          (r, r - t), of keys and values that r - t lends
    r < t           (P + r - t, r), of queries that P + r - t lends: r helps, and gives back what they have seen

so each pair is computed once and each member has one block a step. With an even P the last step has the same pair for
both; the paper leaves it to the owner, while half of the members wait. Here owner and helper take half of its queries
each, so that every member computes P / 2 blocks at any P (a triangle is half a block).

Paper: Li, Shao, Xie, Xing, Ma, Stoica, Gonzalez, Zhang 2023, arXiv:2310.03294 (LightSeq, later DistFlashAttn).
"""

from collections.abc import Iterable
from typing import NamedTuple, Protocol

from torch import Tensor

from parallel.sequence.layout import Layout, Tile
from parallel.sequence.links import Connection, Pending


class Job(NamedTuple):
    """What a member computes in a step: tiles of queries of `asking` and keys of `asked`, one of which is itself."""

    asking: int
    asked: int
    tiles: list[Tile]
    """None where no document lies in both parts: then nothing is sent, either."""

    @property
    def queries(self) -> slice:
        """Tokens of `asking` that the tiles lie in."""
        return span(tile.q for tile in self.tiles)

    @property
    def keys(self) -> slice:
        """Tokens of `asked` that the tiles lie in."""
        return span(tile.k for tile in self.tiles)

    def at_queries(self) -> list[Tile]:
        """The tiles, counting queries from the first of `queries`."""
        start = self.queries.start
        return [tile._replace(q=slice(tile.q.start - start, tile.q.stop - start)) for tile in self.tiles]

    def at_keys(self) -> list[Tile]:
        """The tiles, counting keys from the first of `keys`."""
        start = self.keys.start
        return [tile._replace(k=slice(tile.k.start - start, tile.k.stop - start)) for tile in self.tiles]

    def lent_by(self, member: int) -> slice:
        """Tokens of one of the two that the other one needs."""
        return self.queries if self.asking == member else self.keys


def span(parts: Iterable[slice]) -> slice:
    """The smallest slice that holds them all; empty for none."""
    every = list(parts)
    return slice(min((part.start for part in every), default=0), max((part.stop for part in every), default=0))


def job(layout: Layout, step: int, member: int) -> Job:
    """What `member` computes in `step`, from 1: a pair of its own queries, or one of a later member whom it helps."""
    members = layout.cut.ring
    asking, asked = (member, member - step) if member >= step else (member - step + members, member)
    tiles = layout.tiles(asking, asked, True)
    if 2 * step == members:
        tiles = [half for tile in tiles if (half := half_of(tile, first=asking == member)).pairs]
    return Job(asking, asked, tiles)


def half_of(tile: Tile, *, first: bool) -> Tile:
    """The first or the second half of a rectangle's queries."""
    middle = (tile.q.start + tile.q.stop) // 2
    return tile._replace(q=slice(tile.q.start, middle) if first else slice(middle, tile.q.stop))


class Turn(NamedTuple):
    """A step, seen from a member. It borrows from the member `step` before it and lends to the one `step` after it;
    results go the other way."""

    step: int
    mine: Job
    other: Job
    """Of the member `step` after this one."""


def turns(layout: Layout, member: int) -> list[Turn]:
    members = layout.cut.ring
    steps = range(1, members // 2 + 1)
    return [Turn(step, job(layout, step, member), job(layout, step, (member + step) % members)) for step in steps]


class Loan(NamedTuple):
    """Tokens of a row that a member lends and borrows in a step."""

    keys_lent: int = 0
    queries_lent: int = 0
    keys_borrowed: int = 0
    queries_borrowed: int = 0


def loans(layout: Layout, member: int) -> list[Loan]:
    """Count them, for each step."""
    found = []
    for turn in turns(layout, member):
        lent = count(turn.other.lent_by(member))
        borrowed = count(turn.mine.lent_by((member - turn.step) % layout.cut.ring))
        found.append(
            Loan(
                keys_lent=lent if turn.other.asked == member else 0,
                queries_lent=lent if turn.other.asking == member else 0,
                keys_borrowed=borrowed if turn.mine.asking == member else 0,
                queries_borrowed=borrowed if turn.mine.asked == member else 0,
            )
        )
    return found


def count(tokens: slice) -> int:
    return int(tokens.stop - tokens.start)


class Work(Protocol):
    """What is lent, computed and given back: of forward, or of backward. Tensors are (batch, heads, tokens, ...)."""

    keys: list[Tensor]
    """Lent to who has the queries."""
    queries: list[Tensor]
    """Lent to a helper."""
    for_keys: list[Tensor]
    """Like what comes back for keys: of their heads, dtype and width; none where nothing does."""
    for_queries: list[Tensor]
    """Like what comes back for queries."""

    def alone(self, tiles: list[Tile]) -> None:
        """Compute tiles of this member's queries and keys."""
        ...

    def with_keys(self, job: Job, keys: list[Tensor]) -> list[Tensor]:
        """Compute tiles of this member's queries with borrowed keys; return what their owner gets back."""
        ...

    def with_queries(self, job: Job, queries: list[Tensor]) -> list[Tensor]:
        """Compute tiles of borrowed queries with this member's keys; return what their owner gets back."""
        ...

    def add_to_keys(self, job: Job, results: list[Tensor]) -> None:
        """Add what has come back for lent keys."""
        ...

    def add_to_queries(self, job: Job, results: list[Tensor]) -> None:
        """Add what has come back for lent queries."""
        ...


def carry_out(work: Work, layout: Layout, links: Connection) -> None:
    """Go over the steps. What is borrowed for step t + 1 comes while t is computed; results of t go while t + 1 is.

    All members exchange in the same order, loans 1, 2, results 1, loans 3, results 2, ..., as queues of messages want.
    """
    mine, members = links.index, links.count

    def begin(turn: Turn) -> Pending:
        before, after = (mine - turn.step) % members, (mine + turn.step) % members
        lent = work.queries if turn.other.asking == mine else work.keys
        send = [x[:, :, turn.other.lent_by(mine)] for x in lent] if turn.other.tiles else []
        like = work.keys if turn.mine.asking == mine else work.queries
        room = [empty(x, turn.mine.lent_by(before)) for x in like] if turn.mine.tiles else []
        return exchange(links, send, after, room, before)

    def give_back(turn: Turn, results: list[Tensor]) -> Pending:
        before, after = (mine - turn.step) % members, (mine + turn.step) % members
        like = work.for_queries if turn.other.asking == mine else work.for_keys
        room = [empty(x, turn.other.lent_by(mine)) for x in like] if turn.other.tiles else []
        return exchange(links, results, before, room, after)

    def compute(job: Job, borrowed: list[Tensor]) -> list[Tensor]:
        if not job.tiles:
            return []
        return (work.with_keys if job.asking == mine else work.with_queries)(job, borrowed)

    def take(job: Job, results: list[Tensor]) -> None:
        if results:
            (work.add_to_queries if job.asking == mine else work.add_to_keys)(job, results)

    steps = turns(layout, mine)
    borrowing = begin(steps[0])
    work.alone(layout.tiles(mine, mine, True))
    lent, returning = steps[0].other, Pending([])  # of the step before
    for turn, following in zip(steps, [*steps[1:], None], strict=True):
        borrowed = borrowing.wait()
        borrowing = begin(following) if following is not None else Pending([])
        results = compute(turn.mine, borrowed)
        del borrowed  # a step's buffers live no longer than `lightseq.cost_of` says
        take(lent, returning.wait())
        lent, returning = turn.other, give_back(turn, results)
    take(lent, returning.wait())


def empty(like: Tensor, tokens: slice) -> Tensor:
    """Room for some tokens of what is (batch, heads, tokens) or (batch, heads, tokens, width)."""
    return like.new_empty((*like.shape[:2], count(tokens), *like.shape[3:]))


def exchange(links: Connection, send: list[Tensor], to: int, coming: list[Tensor], source: int) -> Pending:
    """Send and receive where there is something to."""
    return links.exchange(send, to if send else None, coming, source if coming else None)
