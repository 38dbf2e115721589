"""Which saved tensors have a fate at all, and who is saving: the function and the module that run.

What stays as autograd keeps it, whatever the policy: what a block does not make itself (parameters, buffers, and what
it is given beside its hidden state: rotary tables, masks), what a cast or a view makes of a parameter, and tensors
whose bytes are no plain storage.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode

from offload.compress import FP8_GROUP, INT8_GROUP
from offload.config import Fate

VIEWS = frozenset(
    f"{name}Backward0" for name in ("T", "View", "UnsafeView", "ReshapeAlias", "Alias", "Transpose", "Permute")
)
"""Autograd's names for another form of the same bytes."""
CASTS = VIEWS | {"ToCopyBackward0"}
"""And of the same values: what stands between a parameter and what a product is given of it."""


class Operator(TorchFunctionMode):  # type: ignore[misc]
    """Knows which of torch's functions the model is calling."""

    def __init__(self) -> None:
        super().__init__()
        self.current: str | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        outer, self.current = self.current, getattr(func, "__name__", "").strip("_")
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.current = outer


class Caller:
    """Who is saving, while a block runs.

    Args:
        operators, modules: whether the policy asks for either; neither is followed where it does not.
    """

    def __init__(self, *, operators: bool, modules: bool) -> None:
        self._operators, self._by_module = operators, modules
        self._operator = Operator()
        self._modules: list[str] = []

    @property
    def operator(self) -> str | None:
        return self._operator.current

    @property
    def module(self) -> str:
        """Full name of the innermost module that runs."""
        return self._modules[-1] if self._modules else ""

    def follow(self, block: str, top: nn.Module) -> None:
        """Learn of every module inside a block when it runs."""
        if not self._by_module:
            return
        for name, module in top.named_modules():
            if name:
                full = f"{block}.{name}"
                module.register_forward_pre_hook(lambda _, __, full=full: self._modules.append(full))
                module.register_forward_hook(lambda _, __, ___: self._leave(), always_call=True)

    def _leave(self) -> None:
        if self._modules:
            self._modules.pop()

    def enter(self, stack: ExitStack, block: str) -> None:
        """Watch one run of a block, to the end of `stack`."""
        self._modules = [block]
        stack.callback(self._modules.clear)
        if self._operators:
            stack.enter_context(self._operator)


def given(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Tensor]:
    """Tensors that a block does not make: its parameters and buffers, and its arguments but the first."""
    yield from block.parameters()
    yield from block.buffers()
    pending: list[Any] = [*args[1:], *kwargs.values()]
    while pending:
        value = pending.pop()
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            pending.extend(value)
        elif isinstance(value, dict):
            pending.extend(value.values())


def has_storage(tensor: Tensor) -> bool:
    """Whether the bytes of a tensor are one plain storage: neither a wrapper, nor sparse, nor lazily negated."""
    plain = type(tensor) in (Tensor, nn.Parameter) or isinstance(tensor, FakeTensor)
    return plain and tensor.layout is torch.strided and not tensor.is_conj() and not tensor.is_neg()


def is_on(device: torch.device, tensor: Tensor) -> bool:
    """Whether a tensor is on `device`, which may be any of its type where it has no index."""
    return tensor.device.type == device.type and device.index in (None, tensor.device.index)


def origin(tensor: Tensor, forms: frozenset[str]) -> Any:
    """Autograd's node of what a tensor is another form of; None for a leaf."""
    node: Any = tensor.grad_fn
    while node is not None and node.name() in forms:
        node = node.next_functions[0][0]
    return node


def is_parameters_form(tensor: Tensor) -> bool:
    """Whether a tensor is a parameter after nothing but casts and views."""
    return getattr(origin(tensor, CASTS), "variable", None) is not None


def is_attentions_output(tensor: Tensor) -> bool:
    """Whether attention keeps these bytes for its own backward."""
    node = origin(tensor, VIEWS)
    return node is not None and "ScaledDotProduct" in node.name()


def row_of(tensor: Tensor, fate: Fate) -> int | None:
    """Values in a row of the storage of `tensor`, in whose rows groups of codes are to lie; None where no codes can
    stand for it: numbers, in rows at least a group long, that make up the whole storage.
    """
    group = INT8_GROUP if fate is Fate.int8 else FP8_GROUP
    if not tensor.is_floating_point() or tensor.itemsize < 2 or tensor.dim() == 0:
        return None
    width = tensor.shape[-1]
    if width < group or tensor.stride(-1) != 1:
        return None
    steps = [step for size, step in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1 and step]
    row = min(steps, default=width)  # longer than wide: a part of rows, such as the half of one product for two
    whole = tensor.untyped_storage().nbytes() // tensor.itemsize
    return row if row >= width and whole % row == 0 else None
