"""What a step needs of the library that runs it. Losses come divided by the global target count: no engine averages."""

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn

Numbers = dict[str, dict[str, float | int | bool]]
"""State numbers of an optimizer, by parameter name and key."""


class Engine(Protocol):
    """Forward, backward and update of one rank; gradients are sums over all ranks and micro-steps."""

    @property
    def model(self) -> nn.Module:
        """What is called with a micro-batch: the model, or the library's wrapper around it."""
        ...

    def accumulating(self, last: bool) -> AbstractContextManager[object]:
        """Return the context of one micro-step; only the `last` of a step need exchange gradients."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-step's share of the loss."""
        ...

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients, a device scalar; the same on every rank, not finite where any of them is."""
        ...

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Scale all gradients down to `max_norm`, given their `norm`."""
        ...

    def clip_each(self, max_norm: float) -> None:
        """Scale each gradient down to `max_norm` by its own norm."""
        ...

    def update(self, multiplier: float) -> None:
        """Step the weights at `multiplier` times each group's own learning rate."""
        ...

    def clear_gradients(self) -> None:
        """Free the gradients; those of a step that was not applied are forgotten."""
        ...

    def tensors(self) -> dict[str, Any]:
        """Weights and optimizer states under the names of `trainer.state`, each whole or this rank's part of it.

        Every rank calls it. A checkpoint writes them, and reads into them in place.
        """
        ...

    def numbers(self) -> Numbers:
        """State numbers of all parameters, the same on every rank."""
        ...

    def loaded(self, numbers: Numbers) -> None:
        """Take over what a checkpoint has just put into `tensors()`, and the numbers that were saved with it."""
        ...

    def remarks(self) -> list[str]:
        """Return what the user should know of how it lies over the ranks."""
        ...

    def close(self) -> None:
        """End the run: what the library changed of torch itself is undone, for whatever this process runs next."""
        ...
