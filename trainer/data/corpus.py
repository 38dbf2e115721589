"""The whole data side of a run, from its options: training rows, held-out rows, tokenizer."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.cache import Say, cache_folder, cached_tokens, digest_of
from trainer.data.chat import prepare_template
from trainer.data.chosen import open_eval_source, open_source
from trainer.data.config import DataConfig
from trainer.data.encode import Encoder, byte_encoder, chat_encoder, text_encoder
from trainer.data.rows import Rows, Selection
from trainer.data.streamed import StreamedRows
from trainer.data.tokenizer import load_tokenizer, tokenizer_digest, vocabulary_size
from trainer.data.tokens import Document, Tokens, tokens_in_memory
from trainer.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """What a run reads."""

    train: Rows | StreamedRows
    heldout: Rows
    tokenizer: PreTrainedTokenizerBase
    """With the chat template that was trained with, if any: save it beside the model."""
    vocab_size: int
    """One more than the largest id: embeddings the model needs."""
    fingerprint: str
    """Hash of everything that decides the training rows; for token files of the documents' content, wherever they
    lie. A run resumed with another one would see other samples."""

    def describe(self) -> dict[str, dict[str, Any]]:
        """Return counts and shares of the training rows (of a stream they are not known) and the held-out rows."""
        parts = {"train": self.train, "heldout": self.heldout}
        return {name: rows.describe() for name, rows in parts.items() if isinstance(rows, Rows)}


def build_corpus(
    cfg: DataConfig,
    *,
    seed: int,
    process_rank: int = 0,
    barrier: Callable[[], None] = lambda: None,
    say: Say = lambda message: None,
) -> Corpus:
    """Read, tokenize and pack what `cfg` names. Process 0 makes token files while the others wait at `barrier`.

    Args:
        seed: decides the order of a streamed source's files; token files don't depend on it.
        barrier: returns once all processes have called it.
        say: told how far tokenizing is, every few seconds, if it takes that long.

    Raises:
        UserError: data or tokenizer are missing, unreadable or unfit.
    """
    problems = cfg.problems()
    if problems:
        raise UserError("\n".join(problems))
    try:
        if process_rank == 0:
            corpus = assemble(cfg, seed, say)
    finally:
        barrier()  # also after an error, which the others will then meet themselves
    return corpus if process_rank == 0 else assemble(cfg, seed, say)


def assemble(cfg: DataConfig, seed: int, say: Say) -> Corpus:
    tokenizer = load_tokenizer(cfg.tokenizer)
    if cfg.is_chat:
        prepare_template(tokenizer, cfg.chat_template)
    parts = Parts(cfg, tokenizer, vocabulary_size(tokenizer), make_encoder(cfg, tokenizer), say)
    return parts.streamed(seed) if cfg.streaming else parts.from_files()


def make_encoder(cfg: DataConfig, tokenizer: PreTrainedTokenizerBase) -> Encoder:
    if cfg.is_chat:
        return chat_encoder(tokenizer, train_on_prompt=cfg.train_on_prompt)
    return byte_encoder(tokenizer.eos_token_id) if cfg.tokenizer == "byte" else text_encoder(tokenizer)


@dataclass(frozen=True)
class Parts:
    """What every part of a corpus is made with."""

    cfg: DataConfig
    tokenizer: PreTrainedTokenizerBase
    vocab_size: int
    encode: Encoder
    say: Say

    def from_files(self) -> Corpus:
        """Make a corpus of token files."""
        source, eval_source = open_source(self.cfg), open_eval_source(self.cfg)
        tokens = self.tokens(source)
        if eval_source is None:
            train, heldout = split(tokens, self.cfg.eval_fraction, may_cut=not self.cfg.is_chat)
            rows, eval_rows = self.rows(tokens, source.name, train), self.rows(tokens, source.name, heldout)
        else:
            rows, eval_rows = self.rows(tokens, source.name), self.rows(self.tokens(eval_source), eval_source.name)
        return self.corpus(rows, eval_rows, rows.digest())

    def streamed(self, seed: int) -> Corpus:
        """Make a corpus whose training rows are read as they come."""
        from trainer.data.hf import read_stream

        cfg = self.cfg
        read = partial(read_stream, cfg, cfg.split, seed=seed)
        limit = hash_limit(cfg.eval_fraction)
        source = StreamedRows(
            read, self.encode, self.vocab_size, cfg.sequence_length, cfg.packing, self.tokenizer.pad_token_id,
            block_documents=cfg.shuffle_buffer,
            is_heldout=(lambda document: document.key < limit) if cfg.eval_split is None else lambda document: False,
        )  # fmt: skip
        heldout = self.streamed_heldout(source)
        options = [cfg.path, cfg.name, cfg.split, cfg.eval_split, cfg.eval_fraction, cfg.shuffle_buffer, seed]
        return self.corpus(source, heldout, options)

    def streamed_heldout(self, source: StreamedRows) -> Rows:
        """Read until `eval_rows` rows are held out, or all of `eval_split`."""
        from trainer.data.hf import read_stream
        from trainer.data.sources import batched

        cfg, documents = self.cfg, list[Document | None]()
        wanted = cfg.eval_rows * cfg.sequence_length if cfg.eval_rows else float("inf")
        held = 0
        for batch in batched(read_stream(cfg, cfg.eval_split or cfg.split, 0, 0, seed=0), 100):
            for document in self.encode(batch):
                if document and (cfg.eval_split or source.is_heldout(document)):
                    documents.append(document)
                    held += min(len(document.ids), cfg.sequence_length)
            if held >= wanted:
                break
        if not documents:
            raise UserError(
                f"data.eval_fraction={cfg.eval_fraction}: the hash of no document of data.path={cfg.path} falls into "
                "that share. Give a larger one, or data.eval_split."
            )
        return self.rows(tokens_in_memory(documents, self.vocab_size), f"data.path={cfg.path}")

    def tokens(self, source: Any) -> Tokens:
        encoding = [tokenizer_digest(self.tokenizer), self.cfg.is_chat, self.cfg.train_on_prompt]
        tokens = cached_tokens(
            source, self.encode, encoding,
            vocab_size=self.vocab_size, folder=cache_folder(self.cfg.cache_dir), say=self.say,
        )  # fmt: skip
        if not len(tokens):
            lacking = "an answer of the assistant" if self.cfg.is_chat else "text"
            raise UserError(
                f"{source.name}: none of its {tokens.dropped} records has {lacking}. Check the files and "
                f"data.{'messages_field' if self.cfg.is_chat else 'text_field'}."
            )
        return tokens

    def rows(self, tokens: Tokens, name: str, selected: Selection | None = None) -> Rows:
        cfg = self.cfg
        rows = Rows(
            tokens,
            length=cfg.sequence_length,
            packing=cfg.packing,
            pad_id=self.tokenizer.pad_token_id,
            selected=selected,
        )
        if not len(rows):
            raise UserError(
                f"{name}: no row of {cfg.sequence_length} tokens holds anything to predict"
                f"{' (the answers lie beyond the cut)' if cfg.is_chat else ''}. Give more data, or a larger "
                "data.sequence_length."
            )
        return rows

    def corpus(self, train: Rows | StreamedRows, heldout: Rows, *identity: Any) -> Corpus:
        cfg = self.cfg
        options = [cfg.sequence_length, cfg.packing.value, cfg.train_on_prompt]
        fingerprint = digest_of(identity, tokenizer_digest(self.tokenizer), options)
        return Corpus(train, heldout, self.tokenizer, self.vocab_size, fingerprint)


def hash_limit(fraction: float) -> int:
    """Return the 64-bit number below which `fraction` of all hashes lie."""
    return int(fraction * 2**64)


def split(tokens: Tokens, fraction: float, *, may_cut: bool) -> tuple[Selection, Selection]:
    """Return the documents to train on and those to hold out.

    By the hash of a document's content: the same for every tokenizer and order, unmoved by other documents, and
    copies stay together. Where that picks none or all (there are few documents), the end of each is held out; where
    documents may not be cut (conversations), the one with the smallest hash.

    Raises:
        UserError: there is only one conversation.
    """
    starts, stops = tokens.starts, tokens.stops
    held = tokens.keys < np.uint64(hash_limit(fraction))
    if not held.any() or held.all():
        if may_cut:
            return split_ends(starts, stops, fraction)
        held = tokens.keys == tokens.keys.min()
        if held.all():
            raise UserError(
                "data.eval_fraction: there is only one conversation, which cannot be both trained on and held "
                "out. Give data.eval_path."
            )
    return Selection(starts[~held], stops[~held]), Selection(starts[held], stops[held])


def split_ends(starts: Any, stops: Any, fraction: float) -> tuple[Selection, Selection]:
    """Hold out the last tokens of every document that is long enough for both parts."""
    cuts = stops - np.ceil((stops - starts) * fraction).astype(np.int64)
    both = (cuts - starts >= 2) & (stops - cuts >= 2)
    if not both.any():
        raise UserError(
            "data.eval_fraction: the documents are too few and too short to hold anything out. Give more data "
            "or data.eval_path."
        )
    return Selection(starts, np.where(both, cuts, stops)), Selection(cuts[both], stops[both])
