"""INT8 weights: a matrix that is one byte a value in memory and dequantized each time it is used.

`Int8Weight` looks like a tensor of its outer dtype (bf16: our optimizers widen what is narrower than fp32). An operator
that reads one gets its dequantized values, so that a model needs no other layers. Autograd saves the codes, not those
values, and backward dequantizes again; the gradient is an ordinary tensor of the outer dtype. What stays int8: slices
of whole rows, transposes, copies and moves between devices. Other views are refused, since writes to them would be
lost; so are in-place operators except `copy_`, which rounds to the nearest. Optimizers write through `rounder`, from
fp32.

FSDP2 shards the rows and gathers codes, scales and lows, about half the bytes of bf16.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from optim.fused import Draws
from optim.int8_grid import decode, encode_, groups_of
from optim.rounding import Store, first_index, seed_of

aten = torch.ops.aten

PARTS = ("codes", "scale", "low")
"""The tensors of an Int8Weight: uint8 (m, n), fp32 and fp32 (m, groups)."""


class Int8Weight(Tensor):
    """A weight (m, n) as `codes`, `scale` and `low` (`int8_grid.py`), in groups of up to `group` neighbours in a row.

    `form` says how it is seen: "rows" as it is, "turned" as the transpose, "flat" in one dimension (for FSDP2).
    """

    codes: Tensor
    scale: Tensor
    low: Tensor
    group: int
    form: str

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, codes: Tensor, scale: Tensor, low: Tensor, *, group: int, dtype: torch.dtype, form: str = "rows"
    ) -> "Int8Weight":
        m, n = codes.shape
        size, stride = {"rows": ((m, n), (n, 1)), "turned": ((n, m), (1, n)), "flat": ((m * n,), (1,))}[form]
        made: Int8Weight = Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls, size, strides=stride, storage_offset=codes.storage_offset(), dtype=dtype, device=codes.device
        )
        made.codes, made.scale, made.low, made.group, made.form = codes, scale, low, group, form
        return made

    @classmethod
    @torch.no_grad()
    def quantize(cls, values: Tensor, group: int, dtype: torch.dtype | None = None) -> "Int8Weight":
        """Round an (m, n) matrix to the nearest values on the grids of its groups; the outer `dtype` is its own."""
        made = cls.empty(values.shape, group, dtype or values.dtype, values.device)
        made.write_(values)
        return made

    @classmethod
    def empty(cls, shape: Sequence[int], group: int, dtype: torch.dtype, device: torch.device) -> "Int8Weight":
        """A matrix without values yet."""
        codes = torch.empty(tuple(shape), dtype=torch.uint8, device=device)
        scale, low = (torch.empty(shape[0], groups_of(shape[1], group), device=device) for _ in range(2))
        return cls(codes, scale, low, group=group, dtype=dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:  # type: ignore[override]
        """Its values as a plain tensor, of the outer dtype by default. Not differentiable."""
        plain = torch.empty(self.codes.shape, dtype=dtype or self.dtype, device=self.codes.device)
        decode(self.codes, self.scale, self.low, self.group, plain)
        return plain if self.form == "rows" else plain.T if self.form == "turned" else plain.view(-1)

    def write_(self, values: Tensor, seed: int | None = None, first: int = 0) -> None:
        """Requantize from `values` (m, n), in place; arguments as in `int8_grid.encode_`."""
        assert self.form == "rows", f"an Int8Weight seen as {self.form} is not written to"
        encode_(self.codes, self.scale, self.low, self.group, values, seed, first)

    def like(self, change: Callable[[Tensor], Tensor], form: str | None = None) -> "Int8Weight":
        """Another one, made of what `change` makes of codes, scale and low."""
        codes, scale, low = change(self.codes), change(self.scale), change(self.low)
        return Int8Weight(codes, scale, low, group=self.group, dtype=self.dtype, form=form or self.form)

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        # `module.to(dtype)` does this; torch would swap what is below and leave codes and scales in place
        raise TypeError(f"{self!r}: cannot become {value.dtype}; replace the parameter by weight.dequantize() instead")

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        grad = ", requires_grad=True" if self.requires_grad else ""
        return f"Int8Weight({tuple(self.shape)}, {self.dtype}, {self.device}, group={self.group}{grad})"

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(PARTS), {"group": self.group, "dtype": self.dtype, "form": self.form}

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], context: Any, size: Any, stride: Any) -> "Int8Weight":
        return Int8Weight(*(parts[part] for part in PARTS), **context)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        handler = HANDLERS.get(func)
        if handler is not None:
            return handler(*args, **(kwargs or {}))
        if isinstance(args[0], cls) and (func.is_view or func._schema.is_mutable):
            raise _refusal(args[0], f"{func} is not for int8 weights: copy_ and optimizers write them, rows are sliced")
        args, kwargs = tree_map_only(cls, cls.dequantize, (args, kwargs or {}))
        return func(*args, **kwargs)

    # FSDP2's hooks. It would refuse the scales of a parameter whose rows do not divide evenly if this took more
    # arguments than the mesh (`_fsdp_param.py: all_gather_inputs`, torch 2.13).
    def fsdp_pre_all_gather(self, mesh: Any) -> tuple[tuple[Tensor, ...], None]:
        """What is gathered: codes, scale and low, with the rows that FSDP2 has padded this shard by."""
        rows = self.codes.untyped_storage().nbytes() // max(self.codes.shape[1], 1)
        parts = self.codes, self.scale, self.low
        return tuple(part.as_strided((rows, part.shape[1]), part.stride(), 0) for part in parts), None

    def fsdp_post_all_gather(
        self, gathered: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None
    ) -> tuple["Int8Weight", tuple[Tensor, ...]] | None:
        """The whole weight; from the second time on FSDP2 has filled the storages that it views."""
        return (Int8Weight(*gathered, group=self.group, dtype=dtype), gathered) if out is None else None


def stochastic_int8(name: str, step: int, whole: Int8Weight, *, row: int = 0) -> Store:
    """Return a rounder for one parameter in one step, as `optim.rounding.Stochastic` does for bf16."""
    seed = seed_of(name, step)

    def round_(target: Tensor, wide: Tensor) -> None:
        assert isinstance(target, Int8Weight)
        target.write_(wide, seed, first_index(target, whole, row))

    return round_


def rounder(p: Tensor, name: str, step: int, rounding: str, **where: int) -> Store:
    """Return the way to write an fp32 step into a parameter, whatever it is stored in.

    Args:
        p: the parameter, or this rank's part of it.
        name: of the parameter; with `step` it decides the draws.
        rounding: "nearest" or "stochastic".
        where: that part begins, as `optim.rounding.Stochastic` takes it; int8 weights come in rows only.
    """
    if rounding == "stochastic" and isinstance(p, Int8Weight):
        return stochastic_int8(name, step, p, **where)
    if rounding == "stochastic" and p.dtype is torch.bfloat16:
        return Draws(name, step, p, **where)
    return Tensor.copy_


def _alias(weight: Int8Weight) -> Int8Weight:
    return weight.like(lambda part: part)


def _clone(weight: Int8Weight, *, memory_format: torch.memory_format = torch.preserve_format) -> Tensor:
    if weight.form == "turned" and memory_format is torch.contiguous_format:
        return weight.dequantize().contiguous()
    return weight.like(lambda part: part.clone())


def _slice(weight: Int8Weight, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Tensor:
    size = weight.shape[dim]
    begin, stop, _ = slice(start, end).indices(size)
    if weight.form == "rows" and step == 1 and (dim % 2 == 0 or (begin, stop) == (0, size)):
        return weight.like(lambda part: part[begin:stop] if dim % 2 == 0 else part)
    raise _refusal(weight, "only whole, neighbouring rows can be sliced")


def _split(weight: Int8Weight, size: int, dim: int = 0) -> list[Tensor]:
    length = weight.shape[dim]
    return [_slice(weight, dim, start, min(start + size, length)) for start in range(0, max(length, 1), max(size, 1))]


def _turn(weight: Int8Weight) -> Int8Weight:
    if weight.form == "flat":
        raise _refusal(weight, "one dimension cannot be transposed")
    return weight.like(lambda part: part, "turned" if weight.form == "rows" else "rows")


def _transpose(weight: Int8Weight, one: int, other: int) -> Int8Weight:
    return _alias(weight) if (one - other) % 2 == 0 else _turn(weight)


def _permute(weight: Int8Weight, dims: Sequence[int]) -> Int8Weight:
    return _transpose(weight, 0, dims[0] % 2)


def _view(weight: Int8Weight, size: Sequence[int]) -> Int8Weight:
    if tuple(size) == tuple(weight.shape):
        return _alias(weight)
    if weight.form == "rows" and list(size) in ([-1], [weight.numel()]):
        return weight.like(lambda part: part, "flat")
    raise _refusal(weight, f"it cannot be viewed as {tuple(size)}")


def _as_strided(weight: Int8Weight, size: Sequence[int], stride: Sequence[int], offset: int | None = None) -> Tensor:
    """The first rows: how FSDP2 cuts off its padding."""
    width, own = weight.codes.shape[1], weight.storage_offset()
    at_start = weight.form == "rows" and offset in (None, own) and tuple(stride) == (width, 1)
    if at_start and len(size) == 2 and size[0] <= len(weight.codes) and size[1] == width:
        return weight.like(lambda part: part[: size[0]])
    raise _refusal(weight, f"it cannot be viewed as {tuple(size)} with strides {tuple(stride)}")


def _to_copy(
    weight: Int8Weight, *, dtype: torch.dtype | None = None, device: torch.device | None = None,
    non_blocking: bool = False, **_: Any,
) -> Tensor:  # fmt: skip
    if dtype in (None, weight.dtype):
        return weight.like(lambda part: part.to(device, non_blocking=non_blocking, copy=True))
    return weight.dequantize(dtype).to(device, non_blocking=non_blocking)


def _copy_(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Weight):
        assert isinstance(source, Int8Weight)
        return target.copy_(source.dequantize(target.dtype), non_blocking=non_blocking)
    if isinstance(source, Int8Weight):
        if (source.group, source.form, source.shape) == (target.group, target.form, target.shape):
            for part in PARTS:
                getattr(target, part).copy_(getattr(source, part), non_blocking=non_blocking)
            return target
        source = source.dequantize(torch.float32)
    if target.form == "flat":
        raise _refusal(target, "one dimension is not written to")
    rows, values = (target, source) if target.form == "rows" else (_turn(target), source.mT)
    rows.write_(values.to(target.device, non_blocking=non_blocking).expand(rows.shape))
    return target


def _new_zeros(weight: Int8Weight, size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """int8 for rows as wide and no dtype, which is how FSDP2 asks for a padded shard; plain otherwise."""
    if dtype is None and len(size) == 2 and size[1] == weight.codes.shape[1]:
        return weight.like(lambda part: part.new_zeros((size[0], part.shape[1]), **options), "rows")
    return weight.codes.new_zeros(size, dtype=dtype or weight.dtype, **options)


def _zeros_like(weight: Int8Weight, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    return torch.zeros(weight.shape, dtype=dtype or weight.dtype, **{"device": weight.device} | _chosen(options))


def _empty_like(weight: Int8Weight, *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    device = options.get("device") or weight.device
    if dtype in (None, weight.dtype):
        return weight.like(lambda part: torch.empty_like(part, device=device))
    return torch.empty(weight.shape, dtype=dtype, device=device)


def _chosen(options: dict[str, Any]) -> dict[str, Any]:
    return {key: options[key] for key in ("device", "pin_memory") if options.get(key) is not None}


def _pin(weight: Int8Weight, *_: Any, **__: Any) -> Int8Weight:
    return weight.like(lambda part: part.pin_memory())


def _is_pinned(weight: Int8Weight, *_: Any, **__: Any) -> bool:
    return weight.codes.is_pinned()


def _refusal(weight: Int8Weight, why: str) -> NotImplementedError:
    return NotImplementedError(f"{weight!r}: {why}. Take weight.dequantize() for its values.")


HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _alias,
    aten.alias.default: _alias,
    aten.clone.default: _clone,
    aten.slice.Tensor: _slice,
    aten.split.Tensor: _split,
    aten.t.default: _turn,
    aten.transpose.int: _transpose,
    aten.permute.default: _permute,
    aten.view.default: _view,
    aten.as_strided.default: _as_strided,
    aten._to_copy.default: _to_copy,
    aten.copy_.default: _copy_,
    aten.new_zeros.default: _new_zeros,
    aten.zeros_like.default: _zeros_like,
    aten.empty_like.default: _empty_like,
    aten._pin_memory.default: _pin,
    aten.is_pinned.default: _is_pinned,
}
"""What is not the operator on dequantized values."""

torch.serialization.add_safe_globals([Int8Weight])  # for `torch.load(weights_only=True)`
