"""The ranks that share rows: which they are, how they are connected, and what strategy they follow.

Ranks of a group are neighbours, as launchers number them, and so are the ulysses ranks of a ring's member, whose
traffic wants the fastest links: process rank = (data rank * ring + member) * ulysses + piece.
"""

from datetime import timedelta

import torch
import torch.distributed as dist

from parallel.config import ParallelConfig
from parallel.launch import World, sharing_ranks
from parallel.pretended import PretendedGroup
from parallel.sequence.layout import Cut
from parallel.sequence.links import Alone, Connection, Links, PretendedLinks
from parallel.sequence.strategy import Exact, Strategy, WithStates, cut_of, method_of


def make_strategy(
    world: World, cfg: ParallelConfig, *, heads: int, key_heads: int, linear: bool = False
) -> Strategy | None:
    """Connect the ranks that share rows; None where none do. Every rank calls it.

    Args:
        heads, key_heads: of the model's attention.
        linear: whether some of its layers are linear attention.
    """
    if world.sequence_degree == 1:
        return None
    cut = cut_of(cfg, world.sequence_degree, heads, key_heads)
    inner, outer = connect(world, cut, cfg.timeout)
    strategy: Strategy = Exact(cut, world.sequence_rank, inner, outer, method_of(cfg))
    if not linear:
        return strategy
    return WithStates(strategy, inner if cut.ring == 1 else outer if cut.ulysses == 1 else connect_all(world, cfg))


def connect(world: World, cut: Cut, timeout: float = 600.0) -> tuple[Connection, Connection]:
    """Connect this rank to those it exchanges heads with, and to those of its ring."""
    if isinstance(world.gradients, PretendedGroup):
        return (alone_or_pretended(cut.ulysses), alone_or_pretended(cut.ring))
    inner, outer = [], []
    for base in range(0, world.process_count, cut.degree):
        inner += [[base + m * cut.ulysses + u for u in range(cut.ulysses)] for m in range(cut.ring)]
        outer += [[base + m * cut.ulysses + u for m in range(cut.ring)] for u in range(cut.ulysses)]
    return links_among(inner, timeout, world.device), links_among(outer, timeout, world.device)


def connect_all(world: World, cfg: ParallelConfig) -> Connection:
    """Connect this rank to all that it shares rows with."""
    if isinstance(world.gradients, PretendedGroup):
        return alone_or_pretended(world.sequence_degree)
    return links_among(sharing_ranks(world), cfg.timeout, world.device)


def alone_or_pretended(count: int) -> Connection:
    return PretendedLinks(count) if count > 1 else Alone()


def links_among(groups: list[list[int]], timeout: float, device: torch.device) -> Connection:
    """Connections within `groups` of process ranks, of which one is this rank's."""
    if len(groups[0]) == 1:
        return Alone()
    # Groups of their own: what attention sends never queues behind gradients, or the other way round.
    mine, _ = dist.new_subgroups_by_enumeration(groups, timeout=timedelta(seconds=timeout))  # type: ignore[no-untyped-call]
    # NCCL wants every rank in the first call of a group, and not all need have something to send in a first exchange.
    dist.all_reduce(torch.zeros(1, device=device), group=mine)
    return Links(mine)
