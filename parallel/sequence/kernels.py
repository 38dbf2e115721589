"""Attention of a rectangle or triangle of scores, with the log-sum-exp of each query's row, forward and backward.

Backward takes the output and the log-sum-exp of whole rows, of which the tile at hand is a part:

    p  = exp(scale q k^T - lse)            the part's share of the row's softmax
    dv = p^T do
    ds = p * (do v^T - rowsum(do * out)) * scale
    dq = ds k,  dk = ds^T q                of grouped queries summed over those that share a key

so parts of a row may be computed anywhere, in any order, and their gradients be summed. torch's own kernels do it:
flash attention on the CPU (fp64, fp32, bf16) and on CUDA (16 bits), memory-efficient attention on CUDA in fp32; what
they do not take (odd head widths on CUDA) goes through plain products, some rows at a time.
"""

import torch
from torch import Tensor
from torch.nn.functional import pad

aten = torch.ops.aten
LSE_ALIGNMENT = 32
"""The memory-efficient kernel pads the log-sum-exp to a multiple of this many queries."""
SCORES_AT_ONCE = 2**24


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return softmax(scale q k^T) v and the log-sum-exp of each row of scores.

    Args:
        q: (batch, heads, queries, width); heads a multiple of those of k.
        k, v: (batch, key heads, keys, width).
        causal: query i sees the keys up to i; as many keys as queries.

    Returns:
        (batch, heads, queries, width) in the dtype of q, and (batch, heads, queries) in fp32, or fp64 where q is.
    """
    kind = kernel_for(q, v)
    if kind == "cpu":
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
        return out, lse
    if kind == "flash":
        out, lse = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, False, scale=scale)[:2]
        return out, lse
    if kind == "efficient":
        k, v = repeated(k, q), repeated(v, q)
        out, lse = aten._scaled_dot_product_efficient_attention(q, k, v, None, True, 0.0, causal, scale=scale)[:2]
        return out, lse[..., : q.shape[2]]
    return attend_by_products(q, k, v, causal, scale)


def attend_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return this part's gradients of q, k and v, given output and log-sum-exp of the whole rows."""
    kind = kernel_for(q, v)
    if kind == "cpu":
        found: tuple[Tensor, Tensor, Tensor] = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            grad, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return found
    if kind == "flash":
        # No dropout: the state of its generator is not looked at, and rows are not packed, so that borders are not.
        unused = torch.empty(2, dtype=torch.uint64, device=q.device)
        nothing = torch.empty((), dtype=torch.uint64, device=q.device)
        found = aten._scaled_dot_product_flash_attention_backward(
            grad, q, k, v, out, lse.contiguous(), None, None, q.shape[2], k.shape[2], 0.0, causal, unused, nothing,
            scale=scale,
        )  # fmt: skip
        return found
    if kind == "efficient":
        return efficient_backward(grad, q, k, v, out, lse, causal, scale)
    return backward_by_products(grad, q, k, v, out, lse, causal, scale)


def kernel_for(q: Tensor, v: Tensor) -> str:
    """Name of the kernel that takes these."""
    if q.shape[-1] != v.shape[-1]:
        return "products"
    if q.device.type == "cpu":
        return "cpu"
    if q.device.type != "cuda" or q.shape[-1] % 8 or q.dtype is torch.float64:
        return "products"
    return "flash" if q.dtype is not torch.float32 and q.shape[-1] <= 256 else "efficient"


def repeated(k: Tensor, q: Tensor) -> Tensor:
    """Keys or values, each as often as queries share it."""
    share = q.shape[1] // k.shape[1]
    return k if share == 1 else k.repeat_interleave(share, dim=1)


def shared_sum(gradient: Tensor, k: Tensor) -> Tensor:
    """Sum what `repeated` has taken apart."""
    share = gradient.shape[1] // k.shape[1]
    return gradient if share == 1 else gradient.view(k.shape[0], k.shape[1], share, *k.shape[2:]).sum(2)


def efficient_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    lse = pad(lse, (0, -lse.shape[-1] % LSE_ALIGNMENT), value=float("inf")).contiguous()
    unused = torch.zeros((), dtype=torch.int64, device="cpu")
    dq, dk, dv, _ = aten._scaled_dot_product_efficient_attention_backward(
        grad, q, repeated(k, q), repeated(v, q), None, out, lse, unused, unused, 0.0, [True, True, True, False], causal,
        scale=scale,
    )  # fmt: skip
    return dq, shared_sum(dk, k), shared_sum(dv, v)


def attend_by_products(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """As `attend`, in at least fp32."""
    k, v = repeated(k, q), repeated(v, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    outs, sums = [], []
    for rows in pieces(q, k):
        scores = scores_of(q, k, rows, causal, scale, wide)
        lse = scores.logsumexp(-1)
        outs.append(((scores - lse[..., None]).exp() @ v.to(wide)).to(q.dtype))
        sums.append(lse)
    return torch.cat(outs, dim=2), torch.cat(sums, dim=2)


def backward_by_products(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """As `attend_backward`, in at least fp32."""
    keys, values = repeated(k, q), repeated(v, q)
    wide = torch.promote_types(q.dtype, torch.float32)
    dq = torch.empty_like(q)
    dk, dv = torch.zeros_like(keys, dtype=wide), torch.zeros_like(values, dtype=wide)
    for rows in pieces(q, k):
        part = (scores_of(q, keys, rows, causal, scale, wide) - lse[:, :, rows, None]).exp()
        do = grad[:, :, rows].to(wide)
        dv += part.transpose(-1, -2) @ do
        dot = (do * out[:, :, rows]).sum(-1, keepdim=True)
        ds = part * (do @ values.to(wide).transpose(-1, -2) - dot) * scale
        dq[:, :, rows] = (ds @ keys.to(wide)).to(q.dtype)
        dk += ds.transpose(-1, -2) @ q[:, :, rows].to(wide)
    return dq, shared_sum(dk, k).to(k.dtype), shared_sum(dv, v).to(v.dtype)


def pieces(q: Tensor, k: Tensor) -> list[slice]:
    """Queries so many at a time that their scores fit into a bounded buffer."""
    each = max(1, SCORES_AT_ONCE // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    return [slice(at, min(at + each, q.shape[2])) for at in range(0, q.shape[2], each)]


def scores_of(q: Tensor, k: Tensor, rows: slice, causal: bool, scale: float, wide: torch.dtype) -> Tensor:
    scores = q[:, :, rows].to(wide) @ k.to(wide).transpose(-1, -2) * scale
    if causal:
        places = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(places[None] > places[rows, None], float("-inf"))
    return scores
