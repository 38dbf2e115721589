"""Datasets of the Hugging Face hub by name, or a local folder of one."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from trainer.data.config import DataConfig
from trainer.data.files import is_visible_file, local_path
from trainer.data.hub import is_reachable, not_found
from trainer.data.sources import Source, extract, files_identity
from trainer.errors import UserError, first_line


def hub_source(cfg: DataConfig, split: str) -> Source:
    """Return the records of one split, downloaded (once, into datasets' own cache) and then tokenized."""
    folder = local_folder(cfg)
    if folder is None:
        loaded = load(cfg, split, streaming=False)
        identity = [loaded._fingerprint]
    else:
        loaded = None
        identity = files_identity(sorted(file for file in folder.rglob("*") if is_visible_file(file, folder)))
    field = cfg.messages_field if cfg.is_chat else cfg.text_field

    def records() -> Iterator[Any]:
        return extracted(cfg, split, load(cfg, split, streaming=True) if loaded is None else loaded)

    name = f"data.path={cfg.path} ({split})"
    return Source(name, ["hf", cfg.name, split, cfg.content.value, field, *identity], records)


def read_stream(cfg: DataConfig, split: str, epoch: int, skip: int, *, seed: int) -> Iterator[Any]:
    """Yield a split's records as they come, from record `skip` on; its files in another order each epoch."""
    stream = load(cfg, split, streaming=True)
    if cfg.shuffle_buffer and stream.num_shards > 1:
        # A buffer of one record and one file at a time: only the order of the files changes.
        stream = stream.shuffle(seed=seed, buffer_size=1, max_buffer_input_shards=1)
        stream.set_epoch(epoch)
    return extracted(cfg, split, stream.skip(skip) if skip else stream)


def extracted(cfg: DataConfig, split: str, records: Any) -> Iterator[Any]:
    try:
        for record in records:
            yield extract(cfg, record, f"data.path={cfg.path}, split {split}")
    except UserError:
        raise
    except Exception as error:  # what is raised depends on the files and on the network
        raise UserError(
            f"data.path={cfg.path}: reading split {split} failed ({first_line(error)}). "
            "Check the files or the connection."
        ) from error


def local_folder(cfg: DataConfig) -> Path | None:
    path = local_path(str(cfg.path))
    return path if path.exists() else None


def load(cfg: DataConfig, split: str, *, streaming: bool) -> Any:
    """Open one split.

    Raises:
        UserError: no such dataset, configuration or split.
    """
    folder = local_folder(cfg)
    datasets.utils.logging.set_verbosity(datasets.utils.logging.CRITICAL)  # it logs what is raised as well
    if folder is None:
        is_reachable()
    try:
        return datasets.load_dataset(str(folder or cfg.path), cfg.name, split=split, streaming=streaming)
    except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
        if folder is None:
            raise not_found("data.path", str(cfg.path), error) from error
        raise unreadable(cfg, split, error) from error
    except Exception as error:  # builders raise what they like
        raise unreadable(cfg, split, error) from error


def unreadable(cfg: DataConfig, split: str, error: Exception) -> UserError:
    options = f" data.name={cfg.name}" if cfg.name else ""
    return UserError(
        f"data.path={cfg.path}{options} data.split={split}: cannot be opened ({first_line(error)}). "
        "Check data.path, data.name and the split's name."
    )
