"""Rows of equal length over tokenized documents, built when asked for."""

from dataclasses import dataclass
from hashlib import blake2b
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data import IGNORE
from trainer.data.batch import Batch
from trainer.data.config import Packing
from trainer.data.packing import PACKERS, Ints, Pieces
from trainer.data.tokens import Tokens


class Row(NamedTuple):
    """One row: arrays (sequence_length,) int64, see `Batch`."""

    input_ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    position_ids: NDArray[np.int64]


class Rows:
    """A sequence of rows. Row i is a function of the tokens, the selection, the packing and the length alone."""

    def __init__(
        self, tokens: Tokens, *, length: int, packing: Packing, pad_id: int, selected: "Selection | None" = None
    ) -> None:
        chosen = selected or Selection(tokens.starts, tokens.stops)
        self.length, self.packing, self.pad_id = length, packing, pad_id
        self.tokens, self.selected = tokens, chosen
        self.pieces = PACKERS[packing](chosen.starts, chosen.stops, length)
        counts = row_targets(self.pieces, tokens.scored)
        self.kept = np.flatnonzero(counts)  # a row with nothing to predict would teach nothing and cost a step's time
        self.targets: Ints = counts[self.kept]
        """(rows,) labels that are not IGNORE, known without building a row."""

    def __len__(self) -> int:
        return len(self.kept)

    def __getitem__(self, index: int) -> Row:
        if not -len(self) <= index < len(self):
            raise IndexError(f"row {index} of {len(self)}")
        ids, labels, positions = self.arrays(np.array([index % len(self)]))
        return Row(ids[0], labels[0], positions[0])

    def batch(self, indices: Ints) -> Batch:
        """Build the rows of `indices`, in that order."""
        return Batch(*map(torch.from_numpy, self.arrays(indices)))

    def arrays(self, indices: Ints) -> tuple[Ints, Ints, Ints]:
        """Return input ids, labels and positions of some rows, each (rows, length) int64."""
        shape = (len(indices), self.length)
        ids, labels = np.full(shape, self.pad_id, np.int64), np.full(shape, IGNORE, np.int64)
        positions = np.empty(shape, np.int64)
        for row, index in enumerate(self.kept[indices].tolist()):
            self.fill(index, ids[row], labels[row], positions[row])
        return ids, labels, positions

    def fill(self, row: int, ids: Ints, labels: Ints, positions: Ints) -> None:
        """Write one row. Padding is a document of its own: positions restart, so that nothing attends to it."""
        pieces, at = self.pieces, 0
        first, last = int(pieces.borders[row]), int(pieces.borders[row + 1])
        for piece in range(first, last):
            start, size = int(pieces.starts[piece]), int(pieces.lengths[piece])
            known = size - 1 + int(pieces.goes_on[piece])  # labels: the next token, as far as the document goes
            ids[at : at + size] = self.tokens.ids[start : start + size]
            labels[at : at + known] = self.tokens.ids[start + 1 : start + 1 + known]
            if self.tokens.scored is not None:
                labels[at : at + known][~self.tokens.scored[start + 1 : start + 1 + known]] = IGNORE
            positions[at : at + size] = np.arange(size)
            at += size
        positions[at:] = np.arange(self.length - at)

    def digest(self) -> str:
        """Return a hash of the selected documents: content, cuts and order, wherever their files lie."""
        parts = (self.tokens.keys, self.tokens.stops, self.selected.starts, self.selected.stops)
        return blake2b(b"".join(part.tobytes() for part in parts), digest_size=12).hexdigest()

    def describe(self) -> dict[str, Any]:
        """Return counts and shares that show what packing did to the documents."""
        pieces, slots = self.pieces, max(len(self) * self.length, 1)
        in_row = row_sums(pieces.lengths, pieces.borders)[self.kept]
        sizes = self.selected.stops - self.selected.starts
        cut = row_sums(is_cut(pieces, self.selected).astype(np.int64), pieces.borders)[self.kept] > 0
        return {
            "documents": len(sizes),
            "tokens": int(sizes.sum()),
            "rows": len(self),
            "targets": int(self.targets.sum()),
            "padding_share": 1 - int(in_row.sum()) / slots,
            "rows_with_cut_documents": float(cut.mean()) if len(self) else 0.0,
            "documents_longer_than_a_row": float((sizes > self.length).mean()) if len(sizes) else 0.0,
            "tokens_left_out": int(sizes.sum()) - int(pieces.lengths.sum()),
            "records_without_content": self.tokens.dropped,
            "rows_without_targets": len(pieces.borders) - 1 - len(self),
        }


@dataclass(frozen=True)
class Selection:
    """Some documents, or parts of them, by their borders in the token file."""

    starts: Ints
    stops: Ints


def row_targets(pieces: Pieces, scored: NDArray[np.bool_] | None) -> Ints:
    """Return the number of targets of each row: the tokens after each token, within the piece's document."""
    known = pieces.lengths - 1 + pieces.goes_on
    if scored is not None:
        firsts = pieces.starts + 1
        spans = zip(firsts.tolist(), (firsts + known).tolist(), strict=True)
        known = np.fromiter((np.count_nonzero(scored[a:b]) for a, b in spans), np.int64, len(known))
    return row_sums(known, pieces.borders)


def row_sums(values: Ints, borders: Ints) -> Ints:
    """Sum the values of each row's pieces; every row has at least one."""
    return np.add.reduceat(values, borders[:-1]) if len(borders) > 1 else np.zeros(0, np.int64)


def is_cut(pieces: Pieces, selected: Selection) -> NDArray[np.bool_]:
    """Return which pieces are not a whole document."""
    document = np.searchsorted(selected.stops, pieces.starts, side="right")
    whole = (pieces.starts == selected.starts[document]) & (pieces.starts + pieces.lengths == selected.stops[document])
    return np.asarray(~whole)
