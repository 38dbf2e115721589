"""Blocks that save the least for backward: norms that keep their input alone, products that keep both factors alone,
attention that does not repeat keys and values.

In units of one bf16 hidden state, with r = MLP width / hidden and k = key heads / heads, a LLaMA block saves

    as transformers computes it           10 + 2k + 4r     each norm its input in fp32 and a normalised copy
    with `rms_norm`                        6 + 2k + 4r     its input as it came, and a number a token
    with `rms_norm` and `swiglu`           6 + 2k + 3r     gate and up; what the activation makes of gate is made anew

(and without native grouped attention, keys and values as many as queries: k = 1). Each is held against the module it
stands in for first, and does not stand in where results differ. Forward has the same bits; `swiglu` in backward too.
On CUDA Liger's kernels compute the first two where that package is installed (`offload.liger`), equal to rounding.
"""

import copy
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.functional import gelu, scaled_dot_product_attention, silu
from torch.overrides import handle_torch_function, has_torch_function

from offload.liger import gated_kernel, norm_kernel

aten = torch.ops.aten
ATTENTION = "stowage_grouped"
"""Name under which transformers finds our attention."""


class RMSNorm(torch.autograd.Function):
    """y = w * x / sqrt(mean(x^2) + eps), saving x and the root; (1 + w) in place of w where `plus_one`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        rstd = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, weight, rstd)
        ctx.plus_one = plus_one
        if plus_one:  # Gemma rounds once, at the end
            return (wide * rstd * (1 + weight.to(wide.dtype))).to(x.dtype)
        return weight * (wide * rstd).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        x, weight, rstd = ctx.saved_tensors
        grad = grad.to(rstd.dtype)
        scaled = x * rstd
        factor = weight.to(rstd.dtype) + 1 if ctx.plus_one else weight.to(rstd.dtype)
        d_weight = (grad * scaled).sum_to_size(weight.shape).to(weight.dtype) if ctx.needs_input_grad[1] else None
        grad = grad * factor
        d_x = grad.sub_(scaled.mul_((grad * scaled).mean(-1, keepdim=True))).mul_(rstd)
        return d_x.to(x.dtype), d_weight, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool = False) -> Tensor:
    """Normalise the last dim of x (..., h) by weight (h,)."""
    if has_torch_function((x, weight)):  # so that rules of fates know it by name
        return handle_torch_function(rms_norm, (x, weight), x, weight, eps, plus_one)  # type: ignore[no-any-return]
    kernel = norm_kernel(x, weight)
    if kernel is not None:
        return kernel(x, weight, eps, plus_one)
    return RMSNorm.apply(x, weight, eps, plus_one)  # type: ignore[no-any-return, no-untyped-call]


class Gated(torch.autograd.Function):
    """y = f(gate) * up, saving gate and up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.kind = kind
        return ACTIVATIONS[kind][0](gate) * up

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:  # type: ignore[override]
        gate, up = ctx.saved_tensors
        forward, back = ACTIVATIONS[ctx.kind]
        d_up = grad * forward(gate) if ctx.needs_input_grad[1] else None
        return back(grad * up, gate), d_up, None


ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (silu, aten.silu_backward),
    "gelu": (gelu, aten.gelu_backward),
    "gelu_tanh": (
        lambda x: gelu(x, approximate="tanh"),
        lambda grad, x: aten.gelu_backward(grad, x, approximate="tanh"),
    ),
}


def swiglu(gate: Tensor, up: Tensor, kind: str = "silu") -> Tensor:
    """Multiply an activation of gate (..., f) with up (..., f)."""
    if has_torch_function((gate, up)):
        return handle_torch_function(swiglu, (gate, up), gate, up, kind)  # type: ignore[no-any-return]
    kernel = gated_kernel(gate, up, kind)
    if kernel is not None:
        return kernel(gate, up)
    return Gated.apply(gate, up, kind)  # type: ignore[no-any-return, no-untyped-call]


def make_lean(model: nn.Module) -> dict[str, int]:
    """Put these in place of what the model's modules compute, where they compute the same; return how often each."""
    found = {"norms": 0, "gated MLPs": 0}
    for module in model.modules():
        if "RMSNorm" in type(module).__name__ and isinstance(getattr(module, "weight", None), Tensor):
            found["norms"] += lean_norm(module)
        elif all(isinstance(getattr(module, name, None), nn.Module) for name in ("gate_proj", "up_proj", "down_proj")):
            found["gated MLPs"] += lean_mlp(module)
    return {what: count for what, count in found.items() if count} | group_attention(model)


def lean_norm(module: Any) -> bool:
    eps = module.variance_epsilon if hasattr(module, "variance_epsilon") else module.eps
    weight = torch.linspace(0.5, 1.5, module.weight.numel(), dtype=module.weight.dtype, device="cpu")
    probe = torch.linspace(-2, 3, weight.numel(), dtype=weight.dtype, device="cpu")[None]
    twin = twin_of(module, _parameters={"weight": nn.Parameter(weight)})
    with torch.no_grad():
        expected = twin(probe)
        for plus_one in (False, True):
            if same(rms_norm(probe, weight, eps, plus_one), expected):
                module.forward = MethodType(
                    lambda self, x, plus_one=plus_one: rms_norm(x, self.weight, eps, plus_one), module
                )
                return True
    return False


def lean_mlp(module: Any) -> bool:
    kind = activation_of(module.act_fn)
    if kind is None:
        return False

    def forward(self: Any, x: Tensor) -> Tensor:
        out: Tensor = self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), kind))
        return out

    with torch.random.fork_rng([]), torch.device("cpu"):
        small = {"gate_proj": nn.Linear(4, 8), "up_proj": nn.Linear(4, 8), "down_proj": nn.Linear(8, 4)}
        probe = torch.linspace(-1, 1, 4)[None]
    twin = twin_of(module, _modules=module._modules | small)
    with torch.no_grad():
        if not same(forward(twin, probe), twin(probe)):
            return False
    module.forward = MethodType(forward, module)
    return True


def twin_of(module: nn.Module, **replaced: Any) -> Any:
    """A module of the same code and other contents, small and on the CPU: the module's own may have no storage yet."""
    twin = copy.copy(module)
    twin.__dict__.update(replaced)
    if "forward" in twin.__dict__:  # put in place of the class's, and bound to the original
        twin.forward = MethodType(twin.forward.__func__, twin)  # type: ignore[attr-defined]
    return twin


def activation_of(function: Any) -> str | None:
    """Return the name of an activation we know the derivative of, found by what it computes."""
    probe = torch.linspace(-4, 4, 64, device="cpu")
    with torch.no_grad():
        return next((kind for kind, (known, _) in ACTIVATIONS.items() if same(known(probe), function(probe))), None)


def same(one: Tensor, other: Tensor) -> bool:
    """Whether two results agree; fake ones have no values, and their modules are taken to be of the known kind."""
    if isinstance(one, FakeTensor):
        return True
    return one.dtype == other.dtype and torch.allclose(one, other, rtol=1e-6, atol=1e-7)


def group_attention(model: nn.Module) -> dict[str, int]:
    """Let attention take fewer key heads than query heads as they are, where torch's kernel can."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import sdpa_mask

    config: Any = getattr(model, "config", None)
    heads, keys = (getattr(config, name, None) for name in ("num_attention_heads", "num_key_value_heads"))
    if getattr(config, "_attn_implementation", None) != "sdpa" or not heads or not keys or heads == keys:
        return {}
    AttentionInterface.register(ATTENTION, grouped_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)  # type: ignore[operator]
    return {"grouped attentions": int(config.num_hidden_layers)}


def grouped_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """transformers' sdpa, without repeated keys and values where the kernel takes them so.

    The CPU's flash kernel does with a mask, those of CUDA without one; transformers itself repeats on both with one.

    Args:
        query: (batch, heads, sequence, width); key, value: (batch, key heads, sequence, width).
    """
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    plain = set(options) <= PLAIN_OPTIONS or all(options[name] is None for name in set(options) - PLAIN_OPTIONS)
    if attention_mask is None or query.device.type != "cpu" or not plain:
        out: tuple[Tensor, None] = sdpa_attention_forward(module, query, key, value, attention_mask, **options)
        return out
    attended = scaled_dot_product_attention(
        query,
        key,
        value,
        attn_mask=attention_mask,
        dropout_p=options.get("dropout", 0.0),
        scale=options.get("scaling"),
        enable_gqa=True,
    )
    return attended.transpose(1, 2).contiguous(), None


PLAIN_OPTIONS = {"dropout", "scaling", "is_causal", "sliding_window", "position_ids", "use_cache", "output_attentions"}
"""What transformers passes along that says nothing beyond the mask."""
