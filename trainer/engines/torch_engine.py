"""The default engine: plain torch, DDP over several ranks."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from optim.schedule import scale_rates
from parallel.config import ParallelConfig
from parallel.launch import World
from parallel.replicate import replicate, same_weights
from trainer.engines.base import Numbers
from trainer.state import model_tensors, optimizer_numbers, optimizer_tensors, parameter_names, set_numbers


class TorchEngine:
    """Forward, backward and update of one rank; gradients are sums over all ranks and micro-steps.

    The loop divides each loss by the global target count beforehand, so no engine may average.

    Args:
        in_backward: gradients are summed and stepped by hooks (`optim.in_backward`).
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer, world: World, cfg: ParallelConfig, *, in_backward: bool = False
    ) -> None:
        self.model = same_weights(model, world) if in_backward else replicate(model, world, cfg)
        self.optimizer = optimizer
        self._owner = model
        self.parameters = [p for p in model.parameters() if p.requires_grad]

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-step; only the `last` of a step exchanges gradients."""
        if last or not isinstance(self.model, DistributedDataParallel):
            return nullcontext()
        return self.model.no_sync()

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-step's share of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients, a device scalar; the same on every rank."""
        return torch.nn.utils.get_total_norm([p.grad for p in self.parameters if p.grad is not None])

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale all gradients down to `max_norm`, given their `norm`."""
        torch.nn.utils.clip_grads_with_norm_(self.parameters, max_norm, norm)

    def clip_each(self, max_norm: float) -> None:
        """Scale each gradient down to `max_norm` by its own norm."""
        for parameter in self.parameters:
            if parameter.grad is not None:
                own = torch.nn.utils.get_total_norm([parameter.grad])
                torch.nn.utils.clip_grads_with_norm_(parameter, max_norm, own)

    def update(self, multiplier: float) -> None:
        """Step the weights at `multiplier` times each group's own learning rate."""
        scale_rates(self.optimizer, multiplier)
        self.optimizer.step()

    def clear_gradients(self) -> None:
        """Free the gradients (DDP's buckets stay, as views of them are what `.grad` is)."""
        self.optimizer.zero_grad(set_to_none=True)

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizer states, as `trainer.state` names them."""
        names = parameter_names(self._owner)
        return {**model_tensors(self._owner), **optimizer_tensors(self.optimizer, names)}

    def numbers(self) -> Numbers:
        """State numbers of all parameters."""
        return optimizer_numbers(self.optimizer, parameter_names(self._owner))

    def loaded(self, numbers: Numbers) -> None:
        """Put saved state numbers into the optimizer; tensors were read in place."""
        set_numbers(self.optimizer, parameter_names(self._owner), numbers)
