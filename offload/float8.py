"""Linear layers whose three products run in FP8, by torchao's recipes, and keep for backward the codes they used.

    y = x W^T        dx = dy W        dW = dy^T x        both factors of each cast with scales made at the moment

The casts, scales and CUDA kernels are torchao's (`torchao.float8`), and so is every bit: its own `Float8Linear` saves x
in bf16 and casts it again for dW. Where the recipe casts x for dW as it did for y (`tensorwise`), the second cast makes
the same codes, so here the codes are what is saved, one byte a value, one copy for all layers that are given the same x
(q, k, v; gate and up): COAT's rule for the inputs of linear layers, at no loss. What attention saves anyway stays
shared with it. The other recipes save x, which then meets its fate like any other tensor.

Off CUDA the products run on the decoded values in fp32, as torchao's `emulate=True`: the same numbers but for the
order of sums, at the speed of fp32. Recipes: Micikevicius et al. 2022, arXiv:2209.05433 (E4M3 forward, E5M2 gradients);
Xi et al. 2024, arXiv:2410.19313 (codes kept).

Ranks: a weight is cast where it is whole, after FSDP2 has gathered it, so its scale is the same on all of them without
a collective. Those of x and dy are of one micro-batch on one rank, as in torchao: a maximum over all ranks would cost a
wait in each of 14 products a block, and accumulation would still see one micro-batch at a time. So another split of the
batch rounds otherwise, but under `rowwise_with_gw_hp`, whose scales are of single tokens.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from offload.compress import wide
from offload.fused import Fused, pays
from offload.saving import is_attentions_output

MULTIPLE = 16
"""What FP8 kernels need of each side of a matrix."""


@dataclass(frozen=True)
class Coded:
    """A matrix in FP8: codes (m, n), and the fp32 scale that values were multiplied by: of all (), of each row (m, 1)
    or of each column (1, n)."""

    codes: Tensor
    scale: Tensor

    def t(self) -> Coded:
        return Coded(self.codes.t(), self.scale.t() if self.scale.dim() > 1 else self.scale)

    def values(self) -> Tensor:
        """(m, n) fp32, in the order in memory of the codes."""
        if not self.codes.is_contiguous():
            return self.t().values().t()
        return wide(self.codes) / self.scale


class Recipe:
    """One of torchao's recipes: how each factor of each product is cast.

    Args:
        name: tensorwise, rowwise or rowwise_with_gw_hp.
    """

    def __init__(self, name: str) -> None:
        from torchao.float8 import Float8LinearConfig

        self.name = name
        self.cfg: Any = Float8LinearConfig.from_recipe_name(name)
        same = self.cfg.cast_config_input == self.cfg.cast_config_input_for_grad_weight
        self.keeps_codes = same and not is_axiswise(self.cfg.cast_config_input)
        """Whether x has the same codes in dW as in y."""

    def cast(self, x: Tensor, how: Any, dim: int) -> Coded:
        """Cast (m, n); `dim` is the one along which values share a scale, where not all do."""
        from torchao.float8.float8_utils import amax_to_scale

        along = dim % 2 if is_axiswise(how) else None
        shape = () if along is None else (x.shape[0], 1) if along else (1, x.shape[1])
        peaks, codes = x.new_empty(shape), torch.empty_like(x, dtype=how.target_dtype)
        (write_peaks if pays(x) else write_peaks.function)(peaks, x, along)
        scale = amax_to_scale(peaks, how.target_dtype, self.cfg.round_scales_to_power_of_2)
        (write_codes if pays(x) else write_codes.function)(codes, x, scale)
        return Coded(codes, scale)


@Fused
def write_peaks(peaks: Tensor, x: Tensor, along: int | None) -> None:
    """Largest magnitude of (m, n), of all or along a dim."""
    magnitudes = x.abs()
    peaks.copy_(magnitudes.amax() if along is None else magnitudes.amax(along, keepdim=True))


@Fused
def write_codes(codes: Tensor, x: Tensor, scale: Tensor) -> None:
    """Codes (m, n) of x times its scale. Clamped, since torch up to 2.11 makes NaN of what is too large."""
    top = torch.finfo(codes.dtype).max
    codes.copy_((x.float() * scale).clamp_(-top, top))


def is_axiswise(how: Any) -> bool:
    return bool(how.scaling_granularity.value == "axiswise")


def is_off(how: Any) -> bool:
    """Whether a factor stays as it is."""
    return bool(how.scaling_type.value == "disabled")


def product(a: Coded, b: Coded, dtype: torch.dtype, *, fast: bool) -> Tensor:
    """a (m, k) times b (k, n), in `dtype`.

    Args:
        fast: whether tensor cores may add up in fewer bits.
    """
    if a.codes.device.type != "cuda":
        return torch.mm(a.values(), b.values()).to(dtype)
    from torchao.float8.float8_ops import addmm_float8_unwrapped
    from torchao.float8.float8_utils import pad_tensor_for_matmul

    a_scale, b_scale = a.scale, b.scale
    if a_scale.dim() < b_scale.dim():  # kernels take one kind of scale for both
        a_scale = a_scale.repeat(a.codes.shape[0]).reshape(-1, 1)
    elif b_scale.dim() < a_scale.dim():
        b_scale = b_scale.repeat(b.codes.shape[1]).reshape(1, -1)
    a_codes, b_codes = a.codes, b.codes
    if a_codes.shape[1] % MULTIPLE:  # tokens, in dW
        a_codes, b_codes = pad_tensor_for_matmul(a_codes, dims=1), pad_tensor_for_matmul(b_codes, dims=0)
    rows, columns = a_codes.contiguous(), b_codes.t().contiguous().t()  # the kernels' order: copied where it is another
    out: Tensor = addmm_float8_unwrapped(rows, a_scale, columns, b_scale, dtype, use_fast_accum=fast)
    return out


class Product(torch.autograd.Function):
    """x (m, k) times the transpose of weight (n, k), in x's dtype; `coded` is x in FP8."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, coded: Coded, recipe: Recipe, shared: Shared, keep_codes: bool
    ) -> Tensor:
        cfg = recipe.cfg
        ctx.recipe, ctx.shared, ctx.keeps_codes, ctx.dtype = recipe, shared, keep_codes, x.dtype
        trained = ctx.needs_input_grad[1]
        ctx.save_for_backward(weight, *(((coded.codes, coded.scale) if keep_codes else (x,)) if trained else ()))
        matrix = recipe.cast(weight.to(x.dtype).t(), cfg.cast_config_weight, 0)
        return product(coded, matrix, x.dtype, fast=cfg.gemm_config_output.use_fast_accum)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        ctx.shared.forget()  # what a recomputation left there
        recipe, cfg = ctx.recipe, ctx.recipe.cfg
        weight, *kept = ctx.saved_tensors
        coded_grad = recipe.cast(grad, cfg.cast_config_grad_output, -1)
        d_x = d_weight = None
        if ctx.needs_input_grad[0]:
            matrix = recipe.cast(weight.to(ctx.dtype).t(), cfg.cast_config_weight_for_grad_input, -1).t()
            d_x = product(coded_grad, matrix, ctx.dtype, fast=cfg.gemm_config_grad_input.use_fast_accum)
        if ctx.needs_input_grad[1]:
            d_weight = grad_weight(ctx, grad, coded_grad, kept).to(weight.dtype)
        return d_x, d_weight, None, None, None, None


def grad_weight(ctx: Any, grad: Tensor, coded_grad: Coded, kept: list[Tensor]) -> Tensor:
    """dy^T x, (n, k)."""
    cfg = ctx.recipe.cfg
    how, how_grad = cfg.cast_config_input_for_grad_weight, cfg.cast_config_grad_output_for_grad_weight
    if is_off(how):
        return torch.mm(grad.t(), kept[0])
    x = Coded(*kept) if ctx.keeps_codes else ctx.recipe.cast(kept[0], how, 0)
    if is_axiswise(how_grad) or how_grad != cfg.cast_config_grad_output:
        coded_grad = ctx.recipe.cast(grad, how_grad, 0)
    return product(coded_grad.t(), x, ctx.dtype, fast=cfg.gemm_config_grad_weight.use_fast_accum)


class Shared:
    """The codes of the tensor that was cast last, for the layers beside the one that cast it."""

    def __init__(self) -> None:
        self._of: tuple[Any, ...] | None = None
        self._storage: weakref.ref[torch.UntypedStorage] | None = None
        self._coded: Coded | None = None

    def cast(self, x: Tensor, flat: Tensor, recipe: Recipe) -> Coded:
        """Codes of `flat` (m, k), which is x as rows and in the dtype of the product; those of the last x again."""
        storage, of = x.untyped_storage(), (x._version, x.storage_offset(), x.shape, x.stride(), flat.dtype, recipe)
        known = self._storage() if self._storage is not None else None
        if self._coded is None or known is not storage or self._of != of:
            self._coded = recipe.cast(flat, recipe.cfg.cast_config_input, -1)
            self._storage, self._of = weakref.ref(storage), of
        return self._coded

    def forget(self) -> None:
        self._of = self._storage = self._coded = None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: Recipe, shared: Shared) -> Tensor:
    """x (..., k) through a layer of weight (n, k), its products in FP8. Under autocast x and weight are cast first."""
    if has_torch_function((x, weight)):  # so that rules of fates know it by name
        return handle_torch_function(linear, (x, weight), x, weight, bias, recipe, shared)  # type: ignore[no-any-return]
    kind = x.device.type
    near = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
    flat = near.reshape(-1, x.shape[-1])
    with torch.no_grad():
        coded = shared.cast(x, flat, recipe)
    keep_codes = recipe.keeps_codes and not is_attentions_output(near)
    y: Tensor = Product.apply(flat, weight, coded, recipe, shared, keep_codes)  # type: ignore[no-untyped-call]
    y = y.view(*x.shape[:-1], weight.shape[0])
    return y if bias is None else y + bias.to(y.dtype)
