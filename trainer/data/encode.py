"""Text to token ids, many documents in one call."""

import json
from collections.abc import Callable
from hashlib import blake2b
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

from trainer.data.chat import Message, Span, scored_characters
from trainer.data.tokens import Document
from trainer.errors import UserError

Encoder = Callable[[list[Any]], list[Document | None]]
"""Records to documents; None for a record that holds nothing to train on."""


def content_key(content: str) -> int:
    """Return a 64-bit hash of a document's content: what decides whether it is held out."""
    return int.from_bytes(blake2b(content.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def byte_encoder(end: int) -> Encoder:
    """Return what the byte tokenizer does, about 100 times as fast: its ids are the bytes."""

    def encode(texts: list[str]) -> list[Document | None]:
        return [one(text) if text.strip() else None for text in texts]

    def one(text: str) -> Document:
        ids = np.frombuffer(text.encode(), np.uint8).astype(np.uint16)
        return Document(np.append(ids, np.uint16(end)), None, content_key(text))

    return encode


def text_encoder(tokenizer: PreTrainedTokenizerBase) -> Encoder:
    """Encode as the tokenizer itself does (with a first token where it has one), and end each document with eos."""

    def encode(texts: list[str]) -> list[Document | None]:
        filled = [text for text in texts if text.strip()]
        encoded = iter(token_ids(tokenizer, filled))
        return [
            Document(ended(next(encoded), tokenizer.eos_token_id), None, content_key(text)) if text.strip() else None
            for text in texts
        ]

    return encode


def token_ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text, from the Rust tokenizer itself: transformers' own call takes twice as long."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    return [encoding.ids for encoding in backend.encode_batch_fast(texts)]


def ended(ids: list[int], end: int) -> np.ndarray[Any, np.dtype[np.uint32]]:
    return np.array(ids if ids and ids[-1] == end else [*ids, end], np.uint32)


def chat_encoder(tokenizer: PreTrainedTokenizerBase, *, train_on_prompt: bool) -> Encoder:
    """Render conversations with the tokenizer's template and score the tokens of the answers.

    The mark that ends an answer is scored with it, so that the model learns to stop.

    Raises:
        UserError: the tokenizer cannot say which characters a token stands for.
    """
    if not tokenizer.is_fast:
        raise UserError(
            f"data.tokenizer: {type(tokenizer).__name__} does not tell which characters a token stands for, so answers "
            "cannot be found. Give a tokenizer with a tokenizer.json."
        )

    def encode(conversations: list[list[Message] | None]) -> list[Document | None]:
        rendered = [scored_characters(tokenizer, messages) for messages in conversations if messages]
        texts = [text for text, _ in rendered]
        encoded = (
            tokenizer(texts, add_special_tokens=False, return_offsets_mapping=True, verbose=False) if texts else {}
        )
        found = zip(rendered, encoded.get("input_ids", ()), encoded.get("offset_mapping", ()), strict=True)
        return [one(messages, *next(found)) if messages else None for messages in conversations]

    def one(messages: list[Message], rendered: tuple[str, list[Span]], ids: list[int], offsets: list[Span]) -> Document:
        scored = np.append(scored_tokens(offsets, rendered[1]), True)  # the end, where the template left it out
        with_end = ended(ids, tokenizer.eos_token_id)
        key = content_key(json.dumps(messages, sort_keys=True, ensure_ascii=False, default=str))
        return Document(with_end, None if train_on_prompt else scored[: len(with_end)], key)

    return encode


def scored_tokens(offsets: list[Span], spans: list[Span]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Return which tokens, given by the characters they stand for, touch one of `spans`."""
    borders = np.array(offsets, np.int64).reshape(-1, 2)
    scored = np.zeros(len(borders), bool)
    for first, last in spans:
        scored |= (borders[:, 1] > first) & (borders[:, 0] < last)
    return scored
