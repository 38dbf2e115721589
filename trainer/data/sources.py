"""Where records come from: Python's own library, files, or datasets of the Hugging Face hub.

A record is a string, or with chat the messages of a conversation (None where it has no answer). JSON, Parquet and
the hub are read by the `datasets` library, in its streaming mode: token files are the only copy made.
"""

import gzip
import os
import sysconfig
import tokenize
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from glob import escape
from pathlib import Path
from typing import Any

from trainer.data.chat import messages_of
from trainer.data.config import DataConfig
from trainer.data.config import Source as Kind
from trainer.data.files import JSON_SUFFIXES, TEXT_SUFFIXES, file_problems, find_files
from trainer.errors import UserError, first_line

NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}
"""Folders of the standard library's tree that are not the library."""


@dataclass(frozen=True)
class Source:
    """Records, and what tells them from other records."""

    name: str
    """As the user wrote it, for messages."""
    identity: list[Any]
    """Plain values that change when the records may have changed."""
    records: Callable[[], Iterator[Any]]


def file_source(cfg: DataConfig, option: str, path: str) -> Source:
    is_text = cfg.source is Kind.text
    suffixes = TEXT_SUFFIXES if is_text else JSON_SUFFIXES
    problems = file_problems(option, path, suffixes)
    if problems:
        raise UserError("\n".join(problems))
    files = find_files(path, suffixes)
    fields = [] if is_text else [cfg.messages_field if cfg.is_chat else cfg.text_field]

    def records() -> Iterator[Any]:
        if is_text:
            return (read_text(option, file) for file in files)
        return (extract(cfg, record, f"{option}={path}") for file in files for record in json_records(option, file))

    return Source(f"{option}={path}", [cfg.source.value, *fields, *files_identity(files)], records)


def files_identity(files: list[Path]) -> list[Any]:
    """Return path, size and time of change of each file."""
    return [[str(file.resolve()), (status := file.stat()).st_size, status.st_mtime_ns] for file in files]


def stdlib_files() -> list[Path]:
    """Return the source files of this Python's standard library, sorted, without its tests."""
    root = Path(sysconfig.get_path("stdlib"))
    files = []
    for folder, folders, names in os.walk(root):
        folders[:] = sorted(name for name in folders if name not in NOT_SOURCE)
        files += [Path(folder, name) for name in sorted(names) if name.endswith(".py")]
    if not files:
        raise UserError(
            f"data=stdlib: found no source files of Python's standard library in {root} (this Python may be a "
            "stripped or zipped one). Use data=text data.path=... with text of your own."
        )
    return files


def stdlib_texts(files: list[Path]) -> Iterator[str]:
    """Yield each file's text, in the encoding it declares; what cannot be read is left out."""
    for file in files:
        try:
            with tokenize.open(file) as opened:
                yield opened.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            yield ""


def read_text(option: str, file: Path) -> str:
    """Return a whole file as one document.

    Read here and not through `datasets`: its text builder resolves every file as a pattern (160 ms each in a folder
    of 1000) and turns all line ends into newlines.
    """
    try:
        content = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
        return content.decode("utf-8-sig")
    except (OSError, EOFError) as error:
        raise UserError(f"{option}={file}: cannot be read ({error}). Check the file and its permissions.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{option}={file}: is not UTF-8 text ({error}). Convert it, or leave it out.") from error


def json_records(option: str, file: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of one JSON file."""
    import datasets

    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # it logs what is raised as well
    name = escape(str(file))  # datasets takes every path for a pattern
    try:
        yield from datasets.load_dataset("json", data_files=[name], split="train", streaming=True)
    except StopIteration:
        return  # an empty file
    except Exception as error:  # what is raised depends on the reader within
        raise UserError(
            f"{option}={file}: cannot be read as JSON lines ({first_line(error)}). Each line must be one "
            "JSON object, with the same fields of the same types in every line."
        ) from error


def extract(cfg: DataConfig, record: dict[str, Any], where: str) -> Any:
    """Return what a record is trained on: its text, or its messages."""
    return messages_of(record, cfg.messages_field) if cfg.is_chat else text_of(record, cfg.text_field, where)


def text_of(record: dict[str, Any], field: str, where: str) -> str:
    """Return a record's text; "" where it is null.

    Raises:
        UserError: the record has no such field, or something else in it.
    """
    if field not in record:
        raise UserError(
            f"data.text_field={field}: a record of {where} has only the fields {', '.join(record)}. "
            "Name the one with the text."
        )
    text = record[field]
    if text is not None and not isinstance(text, str):
        raise UserError(
            f"data.text_field={field}: holds {type(text).__name__} ({str(text)[:60]}) in {where}, not text. "
            f"The fields are {', '.join(record)}."
        )
    return text or ""


def batched(records: Iterator[Any], size: int, characters: int = 4 << 20) -> Iterator[list[Any]]:
    """Yield lists of at most `size` records, ended early after some characters of text."""
    batch, held = [], 0
    for record in records:
        batch.append(record)
        held += len(record) if isinstance(record, str) else 0
        if len(batch) == size or held >= characters:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch
