"""What the user says about data."""

import os.path
import re
from dataclasses import dataclass, fields
from enum import Enum

from trainer.data.files import JSON_SUFFIXES, TEXT_SUFFIXES, file_problems, local_path

HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
"""A name on the Hugging Face hub: `owner/name`, or one of the old ones without owner."""


class Source(Enum):
    """Where documents come from."""

    stdlib = "stdlib"
    text = "text"
    jsonl = "jsonl"
    chat = "chat"
    hf = "hf"


class Content(Enum):
    """What a record of a hub dataset holds."""

    text = "text"
    chat = "chat"


class Packing(Enum):
    """How documents become rows of equal length."""

    concat = "concat"
    best_fit = "best_fit"
    document = "document"


@dataclass(kw_only=True)
class DataConfig:
    source: Source = Source.stdlib
    """Set by `data=...`: stdlib (Python's own source text), text, jsonl, chat, or hf (a hub dataset)."""
    path: str | None = None
    """File, folder, glob, or several separated by commas (gz allowed); for hf the dataset's name or local folder."""
    eval_path: str | None = None
    """Held-out files. Without it, `eval_fraction` of the documents, chosen by a hash of their content, is held out."""
    eval_fraction: float = 0.05
    """Share of the documents held out where nothing else is; of each document's end where the hash picks no document
    (there are only a few)."""
    eval_rows: int = 64
    """Held-out rows measured at each evaluation, spread evenly over all of them; 0 measures all."""
    tokenizer: str = "byte"
    """`byte`, the path of a tokenizer.json or of a folder with a tokenizer, or a hub name."""
    sequence_length: int = 256
    """Tokens in a row."""
    packing: Packing = Packing.concat
    """concat: joined and cut every sequence_length; best_fit: whole documents fitted into rows, only overlong ones cut;
    document: one document a row, cut and padded, as the low-rank papers did. Attention never crosses documents."""
    text_field: str = "text"
    """Field of a jsonl or hf record that holds the text."""
    content: Content = Content.text
    """hf only: what records hold. text: `text_field` is a document; chat: a conversation, as in data=chat."""
    messages_field: str = "messages"
    """Field of a chat record that holds [{role, content}, ...]; prompt/response records are accepted too."""
    chat_template: str | None = None
    """Jinja file used in place of the tokenizer's own chat template."""
    train_on_prompt: bool = False
    """chat only: count the loss on every token instead of on the answers alone."""
    name: str | None = None
    """hf only: the dataset's configuration."""
    split: str = "train"
    """hf only: split that is trained on."""
    eval_split: str | None = None
    """hf only: split that is held out."""
    streaming: bool = False
    """hf only: read documents as they come instead of downloading and tokenizing all of them first."""
    shuffle_buffer: int = 1000
    """streaming only: rows are shuffled within blocks of this many documents; 0 keeps the order of the source."""
    cache_dir: str | None = None
    """Where token files are kept; default $STOWAGE_CACHE, else ~/.cache/stowage."""

    @property
    def is_chat(self) -> bool:
        """Whether records are conversations."""
        return self.source is Source.chat or (self.source is Source.hf and self.content is Content.chat)

    def problems(self) -> list[str]:
        """Say everything that is wrong and can be known without reading data."""
        return [*self.number_problems(), *self.path_problems(), *self.tokenizer_problems(), *self.useless_options()]

    def number_problems(self) -> list[str]:
        found = []
        if self.sequence_length < 2:
            found.append(
                f"data.sequence_length={self.sequence_length}: must be at least 2, a token and the one to predict"
            )
        if not 0 < self.eval_fraction < 1:
            found.append(
                f"data.eval_fraction={self.eval_fraction}: must lie between 0 and 1, such as 0.05; "
                "to hold out other documents give data.eval_path or data.eval_split"
            )
        if self.eval_rows < 0:
            found.append(f"data.eval_rows={self.eval_rows}: must be at least 0 (0 measures all held-out rows)")
        if self.shuffle_buffer < 0:
            found.append(f"data.shuffle_buffer={self.shuffle_buffer}: must be at least 0 (0 keeps the source's order)")
        if self.streaming and self.eval_rows == 0 and self.eval_split is None:
            found.append(
                "data.eval_rows=0 with data.streaming=true: a stream has no end to hold all of out; "
                "give a number of rows, such as 64, or data.eval_split"
            )
        return found

    def path_problems(self) -> list[str]:
        found = []
        if self.source is Source.hf:
            found += hub_problems("data.path", self.path, "a dataset's name on the hub or a local folder")
        elif self.source is not Source.stdlib:
            suffixes = TEXT_SUFFIXES if self.source is Source.text else JSON_SUFFIXES
            if not self.path:
                found.append(
                    f"data.path is not set: data={self.source.value} needs a file, a folder or a glob, "
                    f"such as data.path='corpus/*{suffixes[0]}'"
                )
            else:
                found += file_problems("data.path", self.path, suffixes)
            if self.eval_path:
                found += file_problems("data.eval_path", self.eval_path, suffixes)
        if self.chat_template is not None and not os.path.isfile(local_path(self.chat_template)):
            found.append(f"data.chat_template={self.chat_template}: no such file; give a file with a Jinja template")
        return found

    def tokenizer_problems(self) -> list[str]:
        if self.tokenizer == "byte":
            return []
        return hub_problems("data.tokenizer", self.tokenizer, "`byte`, a tokenizer.json, a folder or a hub name")

    def useless_options(self) -> list[str]:
        """Name the options that differ from their default and would have no effect."""
        hub, json = self.source is Source.hf, self.source is Source.jsonl
        useful = {
            "path": (self.source is not Source.stdlib, "data=stdlib reads Python's own library; use data=text"),
            "eval_path": (self.source in (Source.text, Source.jsonl, Source.chat), "use data=text, jsonl or chat"),
            "eval_fraction": (not (self.eval_path or self.eval_split), "what is held out is named already; drop one"),
            "text_field": (json or (hub and not self.is_chat), "it is read with data=jsonl and data=hf"),
            "content": (hub, "it is read with data=hf"),
            "messages_field": (self.is_chat, "it is read with data=chat and data.content=chat"),
            "chat_template": (self.is_chat, "it is used with data=chat and data.content=chat"),
            "train_on_prompt": (self.is_chat, "it is used with data=chat and data.content=chat"),
            "name": (hub, "it is used with data=hf"),
            "split": (hub, "it is used with data=hf"),
            "eval_split": (hub, "it is used with data=hf; for files give data.eval_path"),
            "streaming": (hub, "it is used with data=hf"),
            "shuffle_buffer": (hub and self.streaming, "it is used with data=hf data.streaming=true"),
        }
        defaults = {field.name: field.default for field in fields(DataConfig)}
        return [
            f"data.{name}={plain(value)} has no effect with data={self.source.value}: {advice}, or leave it out"
            for name, (is_used, advice) in useful.items()
            if not is_used and (value := getattr(self, name)) != defaults[name]
        ]


def plain(value: object) -> object:
    """Return a value as a user would write it."""
    if isinstance(value, Enum):
        return value.value
    return str(value).lower() if isinstance(value, bool) else value


def hub_problems(option: str, name: str | None, wanted: str) -> list[str]:
    """Say what is wrong with a local path or a hub name."""
    if not name:
        return [f"{option} is not set: give {wanted}"]
    path = local_path(name)
    if os.path.isfile(path) and path.stat().st_size == 0:
        return [f"{option}={name}: is empty (0 bytes); give {wanted}"]
    if os.path.exists(path):
        return []
    if path.is_absolute() or name.startswith((".", "~")) or path.suffix == ".json" or not HUB_NAME.fullmatch(name):
        return [f"{option}={name}: no such file or folder, and not a name on the hub; give {wanted}"]
    return []
