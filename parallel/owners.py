"""Whole tensors owned by ranks: who owns which, and how parts that all ranks hold come together and go back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Owners:
    """Parameters that have one owner, and why they do or why none does."""

    of: Mapping[str, int] = field(default_factory=dict)
    """Index of the owner among the ranks that share one model, by the parameter's name."""
    why: str = ""
    """For the user."""


def balanced(sizes: Sequence[int], count: int) -> list[int]:
    """Owner of each item, so that the `count` owners' sums of `sizes` are near each other: largest first, to the
    owner that has least (at most 4/3 of the best possible). Owner 0 has the most. The same on every rank that gives the
    same sizes."""
    load, owners = [0] * count, [0] * len(sizes)
    for item in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        owner = min(range(count), key=lambda rank: (load[rank], rank))
        owners[item] = owner
        load[owner] += sizes[item]
    place = {owner: index for index, owner in enumerate(sorted(range(count), key=lambda owner: -load[owner]))}
    return [place[owner] for owner in owners]


def to_owners(parts: Sequence[Tensor], lengths: Sequence[int], group: dist.ProcessGroup | None) -> Tensor:
    """Send part i to rank i of `group`; return what all ranks sent here, one after the other.

    Args:
        parts: one flat tensor for each rank, of one dtype; may be empty.
        lengths: number of values each rank sends here.
    """
    sent = torch.cat(list(parts))
    received = sent.new_empty(sum(lengths))
    dist.all_to_all_single(received, sent, list(lengths), [part.numel() for part in parts], group=group)
    return received
