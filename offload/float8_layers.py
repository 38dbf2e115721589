"""Which layers of a model compute in FP8: chosen by the names of their weights, and switched off for a while."""

import contextlib
import functools
import re
from collections.abc import Iterator, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn

from offload.float8 import MULTIPLE, Recipe, Shared, linear


def use_float8(blocks: Sequence[tuple[str, nn.Module]], targets: str, recipe_name: str) -> list[str]:
    """Let every linear layer of `blocks` whose weight's name the regular expression `targets` finds compute in FP8.

    Parameters stay what they are. Returns the names of layers left out, since their sides are no multiples of 16.

    Raises:
        ValueError: none is left.
    """
    recipe, shared, done, left_out, seen = Recipe(recipe_name), Shared(), 0, [], []
    for block, top in blocks:
        top.register_forward_hook(functools.partial(forget, shared), always_call=True)
        for name, module in top.named_modules():
            full = f"{block}.{name}"
            if type(module) is not nn.Linear:
                continue
            seen.append(full)
            if re.search(targets, f"{full}.weight") is None:
                continue
            if module.in_features % MULTIPLE or module.out_features % MULTIPLE:
                left_out.append(full)
                continue
            layer: Any = module
            layer.forward = MethodType(functools.partial(forward, recipe=recipe, shared=shared), layer)
            done += 1
    if not done and left_out:
        raise ValueError(
            "precision.compute=fp8: the kernels need sides that are multiples of 16, and none of the model's layers "
            f"has such ({', '.join(left_out[:3])}, ...). Use precision.compute=bf16."
        )
    if not done:
        raise ValueError(
            f"precision.fp8_targets={targets!r}: finds none of the linear layers in the model's blocks. They are "
            f"called {', '.join(seen[:4]) or 'nothing, there are none'}. Give an expression that finds some, or use "
            "precision.compute=bf16."
        )
    return left_out


@contextlib.contextmanager
def plain_products(model: nn.Module) -> Iterator[None]:
    """Compute for a while as if FP8 had not been asked for."""
    held: dict[Any, Any] = {}
    for module in model.modules():
        function = getattr(vars(module).get("forward"), "__func__", None)
        if isinstance(function, functools.partial) and function.func is forward:
            held[module] = vars(module).pop("forward")
    try:
        yield
    finally:
        for module, own in held.items():
            module.forward = own


def forward(self: nn.Linear, x: Tensor, *, recipe: Recipe, shared: Shared) -> Tensor:
    return linear(x, self.weight, self.bias, recipe, shared)


def forget(shared: Shared, module: nn.Module, args: Any, out: Any) -> None:
    """A block's last codes are of no use to the next."""
    shared.forget()
