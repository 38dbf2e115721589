"""What is put into a built model before an optimizer and an engine see it."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from offload.activations import Activations
from offload.config import ActivationsConfig
from parallel.launch import World
from trainer.errors import UserError


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each block, in the order they run: what transformers calls a gradient checkpointing layer."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append((name, module))
    return found


def manage_activations(cfg: ActivationsConfig, world: World, model: nn.Module) -> Activations | None:
    """Give what the model's blocks save the fate that `cfg` has for it; None where that is autograd's own.

    Raises:
        UserError: the model has no blocks, or nothing that a rule could mean.
    """
    if cfg == ActivationsConfig():
        return None
    found = blocks(model)
    if not found:
        raise UserError(
            f"activations={cfg.fate.value}: {type(model).__name__} has no blocks that transformers could recompute "
            "(GradientCheckpointingLayer), so none whose activations have a fate. Use activations=keep without rules."
        )
    try:
        return Activations(cfg, found, world.device)
    except ValueError as error:
        raise UserError(str(error)) from error
