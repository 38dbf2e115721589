"""A run that has ended (or is under way), opened for reading: its configuration, tokenizer and weights."""

from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import nn

from parallel.launch import World
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.checkpoint.store import CheckpointStore
from trainer.data.tokenizer import vocabulary_size
from trainer.errors import UserError
from trainer.folder import RunFolder
from trainer.model import build_model, model_config
from trainer.precision import int8_matrices
from trainer.schema import Config, Initial
from trainer.state import model_tensors


def open_run(run: Path) -> RunFolder:
    """Return the run folder at `run`.

    Raises:
        UserError: there is none.
    """
    folder = RunFolder(Path(run))
    if not folder.config.is_file():
        found = "no such folder" if not folder.path.is_dir() else "it has no config.yaml"
        raise UserError(f"{run} is not a run folder: {found}. Give the folder that `stowage train` named at its end.")
    return folder


def open_checkpoint(folder: RunFolder, step: int | None, world: World) -> Checkpoint:
    """Return the newest good checkpoint (damaged newer ones are set aside), or exactly the one of `step`.

    Raises:
        UserError: there is none, or the one asked for is damaged.
    """
    store = CheckpointStore(folder.checkpoints, keep=0, verify=True, group=world.control)
    if step is not None:
        return store.open(folder.checkpoints / f"step_{step:08d}")
    checkpoint = store.newest()
    if checkpoint is None:
        raise UserError(
            f"{folder.path} has no usable checkpoint. Train it to one first: checkpoint.every sets how often."
        )
    return checkpoint


def load_tokenizer(folder: RunFolder) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer the run was trained with, from the run folder itself."""
    return transformers.AutoTokenizer.from_pretrained(folder.tokenizer)


def load_model(
    cfg: Config, folder: RunFolder, checkpoint: Checkpoint, device: torch.device
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Return the run's model with the checkpoint's weights, in evaluation mode, and its tokenizer."""
    tokenizer = load_tokenizer(folder)
    # the weights come from the checkpoint: no need to read the pretrained ones first
    drawn = replace(cfg.model, weights=Initial.random)
    model = build_model(
        drawn,
        model_config(drawn, tokenizer, vocabulary_size(tokenizer)),
        weights=cfg.precision.weights,
        int8=int8_matrices(cfg),
        device=device,
        seed=cfg.seed,
        length=cfg.data.sequence_length,
    )
    checkpoint.load(dict(model_tensors(model)), leave=("*",))
    return model.eval(), tokenizer
