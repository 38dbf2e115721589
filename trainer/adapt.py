"""What of a built model is of interest before an optimizer and an engine see it, and what is put into it."""

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from offload.activations import Activations
from offload.config import COMPRESSED, ActivationsConfig, Fate
from offload.lean import make_lean
from parallel.config import SequenceKind
from parallel.launch import World
from trainer.errors import UserError
from trainer.schema import Config


def blocks(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Name and module of each block, in the order they run: what transformers calls a gradient checkpointing layer."""
    found: list[tuple[str, nn.Module]] = []
    for name, module in model.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer, _ in found)
        if isinstance(module, GradientCheckpointingLayer) and not inside:
            found.append((name, module))
    return found


def untied_ends(model: nn.Module) -> list[nn.Module]:
    """Embedding and head, each with a weight of its own; none where they share it, or the model has no such thing."""
    ends = [model.get_input_embeddings(), model.get_output_embeddings()]  # type: ignore[operator]
    weights = [getattr(end, "weight", None) for end in ends]
    if any(weight is None for weight in weights) or weights[0] is weights[1]:
        return []
    return ends


def keeps_attention(cfg: Config) -> bool:
    """Whether recomputed blocks hold attention's results, as options say or the strategy does."""
    activations = cfg.activations
    ruled = [r for r in activations.parsed() if r.operator == "scaled_dot_product_attention" and r.module is None]
    if activations.fate is Fate.selective or any(rule.fate is Fate.keep for rule in ruled):
        return True
    if activations.attention is not None:
        return activations.attention is Fate.keep
    recomputes = Fate.recompute in activations.fates() and activations.inputs not in COMPRESSED
    return recomputes and cfg.parallel.sequence is SequenceKind.lightseq


def manage_activations(
    cfg: ActivationsConfig, world: World, model: nn.Module, *, shared_rows: bool = False
) -> Activations | None:
    """Give what the model's blocks save the fate that `cfg` has for it; None where that is autograd's own.

    Args:
        shared_rows: whether attention is over rows that several ranks share.

    Raises:
        UserError: the model has no blocks, or nothing that a rule could mean.
    """
    if cfg == ActivationsConfig():
        return None
    if cfg.lean and not make_lean(model):
        raise UserError(
            f"activations.lean=true: {type(model).__name__} has no norm, gated MLP or grouped attention of a kind that "
            "is known here. Use activations.lean=false."
        )
    found = blocks(model)
    if not found:
        raise UserError(
            f"activations={cfg.fate.value}: {type(model).__name__} has no blocks that transformers could recompute "
            "(GradientCheckpointingLayer), so none whose activations have a fate. Use activations=keep without rules."
        )
    try:
        return Activations(cfg, found, world.device, shared_rows=shared_rows)
    except ValueError as error:
        raise UserError(str(error)) from error
