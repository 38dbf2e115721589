"""What the counter must know about torch: which operators make storages, and how to watch what shows in none."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.autograd.graph import _engine_run_backward

aten = torch.ops.aten

_opens_up: dict[Any, bool] = {}
_makes_nothing: dict[Any, bool] = {}


def opens_up(types: tuple[type, ...]) -> bool:
    """Whether one of the tensor subclasses wraps inner tensors."""
    found = _opens_up.get(types)
    if found is None:
        found = _opens_up[types] = any(hasattr(kind, "__tensor_flatten__") for kind in types)
    return found


def makes_nothing(func: Any) -> bool:
    """Whether an operator can neither make nor resize a storage: views, and questions put to fake tensors."""
    found = _makes_nothing.get(func)
    if found is None:
        composite = torch._C.DispatchKey.CompositeImplicitAutograd  # reshape and its like copy where they must
        found = isinstance(func, torch._ops.OpOverload) and (
            func.namespace == "prim"
            or func.is_view
            and func is not aten.lift_fresh.default
            and not func.has_kernel_for_dispatch_key(composite)
        )
        _makes_nothing[func] = found
    return found


def sums_gradients() -> bool:
    """Whether the operator that is being dispatched was called by autograd's engine, not by Python code it runs.

    Then the innermost Python frame, but for torch's wrappers of `__torch_dispatch__`, is the call of the engine; on the
    engine's own threads there is none. An addition made so is the engine's sum of two gradients, as the formulas of the
    operators in a language model add nothing.
    """
    if torch._C._current_graph_task_id() == -1:
        return False
    frame = sys._getframe(2)
    while frame is not None and frame.f_code.co_name in ("inner", "_fn"):
        frame = frame.f_back  # type: ignore[assignment]
    return frame is None or frame.f_code is _engine_run_backward.__code__


@contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Replace an attribute for a while."""
    inherited = name not in vars(owner)
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if inherited:
            delattr(owner, name)
        else:
            setattr(owner, name, before)
