"""Choose how a model lies over the ranks."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from parallel.config import ParallelConfig
from parallel.launch import World
from parallel.mesh import Grid, make_grid
from parallel.owners import Owners
from parallel.replicate import Replicas, SameWeights
from parallel.shard import Shards
from parallel.spread import Spread
from parallel.states import CutStates


def spread(
    model: nn.Module,
    world: World,
    cfg: ParallelConfig,
    *,
    blocks: Sequence[nn.Module],
    ends: Sequence[nn.Module],
    compute: torch.dtype | None,
    in_backward: bool = False,
    owners: Callable[[Grid], Owners] | None = None,
) -> Spread:
    """Lay `model` over the ranks as `cfg.zero` says. Every rank calls it, before the optimizer is built.

    Args:
        blocks, ends, compute: as `Shards` takes them; stages 0 and 1 do not ask.
        in_backward: hooks sum and step the gradients, while backward runs.
        owners: which parameters stage 1 leaves whole, and with whom; none if not given.
    """
    if world.process_count == 1:
        return Spread(model)
    if cfg.zero == 0:
        return SameWeights(model, world) if in_backward else Replicas(model, world, cfg)
    grid = make_grid(world, cfg)
    if cfg.zero == 1:
        chosen = owners(grid) if owners is not None else Owners()
        return CutStates(model, world, cfg, grid, chosen)
    return Shards(model, blocks, ends, cfg, grid, compute)


CUT = {
    1: "states shared out",
    2: "states, gradients and, between steps, weights cut in rows",
    3: "states, gradients and weights cut in rows",
}


def spread_text(world: World, cfg: ParallelConfig) -> str | None:
    """Say what is cut over which ranks; None where nothing was asked to be."""
    if cfg.zero == 0:
        return None
    if world.process_count == 1:
        return f"parallel.zero={cfg.zero}: one process has nobody to share with, and holds everything"
    shards = world.process_count // cfg.replicas
    times = f", {cfg.replicas} times" if cfg.replicas > 1 else ""
    by = "DDP, weights gathered after each step" if cfg.zero == 1 else "FSDP2"
    return f"parallel.zero={cfg.zero}: {CUT[cfg.zero]} over {shards} ranks{times} ({by})"
