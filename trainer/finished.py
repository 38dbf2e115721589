"""A run that has ended (or is under way), opened for reading: its configuration, tokenizer and weights."""

from dataclasses import replace
from pathlib import Path

import transformers
from torch import nn

from parallel.config import EngineName
from parallel.launch import World
from parallel.mesh import share_of
from trainer.build import place
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
    cfg: Config, folder: RunFolder, checkpoint: Checkpoint, world: World
) -> tuple[nn.Module, transformers.PreTrainedTokenizerBase]:
    """Return the run's model with the checkpoint's weights, in evaluation mode, and its tokenizer.

    With parallel.zero=2 or 3, several ranks share its weights; none ever holds them all. Every rank calls it.
    """
    tokenizer = load_tokenizer(folder)
    cfg = replace(cfg, parallel=replace(cfg.parallel, engine=EngineName.torch, replicas=1))
    # the weights come from the checkpoint: no need to read the pretrained ones first
    drawn = replace(cfg.model, weights=Initial.random)
    share = share_of(world, cfg.parallel)
    model = build_model(
        drawn,
        model_config(drawn, tokenizer, vocabulary_size(tokenizer)),
        weights=cfg.precision.weights,
        int8=int8_matrices(cfg),
        device=world.device,
        seed=cfg.seed,
        share=share,
        length=cfg.data.sequence_length,
    )
    if share is not None:
        place(cfg, world, model)
    checkpoint.load(dict(model_tensors(model)), leave=("*",))
    return model.eval(), tokenizer
