"""Rows of a source that is read as it comes, in an order that can be found again.

The documents are taken in blocks; a block is tokenized, packed and its rows are permuted. A block begins at a known
document, so a resume skips documents without tokenizing them, and no shuffle buffer's content is ever lost. Every
rank reads the whole sequence and keeps its own rows: the price of an order that no rank count changes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import numpy as np
import torch

from trainer.data.batch import Batch
from trainer.data.config import Packing
from trainer.data.order import permutation
from trainer.data.packing import Ints
from trainer.data.rows import Rows
from trainer.data.tokens import Document, tokens_in_memory
from trainer.errors import UserError

Mark = dict[str, int]
"""Where a block begins: epoch, documents of the epoch before it, samples of the run before it."""
UNSHUFFLED_BLOCK = 1000
"""Documents in a block where the order of the source is kept."""
ENCODED_TOGETHER = 100
"""Documents tokenized in one call, and the grain of a block's end."""
BLOCK_TOKENS = 1 << 24
"""A block ends early after this many tokens, so that books don't fill the memory: 32 or 64 MiB."""


@dataclass(frozen=True)
class StreamedRows:
    """What a stream is made of; `samples` reads it."""

    read: Callable[[int, int], Iterator[Any]]
    """(epoch, documents to skip) to the records of the epoch."""
    encode: Callable[[list[Any]], list[Document | None]]
    vocab_size: int
    length: int
    packing: Packing
    pad_id: int
    block_documents: int
    """Documents whose rows are shuffled among each other; 0 keeps the order of the source."""
    is_heldout: Callable[[Document], bool] = field(default=lambda document: False)
    """Documents that are never trained on."""

    def samples(self, seed: int, mark: Mark | None = None) -> "StreamedSamples":
        return StreamedSamples(self, seed, mark or {})


@dataclass(frozen=True)
class Block:
    """Rows of a stretch of documents."""

    rows: Rows
    order: Ints
    mark: Mark

    @property
    def first_sample(self) -> int:
        return self.mark["sample"]


class StreamedSamples:
    """Reads blocks one after another; going back, or far ahead without a mark, starts again at the first."""

    def __init__(self, source: StreamedRows, seed: int, mark: Mark) -> None:
        self.source, self.seed = source, seed
        self.blocks = self.read_blocks(mark)
        self.block = next(self.blocks)

    def take(self, first: int, count: int, mine: range) -> tuple[Batch, int, Mark]:
        """Return the samples of `mine` and the targets of `count` samples from `first` on."""
        targets, stop, kept = 0, first + count, []
        while first < stop:
            part = self.block_with(first)
            offset = first - part.first_sample
            rows = part.order[offset : offset + stop - first]
            targets += int(part.rows.targets[rows].sum())
            wanted = rows[max(mine.start - first, 0) : max(mine.stop - first, 0)]
            kept.append(part.rows.arrays(wanted))
            first += len(rows)
        return stacked(kept), targets, self.block.mark

    def block_with(self, sample: int) -> Block:
        if sample < self.block.first_sample:
            self.blocks = self.read_blocks({})
            self.block = next(self.blocks)
        while sample >= self.block.first_sample + len(self.block.order):
            self.block = next(self.blocks)
        return self.block

    def read_blocks(self, mark: Mark) -> Iterator[Block]:
        epoch, skip, sample = mark.get("epoch", 0), mark.get("document", 0), mark.get("sample", 0)
        while True:
            whole_epoch, before = skip == 0, sample
            for documents, read in self.read_documents(epoch, skip):
                block = self.make_block(documents, {"epoch": epoch, "document": skip, "sample": sample})
                skip += read
                sample += len(block.order)
                if len(block.order):
                    yield block
            if whole_epoch and sample == before:
                raise UserError(
                    "data.streaming=true: the source holds no document to train on. "
                    "Check data.path, data.split and data.text_field."
                )
            epoch, skip = epoch + 1, 0

    def read_documents(self, epoch: int, skip: int) -> Iterator[tuple[list[Document | None], int]]:
        """Yield the documents of one block after another, and how many records of the source they took."""
        records = self.source.read(epoch, skip)
        limit = self.source.block_documents or UNSHUFFLED_BLOCK
        while True:
            documents: list[Document | None] = []
            tokens = 0
            while len(documents) < limit and tokens < BLOCK_TOKENS:
                together = list(islice(records, min(ENCODED_TOGETHER, limit - len(documents))))
                if not together:
                    break
                encoded = self.source.encode(together)
                tokens += sum(len(document.ids) for document in encoded if document)
                documents += encoded
            if not documents:
                return
            yield documents, len(documents)

    def make_block(self, documents: list[Document | None], mark: Mark) -> Block:
        source = self.source
        kept = [document for document in documents if document and not source.is_heldout(document)]
        tokens = tokens_in_memory(kept, source.vocab_size)
        rows = Rows(tokens, length=source.length, packing=source.packing, pad_id=source.pad_id)
        shuffled = source.block_documents > 0
        order = permutation(len(rows), self.seed, *mark.values()) if shuffled else np.arange(len(rows))
        return Block(rows, order, mark)


def stacked(parts: list[tuple[Ints, Ints, Ints]]) -> Batch:
    return Batch(*(torch.from_numpy(np.concatenate(arrays)) for arrays in zip(*parts, strict=True)))
