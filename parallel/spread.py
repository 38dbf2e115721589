"""How a model's weights, gradients and states lie over the ranks: the interface of ZeRO's stages.

    zero   weights      gradients    states       by
    0      whole        whole        whole        DDP                              replicate.py
    1      whole        whole        shared out   DDP, gathered after a step       states.py
    2      cut in rows  cut in rows  cut in rows  FSDP2, gathered once a step      shard.py
    3      cut in rows  cut in rows  cut in rows  FSDP2, gathered block by block   shard.py

Whatever the stage, gradients are sums over ranks and micro-steps, and what the optimizer steps has the model's names
and global shapes.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass


class Spread:
    """A model on one process. The base of the others."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        """What is called with a micro-batch: the model, or torch's wrapper around it."""
        self.owner = model
        """The module that has the parameters."""
        self.holders: dict[str, int] = {}
        """Of parameters whose states are whole on some of the ranks alone: on how many."""
        self.trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}

    def renew(self) -> None:
        """Make anew what torch makes anew after a first step, as it does by itself where there are other ranks."""

    def named_parameters(self) -> Iterable[tuple[str, nn.Parameter]]:
        """What the optimizer of this rank steps, by the model's own names: plain parameters, or DTensors of rows."""
        return self.owner.named_parameters()

    def remarks(self) -> list[str]:
        """What the user should know of how it lies."""
        return []

    def of_all(self, values: dict[str, Any]) -> dict[str, Any]:
        """What is known of all parameters by name, from what each rank knows of those it steps. Every rank calls it."""
        return values

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-step; `last` is that of the step."""
        return nullcontext()

    def gradients(self) -> list[Tensor]:
        """Plain tensors of this rank's part of the gradients; writing to them changes what the optimizer sees."""
        return [p.grad for p in self.trainable.values() if p.grad is not None]

    def gradient_norms(self) -> Tensor:
        """2-norm of each of the whole gradients, in the order of `gradients`; (count,) on the device."""
        return self.whole_norms(norms_of(self.gradients()))

    def whole_norms(self, norms: Tensor) -> Tensor:
        """Norms of whole gradients from those of this rank's parts, (count,) on the device."""
        return norms

    def gradient_norm(self) -> Tensor:
        """2-norm of all gradients, a scalar on the device, the same on every rank."""
        norm: Tensor = torch.linalg.vector_norm(self.gradient_norms())
        return norm

    def before_update(self) -> None:
        """Hand the gradients to the optimizer's parameters."""

    def after_update(self) -> None:
        """Make the weights whole again, where the optimizer stepped a part."""

    def clear_gradients(self) -> None:
        """Free the gradients."""
        for p in self.trainable.values():
            p.grad = None


def stored(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that hold a tensor's values: itself, or what it is made of (codes and scales, say)."""
    if not is_traceable_wrapper_subclass(tensor):
        return [tensor]
    names, _ = tensor.__tensor_flatten__()
    return [plain for name in names for plain in stored(getattr(tensor, name))]


def norms_of(parts: list[Tensor]) -> Tensor:
    """2-norm of each tensor, at least in fp32; (count,). Empty ones have a norm of 0."""
    wide = torch.promote_types(parts[0].dtype, torch.float32)
    norms = parts[0].new_zeros(len(parts), dtype=wide)
    held = [index for index, part in enumerate(parts) if part.numel()]
    if held:
        norms[held] = torch.stack(torch._foreach_norm([parts[index] for index in held], 2, dtype=wide))
    return norms
