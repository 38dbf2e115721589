"""A checkpoint as a Hugging Face folder that `AutoModelForCausalLM.from_pretrained` opens.

Whatever the ranks, ZeRO stage and engine it was saved by, one process writes it and holds no model: weights lie in
files mapped into memory, which the system writes out and drops as it needs, and one shard of the result at a time is
put together.
"""

import importlib
import json
import math
import os
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

import torch
import transformers
from torch import Tensor, nn

from optim.int8 import PARTS
from optim.int8_grid import decode
from parallel.launch import World
from trainer.checkpoint.checkpoint import Checkpoint, TensorInfo
from trainer.cli.compose import load_saved
from trainer.data.tokenizer import vocabulary_size
from trainer.errors import UserError
from trainer.finished import load_tokenizer, open_checkpoint, open_run
from trainer.folder import RunFolder
from trainer.linear_llama import LinearLlamaForCausalLM
from trainer.model import build_model, model_config
from trainer.precision import int8_matrices
from trainer.schema import Config, Dtype, Initial

SHARD = "2GB"
"""Most bytes of weights in one file of the result, which are in memory while it is written."""


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
    aside = target.parent / f".{target.name}.{uuid.uuid4().hex}"
    mapped = aside.with_name(f"{aside.name}.mapped")
    transformers.utils.logging.disable_progress_bar()
    try:
        mapped.mkdir(parents=True)
        model = model_in_files(load_saved(folder.config), folder, checkpoint, mapped)
        model.config.use_cache = True  # type: ignore[union-attr]  # switched off for training only
        model.save_pretrained(aside, max_shard_size=SHARD)  # type: ignore[operator]
        load_tokenizer(folder).save_pretrained(aside)
        needs_code = ship_code(model, aside)
        os.replace(aside, target)
    except OSError as error:
        raise UserError(
            f"{target}: cannot be written ({error.strerror or error}). Give a folder you may write to."
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
        shutil.rmtree(mapped, ignore_errors=True)
    print(f"exported step {checkpoint.step} of {run} to {target}")
    trusted = ", trust_remote_code=True" if needs_code else ""
    print(f'  AutoModelForCausalLM.from_pretrained("{target}"{trusted})')
    return target


SHIPPED = {
    "modeling_linear_llama.py": "trainer.linear_llama",
    "configuration_linear_llama.py": "trainer.linear_config",
    "linear.py": "parallel.sequence.linear",
    "recurrence.py": "parallel.sequence.recurrence",
    "fused.py": "parallel.sequence.fused",
}
"""Files of ours that a model of our own kind takes along, with the modules that they are."""


def ship_code(model: nn.Module, folder: Path) -> bool:
    """Put beside the weights what transformers needs to build `model` where we are not installed, if it needs that.

    The modules are copied as they are, but for their imports of each other.
    """
    if not isinstance(model, LinearLlamaForCausalLM):
        return False
    for name, module in SHIPPED.items():
        text = Path(str(importlib.import_module(module).__file__)).read_text()
        for other, imported in SHIPPED.items():
            text = text.replace(f"from {imported} import", f"from .{other.removesuffix('.py')} import")
        (folder / name).write_text(text)
    place = folder / "config.json"
    config = json.loads(place.read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_linear_llama.LinearLlamaConfig",
        "AutoModelForCausalLM": "modeling_linear_llama.LinearLlamaForCausalLM",
    }
    place.write_text(json.dumps(config, indent=2) + "\n")
    return True


def model_in_files(cfg: Config, folder: RunFolder, checkpoint: Checkpoint, mapped: Path) -> nn.Module:
    """Return the run's model with the checkpoint's weights, each in a file in `mapped`. It cannot run: buffers that
    no checkpoint holds, such as rotary frequencies, have no values."""
    tokenizer = load_tokenizer(folder)
    drawn = replace(cfg.model, weights=Initial.random)
    config = model_config(drawn, tokenizer, vocabulary_size(tokenizer))
    # fp64 is a matter of the weights alone; widening a model would compute with it
    weights = Dtype.fp32 if cfg.precision.weights is Dtype.fp64 else cfg.precision.weights
    model = build_model(drawn, config, weights=weights, device=torch.device("meta"), seed=0)
    saved = {name: info for name, info in checkpoint.names().items() if name.startswith("model/")}
    held = {name: in_file(mapped / str(place), info) for place, (name, info) in enumerate(saved.items())}
    checkpoint.load(held, leave=("*",))
    int8 = int8_matrices(cfg)
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) in seen:  # tied
            continue
        seen.add(id(tensor))
        found = held.pop(f"model/{name}", None)
        if found is None:
            assert int8 is not None, f"{name} is not in the checkpoint"
            codes, scale, low = (held.pop(f"model/{name}/{part}") for part in PARTS)
            found = in_file(mapped / name, TensorInfo(tuple(tensor.shape), tensor.dtype))
            decode(codes, scale, low, int8.group, found)
        own = nn.Parameter(found, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else found
        torch.utils.swap_tensors(tensor, own)  # type: ignore[no-untyped-call]  # in place, so that what is tied stays tied
    return model


def in_file(path: Path, info: TensorInfo) -> Tensor:
    """A tensor of zeros in a new file, mapped into memory."""
    count = math.prod(info.shape)
    storage = torch.UntypedStorage.from_file(str(path), shared=True, nbytes=info.dtype.itemsize * max(count, 1))
    return torch.empty(0, dtype=info.dtype).set_(storage)[:count].view(info.shape)  # type: ignore[arg-type]
