"""Which weights of a model become int8, the way back, and what a checkpoint holds of them."""

import re
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from optim.int8 import PARTS, Int8Weight
from optim.int8_grid import groups_of
from parallel.dtensor import Layout, local


def quantize_weights(model: nn.Module, targets: str, group: int, device: torch.device | None = None) -> list[str]:
    """Make int8 of every matrix whose parameter name the regular expression `targets` finds; return their names.

    Each is rounded to the nearest and keeps its dtype on the outside. A tied matrix stays tied.

    Args:
        device: where the matrices go before they are rounded, so that they are never there together in full. Of a
            parameter without storage it is the rows that it carries (`parallel.shard`) that go there.

    Raises:
        ValueError: nothing found.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}
    names = []
    for name, owner, key, parameter in list(_matrices(model)):
        if re.search(targets, name) is None:
            continue
        if parameter not in made:
            made[parameter] = quantized(parameter, group, device)
            names.append(name)
        setattr(owner, key, made[parameter])
    if not names:
        some = ", ".join([name for name, *_ in _matrices(model)][:5]) or "none"
        raise ValueError(
            f"precision.int8_targets={targets!r}: finds none of the model's matrices. Their names look like: {some}. "
            "Give a regular expression that finds some of them, or use precision=bf16_sr."
        )
    return names


def quantized(parameter: nn.Parameter, group: int, device: torch.device | None) -> nn.Parameter:
    """An int8 parameter of the same values; of one that has no storage, one that has none and carries int8 rows."""
    values = parameter.detach()
    if not values.is_meta:
        weight = Int8Weight.quantize(values.to(device or values.device), group)
        return nn.Parameter(weight, parameter.requires_grad)
    made = nn.Parameter(Int8Weight.empty(values.shape, group, values.dtype, values.device), parameter.requires_grad)
    rows = parameter.__dict__.pop("rows", None)  # taken from it, so that no two matrices are there in full
    if rows is not None:
        made.rows = Int8Weight.quantize(rows.to(device or rows.device), group)  # type: ignore[attr-defined]
    return made


def dequantize_weights(model: nn.Module) -> None:
    """Make plain parameters of every int8 one."""
    made: dict[nn.Parameter, nn.Parameter] = {}
    for _, owner, key, parameter in list(_matrices(model)):
        if isinstance(parameter, Int8Weight):
            if parameter not in made:
                made[parameter] = nn.Parameter(parameter.dequantize(), parameter.requires_grad)
            setattr(owner, key, made[parameter])


def plain_parts(tensor: Tensor) -> dict[str, Tensor] | None:
    """Codes, scale and low of an int8 weight as plain tensors on its storage; of a sharded one as DTensors; None of
    any other tensor."""
    weight = local(tensor)
    if not isinstance(weight, Int8Weight):
        return None
    layout, (m, n) = Layout.of(tensor), tensor.shape
    widths = {"codes": n, "scale": groups_of(n, weight.group), "low": groups_of(n, weight.group)}
    return {part: layout.like((m, widths[part]), 0).wrap(getattr(weight, part)) for part in PARTS}


def _matrices(model: nn.Module) -> Iterator[tuple[str, nn.Module, str, nn.Parameter]]:
    """(name, module, key, parameter) of every matrix, a tied one under each of its names."""
    for prefix, module in model.named_modules():
        for key, parameter in module.named_parameters(recurse=False):
            if parameter.dim() == 2:
                yield f"{prefix}.{key}" if prefix else key, module, key, parameter
