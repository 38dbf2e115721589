"""Which tokens of a packed row lie on which rank, and which pairs of them attend to each other.

A row of S tokens is cut into chunks along its length; a member of the ring holds one of R (contiguous) or two of 2 R
(zigzag: chunk j and chunk 2 R - 1 - j, so that causal work is even), and its U ulysses ranks a piece each of what it
holds, in order. Borders are S i // n: any length will do, pieces differ by a token.

Whatever a rank holds stands there in the order of the row, so a document's tokens on a rank are one local slice. What
a member's queries have to see of another's keys is then a few rectangles without masks, and of its own one triangle a
document: `Layout.tiles`. Tokens of other documents are never touched.

All of it follows from the position ids of the row, which every rank of a group can read: nothing is sent to agree.
"""

import functools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor


class Tile(NamedTuple):
    """Queries that see keys: all of them or, square and `causal`, each those up to its own place."""

    rows: slice
    """Of the micro-batch."""
    q: slice
    """Of the tokens that the asking member holds."""
    k: slice
    """Of the tokens that the asked member holds."""
    causal: bool

    @property
    def pairs(self) -> int:
        """Scores computed, a head and a row."""
        queries, keys = int(self.q.stop - self.q.start), int(self.k.stop - self.k.start)
        return queries * (queries + 1) // 2 if self.causal else queries * keys


@dataclass(frozen=True)
class Cut:
    """How any row is cut: over a ring of `ring` members, each of `ulysses` ranks that lie side by side."""

    ring: int = 1
    ulysses: int = 1
    zigzag: bool = True

    @property
    def degree(self) -> int:
        return self.ring * self.ulysses

    @property
    def shortest(self) -> int:
        """Tokens of the shortest row that leaves no rank and no chunk empty."""
        return self.ring * (2 if self.zigzag and self.ring > 1 else 1) * self.ulysses

    def of_member(self, length: int, member: int) -> list[range]:
        """Places in a row of `length` that a member of the ring holds, ascending."""
        count = 2 * self.ring if self.zigzag else self.ring
        chunks = (member, count - 1 - member) if self.zigzag else (member,)
        return joined(range(length * i // count, length * (i + 1) // count) for i in chunks)

    def of_rank(self, length: int, rank: int) -> list[range]:
        """Places that `rank` of the whole group holds, ascending: rank = member * ulysses + its place in the member."""
        member, piece = divmod(rank, self.ulysses)
        held = self.of_member(length, member)
        total = sum(map(len, held))
        return within(held, range(total * piece // self.ulysses, total * (piece + 1) // self.ulysses))


def joined(ranges: Iterable[range]) -> list[range]:
    """The same places with ranges that follow each other made one, and without empty ones."""
    found: list[range] = []
    for each in ranges:
        if found and found[-1].stop == each.start:
            found[-1] = range(found[-1].start, each.stop)
        elif each:
            found.append(each)
    return found


def within(ranges: Sequence[range], part: range) -> list[range]:
    """Places number part.start up to part.stop of all those in `ranges`."""
    found, at = [], 0
    for each in ranges:
        begin, end = max(part.start - at, 0), min(part.stop - at, len(each))
        if begin < end:
            found.append(each[begin:end])
        at += len(each)
    return found


@dataclass(frozen=True)
class Layout:
    """A micro-batch of packed rows, cut over the ranks of a sequence group."""

    cut: Cut
    length: int
    """Tokens of a whole row."""
    documents: tuple[tuple[int, ...], ...]
    """For each row of the micro-batch the places where a document begins, ascending, 0 first."""
    _tiles: dict[tuple[int, int, bool], list[Tile]] = field(default_factory=dict, repr=False, compare=False)

    def held(self, rank: int) -> int:
        """Tokens of a row that a rank of the group holds."""
        return sum(map(len, self.cut.of_rank(self.length, rank)))

    def member_holds(self, member: int) -> int:
        """Tokens of a row that a member of the ring holds."""
        return sum(map(len, self.cut.of_member(self.length, member)))

    def take(self, rows: Tensor, rank: int) -> Tensor:
        """Cut from (batch, length) what `rank` holds: (batch, held)."""
        return torch.cat([rows[:, places.start : places.stop] for places in self.cut.of_rank(self.length, rank)], dim=1)

    def put(self, parts: Sequence[Tensor]) -> Tensor:
        """Put together again what the ranks hold, (batch, held, ...) each in rank order; the inverse of `take`."""
        rows = parts[0].new_empty(parts[0].shape[0], self.length, *parts[0].shape[2:])
        for rank, part in enumerate(parts):
            at = 0
            for places in self.cut.of_rank(self.length, rank):
                rows[:, places.start : places.stop] = part[:, at : at + len(places)]
                at += len(places)
        return rows

    def tiles(self, asking: int, asked: int, causal: bool) -> list[Tile]:
        """What queries of member `asking` see of the keys of member `asked`. Found once, used by all layers."""
        key = (asking, asked, causal)
        if key not in self._tiles:
            found: list[Tile] = []
            for rows, starts in alike(self.documents):
                found += row_tiles(self.cut, self.length, starts, rows, asking, asked, causal)
            self._tiles[key] = found
        return self._tiles[key]

    def pairs(self, member: int, causal: bool = True) -> int:
        """Scores that a member of the ring computes a head, over all rows."""
        batch = len(self.documents)
        return sum(
            tile.pairs * len(range(*tile.rows.indices(batch)))
            for asked in range(self.cut.ring)
            for tile in self.tiles(member, asked, causal)
        )


def alike(documents: Sequence[tuple[int, ...]]) -> list[tuple[slice, tuple[int, ...]]]:
    """Neighbouring rows of the same documents, which can be computed together."""
    found: list[tuple[slice, tuple[int, ...]]] = []
    for row, starts in enumerate(documents):
        if found and found[-1][1] == starts:
            found[-1] = (slice(found[-1][0].start, row + 1), starts)
        else:
            found.append((slice(row, row + 1), starts))
    return found


class Run(NamedTuple):
    """Neighbouring tokens of one document, on one member."""

    document: int
    places: range
    """In the row."""
    at: int
    """Where they begin among what the member holds."""


@functools.lru_cache(maxsize=512)
def runs(cut: Cut, length: int, starts: tuple[int, ...], member: int) -> list[Run]:
    """What a member holds of each document of a row, in order."""
    found: list[Run] = []
    borders = (*starts, length)
    at = 0
    for places in cut.of_member(length, member):
        for document, begin in enumerate(starts):
            low, high = max(begin, places.start), min(borders[document + 1], places.stop)
            if low < high:
                found.append(Run(document, range(low, high), at + low - places.start))
        at += len(places)
    return found


def row_tiles(
    cut: Cut, length: int, starts: tuple[int, ...], rows: slice, asking: int, asked: int, causal: bool
) -> list[Tile]:
    """Tiles of rows that have the same documents."""
    queries, keys = runs(cut, length, starts, asking), runs(cut, length, starts, asked)
    found: list[Tile] = []
    if asking == asked:  # a document's tokens are one slice here, ascending
        for document in dict.fromkeys(run.document for run in queries):
            own = [run for run in queries if run.document == document]
            part = slice(own[0].at, own[-1].at + len(own[-1].places))
            found.append(Tile(rows, part, part, causal))
        return found
    of_document: dict[int, list[Run]] = {}
    for run in keys:
        of_document.setdefault(run.document, []).append(run)
    for query in queries:
        for key in of_document.get(query.document, []):
            if not causal or key.places.stop <= query.places.start:
                q, k = (slice(run.at, run.at + len(run.places)) for run in (query, key))
                add(found, Tile(rows, q, k, False))
    return found


def add(tiles: list[Tile], tile: Tile) -> None:
    """Append a rectangle, or make the last one larger where both are one."""
    if tiles:
        last = tiles[-1]
        if last.q == tile.q and last.k.stop == tile.k.start:
            tiles[-1] = last._replace(k=slice(last.k.start, tile.k.stop))
            return
        if last.k == tile.k and last.q.stop == tile.q.start:
            tiles[-1] = last._replace(q=slice(last.q.start, tile.q.stop))
            return
    tiles.append(tile)


def document_starts(positions: Tensor) -> tuple[tuple[int, ...], ...]:
    """Where documents begin in rows of position ids (batch, length) on the host: wherever they do not go on by one."""
    new = torch.ones_like(positions, dtype=torch.bool)
    new[:, 1:] = positions[:, 1:] != positions[:, :-1] + 1
    return tuple(tuple(row.nonzero().flatten().tolist()) for row in new)
