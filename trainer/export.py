"""A checkpoint as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens."""

import os
import shutil
import uuid
from pathlib import Path

import torch
import transformers

from optim.int8_model import dequantize_weights
from parallel.launch import World
from trainer.cli.compose import load_saved
from trainer.errors import UserError
from trainer.finished import load_model, open_checkpoint, open_run


def export_run(run: Path, target: Path, step: int | None) -> Path:
    """Write the weights of `run` at `step` (default: its newest good checkpoint) and its tokenizer to `target`.

    Weights keep the dtype they were trained in; int8 ones become bf16. The folder is written aside and renamed, so a
    `target` is whole or absent.

    Raises:
        UserError: no run, no checkpoint, or `target` is in the way or not writable.
    """
    folder = open_run(run)
    target = Path(target)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target} exists already and is not an empty folder. Give a new folder to export to.")
    checkpoint = open_checkpoint(folder, step, World())
    model, tokenizer = load_model(load_saved(folder.config), folder, checkpoint, torch.device("cpu"))
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    transformers.utils.logging.disable_progress_bar()
    try:
        aside.mkdir(parents=True)
        dequantize_weights(model)
        model.config.use_cache = True  # type: ignore[union-attr]  # switched off for training only
        model.save_pretrained(aside)  # type: ignore[operator]
        tokenizer.save_pretrained(aside)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}). Give a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    print(f"exported step {checkpoint.step} of {run} to {target}")
    print(f'  AutoModelForCausalLM.from_pretrained("{target}")')
    return target
