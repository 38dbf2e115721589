"""The life of one storage, as the counter writes it down."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


class Record(weakref.ref[torch.UntypedStorage]):
    """The life of one storage. A weak reference with a few numbers: one small object a storage."""

    __slots__ = ("address", "born", "died", "holds", "kind", "size", "spans")

    address: int
    """Key of the counter's table: `id` of the storage object, which lives as long as the storage."""
    size: int
    """Bytes."""
    kind: int
    """Weights, gradients or states for the whole life; workspace is what may be activations in some `spans`."""
    born: int
    died: int | None
    holds: int
    """How many saved variables of autograd hold it now."""
    spans: list[int]
    """Samples at which it began or ceased to be held, in turn."""


class Saved:
    """What autograd keeps in place of a saved tensor: the tensor, and word to the counter when autograd lets go."""

    __slots__ = ("records", "release", "tensor")

    def __init__(self, tensor: Tensor, records: list[Record], release: Callable[[list[Record]], None]):
        self.tensor = tensor
        self.records = records
        self.release = release

    def __del__(self) -> None:
        self.release(self.records)


def unpack(kept: Any) -> Tensor:
    tensor: Tensor = kept.tensor if type(kept) is Saved else kept
    return tensor
