"""How documents are cut into pieces, and pieces put into rows of equal length.

A piece is a stretch of one document; a row is one or more pieces, one after another, and padding. Pure functions on
arrays of document borders: no token is read here.
"""

from bisect import bisect_left, insort
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.data.config import Packing

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """Which tokens stand in which row."""

    starts: Ints
    """(pieces,) index of a piece's first token."""
    lengths: Ints
    """(pieces,) tokens."""
    goes_on: NDArray[np.bool_]
    """(pieces,) whether the document goes on after the piece: its next token is then the last position's target."""
    borders: Ints
    """(rows + 1,) row r holds the pieces borders[r] up to borders[r + 1]."""


def concat(starts: Ints, stops: Ints, length: int) -> Pieces:
    """Join all documents and cut every `length` tokens. Only the last row has padding."""
    joined = np.concatenate([[0], np.cumsum(stops - starts)])  # where each document begins in the joined text
    total = int(joined[-1])
    cuts = np.union1d(joined, np.arange(0, total, length))
    document = np.searchsorted(joined, cuts[:-1], side="right") - 1
    first = starts[document] + cuts[:-1] - joined[document]
    row_starts = np.append(np.arange(0, total, length), total)
    return Pieces(first, np.diff(cuts), cuts[1:] < joined[document + 1], np.searchsorted(cuts, row_starts))


def one_document(starts: Ints, stops: Ints, length: int) -> Pieces:
    """Put each document into a row of its own; what is longer is left out, as if the document ended there."""
    lengths = np.minimum(stops - starts, length)
    return Pieces(starts, lengths, np.zeros(len(starts), bool), np.arange(len(starts) + 1))


def best_fit(starts: Ints, stops: Ints, length: int) -> Pieces:
    """Fit whole documents into rows, longest first, each into the fullest row that has room (best-fit decreasing).

    Only documents longer than a row are cut, every `length` tokens. "Fewer Truncations Improve Language Modeling",
    Ding et al. 2024, arXiv:2404.10830.
    """
    count = -(-(stops - starts) // length)
    document = np.repeat(np.arange(len(starts)), count)
    nth = np.arange(len(document)) - np.repeat(np.cumsum(count) - count, count)
    first = starts[document] + nth * length
    lengths = np.minimum(stops[document] - first, length)
    row = fullest_row_with_room(lengths, length)
    order = np.argsort(row, kind="stable")
    borders = np.searchsorted(row[order], np.arange(row.max(initial=-1) + 2))
    goes_on = first + lengths < stops[document]
    return Pieces(first[order], lengths[order], goes_on[order], borders)


def fullest_row_with_room(lengths: Ints, capacity: int) -> Ints:
    """Return the row of each piece.

    Rows are kept by the room they have left, and the rooms that occur in a sorted list of at most `capacity`
    numbers: a piece costs a binary search, however many rows are open.
    """
    row_of = np.empty(len(lengths), np.int64)
    rows_by_room: dict[int, list[int]] = {}
    rooms: list[int] = []
    rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        size = int(lengths[piece])
        at = bisect_left(rooms, size)
        if at == len(rooms):
            row, room = rows, capacity
            rows += 1
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[at]
        row_of[piece] = row
        left = room - size
        if left:
            waiting = rows_by_room.setdefault(left, [])
            if not waiting:
                insort(rooms, left)
            waiting.append(row)
    return row_of


PACKERS: dict[Packing, Callable[[Ints, Ints, int], Pieces]] = {
    Packing.concat: concat,
    Packing.best_fit: best_fit,
    Packing.document: one_document,
}
