"""The default engine: plain torch, over several ranks DDP or FSDP2."""

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from offload.gradients import GradientsAway
from optim.schedule import scale_rates
from parallel.spread import Spread
from trainer.engines.base import Numbers
from trainer.state import model_tensors, optimizer_numbers, optimizer_tensors, set_numbers


class TorchEngine:
    """Forward, backward and update of one rank; gradients are sums over all ranks and micro-steps.

    The loop divides each loss by the global target count beforehand, so no engine may average.

    Args:
        optimizer: over the parameters of `spread`.
        away: what has taken the gradients off the device when backward is done, if anything has.
    """

    def __init__(self, spread: Spread, optimizer: Optimizer, away: GradientsAway | None = None) -> None:
        self.spread = spread
        self.optimizer = optimizer
        self.away = away

    @property
    def model(self) -> nn.Module:
        """The model, or torch's wrapper around it."""
        return self.spread.model

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-step; `last` is that of the step."""
        return self.spread.accumulating(last)

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-step's share of the loss."""
        loss.backward()  # type: ignore[no-untyped-call]
        if self.away is not None:
            self.away.settle()

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients, a device scalar; the same on every rank."""
        if self.away is None:
            return self.spread.gradient_norm()
        norm: Tensor = torch.linalg.vector_norm(self.spread.whole_norms(self.away.norms()))
        return norm

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale all gradients down to `max_norm`, given their `norm`."""
        factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
        if self.away is not None:
            self.away.scale(factor)
            return
        # as torch.nn.utils.clip_grads_with_norm_ does, which cannot scale DTensors by a plain number on their device
        torch._foreach_mul_(self.spread.gradients(), factor)

    def clip_each(self, max_norm: float) -> None:
        """Scale each gradient down to `max_norm` by its own norm."""
        if self.away is not None:
            norms = self.spread.whole_norms(self.away.norms())
            self.away.scale(torch.clamp(max_norm / (norms + 1e-6), max=1.0))
            return
        norms = self.spread.gradient_norms()
        torch._foreach_mul_(self.spread.gradients(), list(torch.clamp(max_norm / (norms + 1e-6), max=1.0)))

    def update(self, multiplier: float) -> None:
        """Step the weights at `multiplier` times each group's own learning rate."""
        scale_rates(self.optimizer, multiplier)
        self.spread.before_update()
        self.optimizer.step()
        self.spread.after_update()

    def clear_gradients(self) -> None:
        """Free the gradients (DDP's buckets stay, as views of them are what `.grad` is)."""
        self.spread.clear_gradients()
        if self.away is not None:
            self.away.clear()

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizer states, as `trainer.state` names them."""
        return {**model_tensors(self.spread.owner), **optimizer_tensors(self.optimizer, self._names())}

    def numbers(self) -> Numbers:
        """State numbers of all parameters."""
        return self.spread.of_all(optimizer_numbers(self.optimizer, self._names()))

    def loaded(self, numbers: Numbers) -> None:
        """Put saved state numbers into the optimizer; tensors were read in place."""
        set_numbers(self.optimizer, self._names(), numbers)

    def remarks(self) -> list[str]:
        """Return what the user should know of how it lies over the ranks."""
        return self.spread.remarks()

    def close(self) -> None:
        """Nothing: torch is as it was."""

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.spread.named_parameters()}
