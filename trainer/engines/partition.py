"""Which part of which parameter this rank's flat DeepSpeed partitions hold, and how a checkpoint sees such a part.

DeepSpeed joins parameters to long vectors and cuts those at any value: a rank holds `[start, start + length)` of a
flattened parameter, which in the parameter's own shape is the tail of a row, full rows, and the head of a row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

from parallel.config import ParallelConfig
from parallel.launch import World

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""Offsets and sizes of a rectangular part of a tensor."""


@dataclass(frozen=True)
class Segment:
    """One parameter's part on this rank; of length 0 where another rank holds all of it."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Global shape."""
    flat: int
    """Which of the rank's flat partitions it lies in."""
    offset: int
    """Where it begins there."""
    start: int
    """Where it begins in the flattened parameter."""
    length: int


@dataclass(frozen=True)
class FlatShare:
    """What ZeRO-3 will keep of every parameter on this rank: equal parts of it flattened, the last ones less."""

    count: int
    index: int

    def span(self, size: int) -> slice:
        """Of a flattened parameter of `size` values."""
        each = -(-size // self.count)
        return slice(min(each * self.index, size), min(each * (self.index + 1), size))

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy of the part of a whole tensor, flat."""
        return tensor.reshape(-1)[self.span(tensor.numel())].clone()

    def read(self, stored: Any, shape: Sequence[int]) -> Tensor:
        """The part of a tensor of `shape` in a file, flat: whole rows are read, and the ends cut off."""
        span, inner = self.span(prod(shape)), prod(shape[1:])
        first = span.start // inner
        rows: Tensor = stored[first : -(-span.stop // inner)]
        return rows.reshape(-1)[span.start - first * inner : span.stop - first * inner].clone()


def flat_share(world: World, cfg: ParallelConfig) -> FlatShare | None:
    """What this rank keeps of the weights; None where that is all of them."""
    return FlatShare(world.process_count, world.process_rank) if cfg.zero == 3 and world.process_count > 1 else None


def own_parts(named: Sequence[tuple[str, Tensor]], world: World, stage: int) -> dict[str, tuple[int, Tensor]]:
    """Copies of what this rank will hold of whole trainable parameters, flat, and where each begins: of each an equal
    part at stage 3; before that an equal part of them all in a row, filled up so that shares are of an even size."""
    if stage == 3:
        share = FlatShare(world.process_count, world.process_rank)
        return {name: (share.span(p.numel()).start, share.cut(p)) for name, p in named}
    each = -(-sum(p.numel() for _, p in named) // (2 * world.process_count)) * 2
    begin, end, at, found = each * world.process_rank, each * (world.process_rank + 1), 0, {}
    for name, p in named:
        start, stop = min(max(begin - at, 0), p.numel()), min(max(end - at, 0), p.numel())
        found[name] = (start, p.reshape(-1)[start:stop].clone())
        at += p.numel()
    return found


def write_masters(flats: Sequence[Tensor], held: Sequence[Segment], parts: dict[str, tuple[int, Tensor]]) -> None:
    """Put exact values in the place of those that DeepSpeed has made from rounded weights.

    Args:
        parts: of each parameter, as `own_parts` gives them.
    """
    for segment in held:
        start, part = parts[segment.name]
        first = segment.start - start
        assert first >= 0 and first + segment.length <= part.numel() or not segment.length, "DeepSpeed cuts otherwise"
        part_of(flats, segment).copy_(part[first : first + segment.length])


def flat_partitions(zero: Any) -> list[Tensor]:
    """This rank's fp32 partitions, which DeepSpeed steps and copies to the weights: as stage 3, stages 1 and 2, and
    stage 1 of bf16 call them."""
    names = ("fp32_partitioned_groups_flat", "single_partition_of_fp32_groups", "fp32_groups_flat_partition")
    return list(next(getattr(zero, name) for name in names if hasattr(zero, name)))


def segments(zero: Any, stage: int, names: dict[Tensor, str]) -> list[Segment]:
    """Every trainable parameter's part on this rank, in an order that is the same on all ranks."""
    found = []
    if stage < 3:
        for flat, group in enumerate(zero.bf16_groups if is_bf16(zero) else zero.bit16_groups):
            for p in group:
                place, shape = p._hp_mapping, tuple(p.shape)
                if place is None:
                    found.append(Segment(names[p], p, shape, flat, 0, 0, 0))
                    continue
                start, length = place.lp_fragment_address.start, place.lp_fragment_address.numel
                found.append(Segment(names[p], p, shape, flat, place.hp_fragment_address.start, start, length))
        return found
    for flat, group in enumerate(zero.fp16_groups):
        offset = 0
        for p in group:
            start, length = held_of(p)
            found.append(Segment(names[p], p, tuple(p.ds_shape), flat, offset, start, length))
            offset += p.partition_numel()  # padding of the last ranks included
    return found


def is_bf16(zero: Any) -> bool:
    """Whether it is the optimizer that DeepSpeed has for bf16 at stage 1, with whole gradients in fp32."""
    return hasattr(zero, "fp32_groups_flat_partition")


def held_of(p: Any) -> tuple[int, int]:
    """First value and number of values of a ZeRO-3 parameter on this rank: equal parts, what is missing is padding."""
    size, rank = p.partition_numel(), torch.distributed.get_rank(p.ds_process_group)
    start = min(rank * size, p.ds_numel)
    return start, min(size, p.ds_numel - start)


def boxes(shape: Sequence[int], start: int, length: int) -> list[Box]:
    """Cut `[start, start + length)` of a flattened tensor of `shape` into rectangles, in order."""
    if length == 0:
        return []
    if len(shape) < 2:
        return [((start,) * len(shape), (length,) * len(shape))]
    inner = prod(shape[1:])
    found: list[Box] = []
    end = start + length
    while start < end:
        row, column = divmod(start, inner)
        if column == 0 and end - start >= inner:
            rows = (end - start) // inner
            found.append(((row,) + (0,) * (len(shape) - 1), (rows, *shape[1:])))
            start += rows * inner
        else:
            count = min(end - start, inner - column)
            found += [((row, *offsets), (1, *sizes)) for offsets, sizes in boxes(shape[1:], column, count)]
            start += count
    return found


class FlatPart(Tensor):
    """A rank's part of a tensor as torch.distributed.checkpoint takes it: so that any layout loads into any other.

    Claims the shape of the whole, holds the part alone, and computes nothing.

    Args:
        shape: of the whole tensor.
        start: where the part begins in the flattened tensor.
        part: (length,), a view of memory that a load writes into.
    """

    boxes: dict[torch.Size, Tensor]
    """Views of the part by the offsets at which they lie in the whole: as many as it takes rectangles."""

    @staticmethod
    def __new__(cls, shape: Sequence[int], start: int, part: Tensor) -> "FlatPart":
        make: Any = Tensor._make_wrapper_subclass  # type: ignore[attr-defined]
        made: FlatPart = make(cls, tuple(shape), dtype=part.dtype, device=part.device)
        cuts = boxes(shape, start, part.numel())
        views = part.split([prod(sizes) for _, sizes in cuts]) if cuts else ()  # type: ignore[no-untyped-call]
        made.boxes = {torch.Size(offsets): view.view(sizes) for (offsets, sizes), view in zip(cuts, views, strict=True)}
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise TypeError(f"{func}: a FlatPart is for checkpoints alone")

    def __create_write_items__(self, fqn: str, _: object) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                index=MetadataIndex(fqn, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.shape),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(offsets, view.shape) for offsets, view in self.boxes.items()]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        assert index.offset is not None, f"{index.fqn}: a part is asked for without its place"
        return self.boxes[index.offset]


def part_of(flats: Sequence[Tensor], segment: Segment) -> Tensor:
    """The segment's values: (length,), a view of its flat partition."""
    return flats[segment.flat].detach()[segment.offset : segment.offset + segment.length]
