"""Everything a run must remember to go on as if nothing had happened, under names that outlive any layout.

Tensors: `model/<parameter or buffer>` (an int8 weight's `codes`, `scale` and `low` below that),
`optim/<parameter>/<key>`, `rng/<rank>/<generator>`. Optimizer states are keyed by parameter name, not by position in a
list, so that other groups or another rank count find them. Numbers go into the manifest's `meta`. Nothing is pickled.
"""

import random
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim.base import MemoryOptimizer
from optim.int8_model import plain_parts
from optim.residency import Residency
from trainer.checkpoint.checkpoint import Checkpoint

if TYPE_CHECKING:
    from trainer.engines.base import Engine


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Persistent tensors of `model` by name; a tied weight once, under its first name."""
    kept: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            parts = plain_parts(tensor.detach())
            kept |= {f"model/{name}/{part}": plain for part, plain in parts.items()} if parts else {}
            if parts is None:
                kept[f"model/{name}"] = tensor.detach()
    return kept


def parameter_names(model: nn.Module) -> dict[Tensor, str]:
    """Name of each distinct parameter."""
    return {parameter: name for name, parameter in model.named_parameters()}


def optimizer_tensors(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[str, Tensor]:
    """State tensors of `optimizer` by parameter name and key; of states off the device, where they lie."""
    residency = optimizer.residency if isinstance(optimizer, MemoryOptimizer) else Residency()
    return {
        f"optim/{names[parameter]}/{key}": value
        for parameter, state in optimizer.state.items()
        for key, value in residency.readable(parameter, state).items()
        if isinstance(value, Tensor)
    }


def optimizer_numbers(optimizer: Optimizer, names: dict[Tensor, str]) -> dict[str, dict[str, float | int | bool]]:
    """State numbers of `optimizer` by parameter name and key."""
    numbers = {
        names[parameter]: {key: value for key, value in state.items() if isinstance(value, int | float | bool)}
        for parameter, state in optimizer.state.items()
    }
    return {name: values for name, values in numbers.items() if values}


def random_tensors(rank: int, device: torch.device) -> dict[str, Tensor]:
    """States of every random number generator of this process, as tensors."""
    _, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, words, python_gauss = random.getstate()
    states = {
        "cpu": torch.get_rng_state(),
        "numpy": torch.from_numpy(np.concatenate([np.asarray(keys, np.int64), [position, has_gauss]])),
        "numpy_gauss": torch.tensor([gauss], dtype=torch.float64),
        "python": torch.tensor([version, *words], dtype=torch.int64),
        "python_gauss": torch.tensor([python_gauss is not None, python_gauss or 0.0], dtype=torch.float64),
    }
    if device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state(device)
    return {f"rng/{rank}/{name}": state for name, state in states.items()}


def set_random(states: dict[str, Tensor], rank: int, device: torch.device) -> None:
    """Put this process's generators into `states`, as `random_tensors` gave them."""
    mine = {name.rsplit("/", 1)[1]: state for name, state in states.items() if name.startswith(f"rng/{rank}/")}
    torch.set_rng_state(mine["cpu"])
    keys, (position, has_gauss) = mine["numpy"][:-2].numpy().astype(np.uint32), mine["numpy"][-2:].tolist()
    np.random.set_state(("MT19937", keys, position, has_gauss, mine["numpy_gauss"].item()))
    has_gauss, gauss = mine["python_gauss"].tolist()
    version, *words = mine["python"].tolist()
    random.setstate((version, tuple(words), gauss if has_gauss else None))
    if "cuda" in mine and device.type == "cuda":
        torch.cuda.set_rng_state(mine["cuda"], device)


def seed_all(seed: int, rank: int) -> None:
    """Seed every generator of this process. Ranks differ: their rows differ, so must their dropout."""
    mixed = np.random.SeedSequence([seed, rank]).generate_state(1)[0]
    torch.manual_seed(int(mixed))
    np.random.seed(int(mixed))
    random.seed(int(mixed))


def set_numbers(optimizer: Optimizer, names: dict[Tensor, str], numbers: dict[str, Any]) -> None:
    """Put state numbers, as `optimizer_numbers` gave them, into `optimizer`, of the parameters that are in it."""
    for parameter, name in names.items():
        if name in numbers:
            optimizer.state[parameter].update(numbers[name])


def run_tensors(engine: "Engine", rank: int, device: torch.device) -> dict[str, Any]:
    """Every tensor a checkpoint of this rank holds."""
    return {**engine.tensors(), **random_tensors(rank, device)}


def still(tensors: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Return `tensors` with copies of what may change before the next update: buffers, in a forward."""
    moving = {f"model/{name}" for name, _ in model.named_buffers()}
    return {name: tensor.clone() if name in moving else tensor for name, tensor in tensors.items()}


def restore(checkpoint: Checkpoint, engine: "Engine", *, seed: int, rank: int, device: torch.device) -> None:
    """Load weights, states and generators in place.

    A rank the saving run did not have gets generators seeded from (seed, rank, step), since none was saved for it.

    Raises:
        UserError: the checkpoint is of another model or optimizer.
    """
    saved = checkpoint.names()
    wanted = run_tensors(engine, rank, device)
    random_here = {name: state for name, state in wanted.items() if name.startswith("rng/")}
    known = random_here.keys() <= saved.keys()
    if not known:
        wanted = {name: tensor for name, tensor in wanted.items() if name not in random_here}
    checkpoint.load(wanted)
    engine.loaded(checkpoint.meta.get("optimizer_numbers", {}))
    if known:
        set_random(wanted, rank, device)
    else:
        seed_all(seed + checkpoint.step, rank)
