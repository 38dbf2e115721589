"""What weights are stored in and what products run in.

| weights | compute | how |
|---|---|---|
| fp32 | fp32 | plain |
| fp32 | bf16 | torch.autocast: products in bf16, norms, softmax and loss in fp32 |
| bf16 | bf16 | plain; the optimizer's math stays fp32 |
| bf16_sr | bf16 | the same, and steps are rounded stochastically: what is below a digit is not lost on average |
| int8_sr | bf16 | the same, with the matrices in attention and MLP as whole numbers of 8 bits (`optim.int8`) |
| fp32, bf16, bf16_sr | fp8 | as with bf16, the products of the blocks' linear layers in FP8 (`offload.float8`) |
| fp64 | fp64 | for proofs of equality: RMSNorms, which transformers computes in fp32, are widened too |
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from types import MethodType

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from offload.float8_layers import use_float8
from optim.config import Compat, OptimConfig, Products
from optim.config_lowrank import ProjectedConfig
from trainer.adapt import blocks
from trainer.errors import UserError
from trainer.schema import Config, Dtype, PrecisionConfig

TORCH_DTYPES = {
    Dtype.fp32: torch.float32,
    Dtype.bf16: torch.bfloat16,
    Dtype.bf16_sr: torch.bfloat16,
    Dtype.int8_sr: torch.bfloat16,
    Dtype.fp64: torch.float64,
}


def torch_dtype(dtype: Dtype) -> torch.dtype:
    """Return torch's dtype of a configured one."""
    return TORCH_DTYPES[dtype]


@dataclass(frozen=True)
class Int8Matrices:
    """Which matrices are kept in int8, by a regular expression of their names, and how many values share a scale."""

    targets: str
    group: int


def int8_matrices(cfg: Config) -> Int8Matrices | None:
    """Return what of the model is int8, None if nothing is."""
    if cfg.precision.weights is not Dtype.int8_sr:
        return None
    return Int8Matrices(cfg.precision.int8_targets, cfg.precision.int8_group or cfg.optim.int8_group)


def rounding(cfg: PrecisionConfig) -> str:
    """Return how an optimizer is to round a step to narrower weights."""
    return "stochastic" if cfg.weights in (Dtype.bf16_sr, Dtype.int8_sr) else "nearest"


def precision_text(cfg: PrecisionConfig) -> str:
    """`fp32`, or `fp32 weights, bf16 products` where they differ."""
    weights, compute = cfg.weights.value, cfg.compute.value
    return weights if weights == compute else f"{weights} weights, {compute} products"


def settled(cfg: Config, device: torch.device) -> OptimConfig:
    """Return the options of the optimizer, with those decided that follow from precision and device."""
    optim = cfg.optim
    if not (isinstance(optim, ProjectedConfig) and optim.products is None):
        return optim
    authors = getattr(optim, "compat", None) is Compat.authors
    narrow = cfg.precision.compute in (Dtype.bf16, Dtype.fp8) and device.type == "cuda" and not authors
    return replace(optim, products=Products.bf16 if narrow else Products.fp32)


def autocast(cfg: PrecisionConfig, device: torch.device) -> AbstractContextManager[object]:
    """Return the context in which forward runs."""
    return torch.autocast(device.type, torch.bfloat16) if is_mixed(cfg) else nullcontext()


def is_mixed(cfg: PrecisionConfig) -> bool:
    """Whether fp32 weights are cast to bf16 for what is computed with them."""
    return cfg.weights is Dtype.fp32 and cfg.compute in (Dtype.bf16, Dtype.fp8)


def use_float8_of(cfg: PrecisionConfig, model: nn.Module) -> list[str]:
    """Let the model's linear layers compute in FP8 where that is asked for; return what could not, for the user.

    Raises:
        UserError: none could.
    """
    if cfg.compute is not Dtype.fp8:
        return []
    try:
        left_out = use_float8(blocks(model), cfg.fp8_targets, cfg.fp8_recipe.value)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not left_out:
        return []
    return [
        f"{len(left_out)} linear layers compute in bf16, since FP8 kernels need sides that are multiples of 16: "
        + ", ".join(left_out[:3])
        + (", ..." if len(left_out) > 3 else "")
    ]


def wide_rms_norm(module: nn.Module, x: Tensor) -> Tensor:
    """RMSNorm in the dtype of its input: x / sqrt(mean(x^2) + eps) * w."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * module.weight  # type: ignore[operator]


def wide_rms_norm_plus_one(module: nn.Module, x: Tensor) -> Tensor:
    """Gemma's RMSNorm, whose weight is stored as its difference from 1, in the dtype of its input."""
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (1 + module.weight)  # type: ignore[operator]


def widen(model: nn.Module) -> None:
    """Make an fp32 model an fp64 one, fake weights included (which `model.to` does not convert), and the rows that
    parameters of no storage carry."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.double()
            if hasattr(tensor, "rows"):
                tensor.rows = tensor.rows.double()
    widen_norms(model)


def widen_norms(model: nn.Module) -> None:
    """Make every RMSNorm of an fp64 model compute in fp64.

    transformers casts their input to fp32, which would leave every result no better than 1e-7. Each replacement is
    held against the module's own forward first, so an unknown variant is refused instead of changed.
    """
    for name, module in model.named_modules():
        if "RMSNorm" not in type(module).__name__ or not hasattr(module, "weight"):
            continue
        count: int = module.weight.numel()  # type: ignore[assignment,operator]
        probe = torch.linspace(-2, 3, count, dtype=torch.float64)[None]
        with torch.no_grad(), weights_for_a_while(module, torch.linspace(1.5, 0.5, count, dtype=torch.float64)):
            expected = module(probe)
            for wide in (wide_rms_norm, wide_rms_norm_plus_one):
                if isinstance(probe, FakeTensor) or torch.allclose(wide(module, probe), expected, rtol=1e-5, atol=1e-6):
                    module.forward = MethodType(wide, module)
                    break
            else:
                raise UserError(
                    f"precision.weights=fp64: {name} ({type(module).__name__}) computes in fp32 in a way "
                    "that is not known here. Use precision=fp32 for this model."
                )


@contextmanager
def weights_for_a_while(module: nn.Module, weight: Tensor) -> Iterator[None]:
    """Give a module another weight: its own may have no storage yet, and of a new norm is the same number all along."""
    own = module._parameters["weight"]
    module._parameters["weight"] = nn.Parameter(weight)
    try:
        yield
    finally:
        module._parameters["weight"] = own
