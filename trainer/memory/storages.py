"""Which storages hold a model's weights, gradients and optimizer states, and how many bytes those are."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

KINDS = ("weights", "gradients", "states", "activations", "workspace")
WEIGHTS, GRADIENTS, STATES, ACTIVATIONS, WORKSPACE = range(len(KINDS))
HELD_KINDS = KINDS[:ACTIVATIONS]

PLAIN_TYPES = (Tensor, nn.Parameter)


def plain_tensors(value: Any) -> Sequence[Tensor]:
    """Tensors with a storage of their own inside `value`: a tensor, a wrapper subclass, or a container of these.

    Wrapper subclasses (DTensor, quantised weights) are opened through `__tensor_flatten__`, sparse ones into indices
    and values. Anything that is neither tensor nor dict, list or tuple holds none.
    """
    if isinstance(value, Tensor):
        if type(value) not in PLAIN_TYPES and hasattr(value, "__tensor_flatten__"):
            return [plain for name in value.__tensor_flatten__()[0] for plain in plain_tensors(getattr(value, name))]
        if value.layout is torch.strided:
            return (value,)
        return (value._indices(), value._values()) if value.layout is torch.sparse_coo else ()
    if isinstance(value, dict):
        value = list(value.values())
    return [plain for item in value for plain in plain_tensors(item)] if isinstance(value, list | tuple) else ()


def weight_tensors(model: nn.Module) -> Iterator[Tensor]:
    """Plain tensors of the parameters and buffers; of DeepSpeed's ZeRO-3 also the part this rank keeps."""
    for owned in (model.parameters(), model.buffers()):
        for tensor in owned:
            yield from plain_tensors(tensor)
            yield from plain_tensors(getattr(tensor, "ds_tensor", ()))


def gradient_tensors(parameters: Iterable[Tensor], optimizer: Optimizer) -> Iterator[Tensor]:
    """Plain tensors of the gradients that exist now, and of what an update in backward has kept of freed ones."""
    for parameter in parameters:
        if parameter.grad is not None:
            yield from plain_tensors(parameter.grad)
    for kept in getattr(optimizer, "reduced", {}).values():
        yield from plain_tensors(kept)


def state_tensors(optimizer: Optimizer) -> Iterator[Tensor]:
    """Plain tensors of the optimizer's state."""
    for state in optimizer.state.values():
        yield from plain_tensors(state)


def held_bytes(model: nn.Module, optimizer: Optimizer, device: torch.device) -> dict[str, int]:
    """Bytes on `device` of the distinct storages of each kind; a shared one counts in the first that has it."""
    totals = []
    seen: set[int] = set()
    for tensors in (weight_tensors(model), gradient_tensors(model.parameters(), optimizer), state_tensors(optimizer)):
        total = 0
        for tensor in tensors:
            storage = tensor.untyped_storage()
            address = storage._cdata  # of the storage's header, which even an empty or a fake storage has
            if address not in seen and tensor.device == device:
                seen.add(address)
                total += storage.nbytes()
        totals.append(total)
    return dict(zip(HELD_KINDS, totals, strict=True))
