"""What ranks agree on leaves nothing behind."""

from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from parallel.collectives import any_rank
from parallel.config import ParallelConfig
from parallel.launch import connected
from tests.ranks import on_ranks


def agreed_and_held() -> tuple[list[int], list[int]]:
    """What two flags came to, and the bytes of each tensor that somebody still holds."""
    held: list[torch.Tensor] = []
    reduce = dist.all_reduce

    def holding(tensor: torch.Tensor, **options: Any) -> Any:
        held.append(tensor)
        return reduce(tensor, **options)

    with connected(ParallelConfig(), "cpu", 1) as world, mock.patch.object(dist, "all_reduce", holding):
        flags = any_rank(world, world.process_rank, 0)
    return flags, [tensor.untyped_storage().nbytes() for tensor in held]


def test_a_decision_takes_no_bytes_once_it_is_read_whoever_holds_its_tensor() -> None:
    """gloo's own thread does for a moment, which would show in one rank's counted step and not in another's."""
    for flags, bytes_held in on_ranks(2, agreed_and_held):
        assert flags == [1, 0]
        assert bytes_held == [0]
