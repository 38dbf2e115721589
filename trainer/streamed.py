"""Pretrained weights read row by row: a rank reads its own rows of each safetensors tensor, and nothing else."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from trainer.errors import UserError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
Read = Callable[[Any, Sequence[int]], Tensor]
"""From what gives slices of a stored tensor, and its shape, to the part to keep."""


def weights_folder(path: str) -> Path:
    """The folder with a model's safetensors: `path` itself, or where the hub's files of that name are."""
    if Path(path).is_dir():
        return Path(path)
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def read_rows(model: nn.Module, path: str, read: Read, dtype: torch.dtype, device: torch.device) -> None:
    """Give each parameter of `model`, which has no storage, its part from the files as attribute `rows`.

    Args:
        dtype: of the rows; files may hold another.

    Raises:
        UserError: the files lack a weight, or have one of another shape.
    """
    folder = weights_folder(path)
    where = files_of(folder)
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    missing = []
    for name, names in tied_names(model).items():
        known = [key for own in names for key in (own, own.removeprefix(prefix), prefix + own) if key in where]
        if not known:
            missing.append(name)
            continue
        parameter = model.get_parameter(name)
        with safe_open(folder / where[known[0]], framework="pt") as file:
            stored = file.get_slice(known[0])
            if tuple(stored.get_shape()) != tuple(parameter.shape):
                raise UserError(
                    f"model.path={path}: its {known[0]} has shape {tuple(stored.get_shape())}, its config.json asks "
                    f"for {tuple(parameter.shape)}. Give a folder whose files belong together."
                )
            mine = read(stored, parameter.shape)
        parameter.rows = mine.to(device=device, dtype=dtype)  # type: ignore[attr-defined]
    if missing:
        raise UserError(
            f"model.path={path}: its files lack {len(missing)} weights by the model's own names, first {missing[0]}. "
            "Give a complete causal language model, or use parallel.zero=0 or 1, which convert older files as a whole."
        )


def files_of(folder: Path) -> dict[str, str]:
    """File of each tensor in a folder of safetensors.

    Raises:
        UserError: there are none.
    """
    if (folder / INDEX).is_file():
        found: dict[str, str] = json.loads((folder / INDEX).read_text())["weight_map"]
        return found
    if not (folder / SINGLE).is_file():
        raise UserError(
            f"model.path={folder}: has no {SINGLE} and no {INDEX}. Convert other formats once with save_pretrained."
        )
    with safe_open(folder / SINGLE, framework="pt") as file:
        return dict.fromkeys(file.keys(), SINGLE)


def tied_names(model: nn.Module) -> dict[str, list[str]]:
    """All names of each distinct parameter, by its first."""
    first: dict[int, str] = {}
    found: dict[str, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(first.setdefault(id(parameter), name), []).append(name)
    return found
