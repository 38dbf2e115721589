"""Initial weights made row by row: of each parameter a rank keeps its own rows, and never holds the whole model.

The model's own code draws them, on the generator and in the order that it always does, so that the weights are those
of an unsharded model of the same seed. Parameters have no storage (they are on the meta device); a mode catches what
is written to one of them, and has it done to a whole tensor, of which there is one at a time. When the next parameter
is written, the rows that are this rank's are cut out and the rest is freed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from trainer.memory.operators import patched

aten = torch.ops.aten
OVERWRITING = {
    aten.normal_.default, aten.uniform_.default, aten.zero_.default, aten.fill_.Scalar, aten.fill_.Tensor,
    aten.copy_.default,
}  # fmt: skip
"""Operators that leave nothing of what was there."""

Cut = Callable[[Tensor], Tensor]
"""From a whole tensor to a copy of the part to keep."""


class Part(Protocol):
    """Which part of every parameter a rank keeps, known without talking to the others."""

    def cut(self, tensor: Tensor) -> Tensor:
        """A copy of the part of a whole tensor."""
        ...

    def read(self, stored: Any, shape: Sequence[int]) -> Tensor:
        """The part of a tensor of `shape` in a file, of which `stored` gives any slice."""
        ...


def draw_rows(build: Callable[[], nn.Module], cut: Cut, device: torch.device) -> nn.Module:
    """Return the model that `build` makes, each parameter without storage and with its part as attribute `rows`.

    Raises:
        NotImplementedError: the model draws its weights in a way that needs more than one whole at a time.
    """
    mode = OnePartAtATime(cut, device)
    with without_storage(mode.watch), mode:
        model = build()
    for parameter in model.parameters():
        parameter.rows = mode.take(parameter)  # type: ignore[attr-defined]
    return model


class OnePartAtATime(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Writes to parameters of no storage are done to a whole tensor, of which `cut` keeps a part.

    Args:
        device: where whole tensors are drawn, and parts kept.
    """

    def __init__(self, cut: Cut, device: torch.device) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cut, self._device = cut, device
        self._parts: dict[int, Tensor] = {}
        self._parameters: dict[int, Tensor] = {}
        self._owner = 0
        self._whole: Tensor | None = None

    def watch(self, parameter: Tensor) -> None:
        """Have a parameter without storage drawn by parts."""
        self._parameters[_address(parameter)] = parameter

    def take(self, parameter: Tensor) -> Tensor:
        """Hand over the part that was drawn for a parameter; values nobody wrote are zeros."""
        self._put_away()
        part = self._parts.pop(_address(parameter), None)
        if part is None:
            part = self._cut(torch.zeros_like(parameter, device=self._device))
        return part

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        target = args[0] if args else None
        if not (func._schema.is_mutable and isinstance(target, Tensor) and self._is_watched(target)):
            return func(*args, **(kwargs or {}))
        if _address(target) in self._parts and not (func in OVERWRITING and _is_whole(target)):
            raise NotImplementedError(
                f"{func} changes values of a {tuple(target.shape)} weight that were drawn before others"
            )
        func(*tree_map(self._real, args), **tree_map(self._real, kwargs or {}))
        return target

    def _is_watched(self, tensor: Tensor) -> bool:
        return tensor.is_meta and _address(tensor) in self._parameters

    def _real(self, value: Any) -> Any:
        """The same view of the whole tensor, where `value` is one of a watched parameter."""
        if not isinstance(value, Tensor) or not self._is_watched(value):
            return value
        whole = self._fetch(_address(value))
        return whole.as_strided(value.size(), value.stride(), value.storage_offset())

    def _fetch(self, address: int) -> Tensor:
        if self._owner != address or self._whole is None:
            self._put_away()
            self._parts.pop(address, None)
            self._owner = address
            self._whole = torch.zeros_like(self._parameters[address], device=self._device)
        return self._whole

    def _put_away(self) -> None:
        if self._whole is not None:
            self._parts[self._owner] = self._cut(self._whole)
        self._owner, self._whole = 0, None


def _is_whole(tensor: Tensor) -> bool:
    """Whether a view shows all of its storage."""
    return tensor.numel() * tensor.element_size() == tensor.untyped_storage().nbytes()


def _address(tensor: Tensor) -> int:
    address: int = tensor.untyped_storage()._cdata
    return address


@contextmanager
def without_storage(watch: Callable[[Tensor], None] = lambda parameter: None) -> Iterator[None]:
    """Give parameters registered inside no storage, and tell `watch` of them; buffers are made as ever."""
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            with torch.utils._python_dispatch._disable_current_modes():
                held = torch.empty_like(parameter, device="meta")
                parameter = type(parameter)(held, requires_grad=parameter.requires_grad)
            watch(parameter)
        register(module, name, parameter)

    with patched(nn.Module, "register_parameter", register_meta):
        yield
