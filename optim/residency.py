"""Where states are between two steps: the seam at which `offload` takes them off the device.

An optimizer tells its residency of each state it makes, and asks for it before it steps with it. Nothing else of an
optimizer knows that states travel: while they are here, they are the tensors that `init_state` has made.
"""

from collections.abc import Iterator, MutableMapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any

from torch import Tensor

State = MutableMapping[str, Any]
"""Of one parameter: tensors and Python numbers only, so that `torch.load(weights_only=True)` reads it."""
Group = dict[str, Any]
"""Of some parameters: `params`, `param_names` where given, and every hyper-parameter."""


class Residency:
    """States stay where they were made. The base of others, each for one optimizer."""

    def admit(self, p: Tensor, state: State) -> None:
        """Take charge of a new state; its tensors keep their identity, their storage may change."""

    def batches(
        self, asked: list[tuple[Group, list[Tensor]]], states: MutableMapping[Tensor, State]
    ) -> Iterator[tuple[Group, list[Tensor]]]:
        """Yield all of `asked`, in order, in pieces whose states are here until the next one is asked for.

        Where others step in the place of parameters, the group lists them there, and `states` has theirs meanwhile.
        """
        yield from asked

    def stepping(self) -> AbstractContextManager[object]:
        """Return the context in which a piece is stepped."""
        return nullcontext()

    def has_gradient(self, p: Tensor) -> bool:
        """Whether there is a gradient to step with, here or where it comes from with its state."""
        return p.grad is not None

    @contextmanager
    def here(self, p: Tensor, *, written: bool = True) -> Iterator[None]:
        """Have one parameter's state here inside; `written` unless it is only read."""
        yield

    def rest(self) -> None:
        """Have all states where they belong between two steps."""

    def readable(self, p: Tensor, state: State) -> State:
        """The state with tensors that can be read and written in place between two steps, wherever they lie."""
        return state


_keeper: ContextVar[Residency | None] = ContextVar("keeper", default=None)


@contextmanager
def kept_by(residency: Residency) -> Iterator[None]:
    """Let the optimizer that is built inside have its states kept by `residency`, from the first one on."""
    token = _keeper.set(residency)
    try:
        yield
    finally:
        _keeper.reset(token)


def keeper() -> Residency:
    """The residency of an optimizer that is being built."""
    return _keeper.get() or Residency()
