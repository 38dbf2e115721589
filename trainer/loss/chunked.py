"""Cross entropy of a linear head without all of its logits: some rows at a time, their gradients made at once.

For the rows x (c, h) of a chunk, the head's weight W (V, h), targets y, m = 1 where y counts and 0 where not:

    z    = x W^T + b                                       in the dtype of x, then fp32
    L    = sum m [(1 - s) (lse(z) - z_y) + s (lse(z) - mean z) + q lse(z)^2]
    dz   = m [softmax(z) (1 + 2 q lse(z)) - (1 - s) onehot(y) - s / V]
    dx   = dz W,  dW += dz^T x,  db += sum dz              dz in the dtype of x; dW and db summed in fp32

s is the label smoothing, q the z-loss. The losses are summed in fp64: summed in bf16 over chunks, as torch 2.13's
linear_cross_entropy does, the reported loss is off by tenths. Forward costs what the three products of the plain way
cost, backward one scaling, in fp32: bf16 would round the scale itself, one in all targets, by up to 0.4 %, and with it
every gradient alike. Held at once: one chunk's logits in fp32, and the gradients.
Idea: Liger (Hsu et al. 2024, arXiv:2410.10989).
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.data import IGNORE

SCALED = 2**20
"""Values that are scaled at a time (4 MiB in fp32)."""
LEAST_ROWS = 128
"""Fewer rows at a time would make products too thin to be quick."""


@dataclass(frozen=True)
class Terms:
    """What is summed for each counted target."""

    label_smoothing: float = 0.0
    z_loss: float = 0.0
    chunk_rows: int | None = None
    """None: see `rows_at_once`."""


def rows_at_once(rows: int, hidden: int, vocabulary: int) -> int:
    """Rows of a chunk: so many that its logits are about as large as all hidden states; a power of two."""
    share = math.ceil(rows / math.ceil(vocabulary / hidden))
    return max(LEAST_ROWS, 1 << max(share - 1, 0).bit_length())


def linear_loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    """Return the sum over counted targets, a scalar of at least fp32.

    Gradients can be asked for once: backward scales in place what forward has made.

    Args:
        hidden: (rows, h).
        weight: (V, h), in the dtype of `hidden` or, under autocast, wider.
        bias: (V,) or None.
        labels: (rows,) int64; IGNORE does not count.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    with torch.autocast(hidden.device.type, enabled=False):
        loss: Tensor = LinearLoss.apply(  # type: ignore[no-untyped-call]
            hidden, weight, bias, labels, terms, torch.is_grad_enabled()
        )
    return loss


class LinearLoss(torch.autograd.Function):
    """Gradients of the chunks in forward, their scaling in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms, training: bool
    ) -> Tensor:
        wanted = [needed and training for needed in ctx.needs_input_grad[:3]]
        loss, *gradients = chunk_losses(hidden, weight, bias, labels, terms, wanted)
        ctx.save_for_backward(*gradients)
        ctx.dtypes = [tensor.dtype if tensor is not None else None for tensor in (hidden, weight, bias)]
        return loss

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Any:
        scaled = [
            None if made is None else scale_(made, grad).to(dtype)
            for made, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        ]
        return *scaled, None, None, None


def scale_(made: Tensor, factor: Tensor) -> Tensor:
    """Multiply by a scalar of at least fp32, in place: in its precision, and with no wide copy of it all."""
    if made.dtype == factor.dtype:
        return made.mul_(factor)
    for piece in torch.split(made, max(SCALED // max(made[0].numel(), 1), 1)):
        piece.copy_(piece.to(factor.dtype).mul_(factor))
    return made


def chunk_losses(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms, wanted: list[bool]
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Return the loss, and of hidden, weight and bias the gradients that are `wanted`."""
    rows, width = hidden.shape
    wide = torch.promote_types(hidden.dtype, torch.float32)
    total = torch.zeros((), dtype=torch.float64, device=hidden.device)  # a sum of sums over many thousand rows
    d_hidden = torch.empty_like(hidden) if wanted[0] else None
    d_weight = torch.zeros_like(weight, dtype=wide) if wanted[1] else None
    d_bias = torch.zeros_like(bias, dtype=wide) if wanted[2] and bias is not None else None
    narrow = weight.to(hidden.dtype)
    offset = None if bias is None else bias.to(hidden.dtype)
    at_once = terms.chunk_rows or rows_at_once(rows, width, len(weight))
    for begin in range(0, rows, at_once):
        part = slice(begin, begin + at_once)
        logits = torch.nn.functional.linear(hidden[part], narrow, offset)
        loss, d_logits = rows_loss(logits.to(wide), labels[part], terms, any(wanted))
        del logits
        total += loss
        if d_logits is None:
            continue
        if d_bias is not None:
            d_bias += d_logits.sum(0)
        d_logits = d_logits.to(hidden.dtype)
        if d_hidden is not None:
            torch.mm(d_logits, narrow, out=d_hidden[part])
        if d_weight is not None and d_weight.dtype == hidden.dtype:
            d_weight.addmm_(d_logits.t(), hidden[part])
        elif d_weight is not None:
            d_weight += d_logits.t() @ hidden[part]
    return total.to(wide), d_hidden, d_weight, d_bias


def rows_loss(logits: Tensor, labels: Tensor, terms: Terms, wanted: bool) -> tuple[Tensor, Tensor | None]:
    """Return the loss of some rows and, if `wanted`, its gradient (c, V), which takes the place of the logits."""
    counted = labels != IGNORE
    target = labels.masked_fill(~counted, 0)[:, None]
    smooth, z_loss = terms.label_smoothing, terms.z_loss
    chosen = logits.gather(1, target).squeeze(1)
    mean = logits.mean(1) if smooth else None
    peak = logits.amax(1)
    logits.sub_(peak[:, None]).exp_()
    mass = logits.sum(1)
    lse = peak + mass.log()
    loss = lse - chosen if mean is None else lse - (1 - smooth) * chosen - smooth * mean
    if z_loss:
        loss = loss + z_loss * lse.square()
    total = loss.masked_fill(~counted, 0).sum(dtype=torch.float64)
    if not wanted:
        return total, None
    factor = (1 + 2 * z_loss * lse) / mass if z_loss else 1 / mass
    logits.mul_(factor[:, None])
    if smooth:
        logits.sub_(smooth / logits.shape[1])
    logits.scatter_add_(1, target, torch.full_like(chosen, smooth - 1)[:, None])
    logits.masked_fill_(~counted[:, None], 0)
    return total, logits
