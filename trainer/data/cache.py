"""Token files, made once and found again."""

import json
import os
from collections.abc import Callable, Iterator
from hashlib import blake2b
from pathlib import Path
from time import monotonic
from typing import Any

from trainer.data.encode import Encoder
from trainer.data.files import local_path
from trainer.data.sources import Source, batched
from trainer.data.tokens import Document, Tokens, open_tokens, write_tokens
from trainer.errors import UserError

FORMAT = 1
"""Raised whenever the same source would make other token files."""
ENCODED_TOGETHER = 1000
"""Most records tokenized in one call."""
SECONDS_BETWEEN_NEWS = 5.0

Say = Callable[[str], None]


def cache_folder(cache_dir: str | None) -> Path:
    """Return where token files are kept."""
    return local_path(cache_dir or os.environ.get("STOWAGE_CACHE") or "~/.cache/stowage") / "tokens"


def digest_of(*identity: Any) -> str:
    """Return a short hash of plain values."""
    return blake2b(json.dumps([FORMAT, *identity]).encode(), digest_size=12).hexdigest()


def cached_tokens(
    source: Source, encode: Encoder, encoding: list[Any], *, vocab_size: int, folder: Path, say: Say
) -> Tokens:
    """Return the source's token files, made if they are not there.

    Args:
        encoding: plain values that change when `encode` would give other tokens.

    Raises:
        UserError: the source cannot be read, or the cache not be written.
    """
    place = folder / digest_of(source.identity, encoding, vocab_size)
    tokens = open_tokens(place)
    if tokens is None:
        try:
            write_tokens(place, told(source, encode, say), vocab_size)
        except OSError as error:
            raise UserError(
                f"data.cache_dir: cannot write token files to {place} ({error}). Give a folder with room "
                "that you may write to, as data.cache_dir or STOWAGE_CACHE."
            ) from error
        tokens = open_tokens(place)
        assert tokens is not None, f"{place} was just written and cannot be read"
    return tokens


def told(source: Source, encode: Encoder, say: Say) -> Iterator[Document | None]:
    """Yield the source's documents; tell how far it is while it takes long."""
    documents, count, last = 0, 0, monotonic()
    for batch in batched(source.records(), ENCODED_TOGETHER):
        for document in encode(batch):
            documents += 1
            count += len(document.ids) if document else 0
            yield document
        if monotonic() - last > SECONDS_BETWEEN_NEWS:
            last = monotonic()
            say(f"tokenizing {source.name}: {documents:,} documents, {count / 1e6:.1f} million tokens")
