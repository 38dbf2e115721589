"""The same loss by others: torch's linear_cross_entropy, Cut Cross Entropy, Liger. Each is imported when it is used."""

import inspect
from typing import Any

import torch
from torch import Tensor

from trainer.data import IGNORE
from trainer.loss.chunked import Terms


def torch_loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    """torch.nn.functional.linear_cross_entropy in chunks. Row by row, summed here: its own sum over chunks is bf16.

    In bf16 it takes the scale of all gradients (one in all targets) as bf16 too, up to 0.4 % off; `linear_loss_sum`
    does not.
    """
    hidden, weight, bias = as_computed(hidden, weight, bias)  # FSDP2 gathers the head in bf16 beside fp32 states
    functional: Any = torch.nn.functional
    sizes: dict[str, Any] = {} if terms.chunk_rows is None else {"batch_chunk_size": terms.chunk_rows}
    losses: Tensor = functional.linear_cross_entropy(
        hidden,
        weight,
        labels,
        linear_bias=bias,
        reduction="none",
        ignore_index=IGNORE,
        options=torch.nn.LinearCrossEntropyOptions(**sizes),  # type: ignore[attr-defined]
    )
    return losses.to(torch.promote_types(losses.dtype, torch.float32)).sum()


def as_computed(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Cast what a kernel is given as autocast would, which knows nothing of it."""
    if not torch.is_autocast_enabled(hidden.device.type):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(hidden.device.type)
    return hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)


def cce_loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    """Cut Cross Entropy (Wijmans et al. 2024, arXiv:2411.09009), in a variant that drops no small gradients.

    The package's 25.1.1, PyPI's, has one such variant and takes no bias (`takes_a_bias`); later ones sum the head's
    gradient compensated.
    """
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, bias = as_computed(hidden, weight, bias)
    options: dict[str, Any] = {"impl": "torch_compile"}
    if hidden.is_cuda:
        options = {"impl": "cce_kahan_full_c"} if takes_a_bias() else {"impl": "cce", "filter_eps": None}
    if bias is not None:
        options["bias"] = bias
    losses: Tensor = linear_cross_entropy(hidden, weight, labels, ignore_index=IGNORE, reduction="none", **options)
    return losses.float().sum()


def takes_a_bias() -> bool:
    """Whether the package cut-cross-entropy that is installed computes heads with a bias."""
    from cut_cross_entropy import linear_cross_entropy

    return "bias" in inspect.signature(linear_cross_entropy).parameters


def liger_loss_sum(hidden: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor, terms: Terms) -> Tensor:
    """Liger's fused linear cross entropy, weight gradients summed in fp32."""
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    hidden, weight, bias = as_computed(hidden, weight, bias)
    loss: Tensor = LigerFusedLinearCrossEntropyLoss(
        ignore_index=IGNORE,
        reduction="sum",
        label_smoothing=terms.label_smoothing,
        lse_square_scale=terms.z_loss,
        accum_dtype=torch.float32,
    )(weight, hidden, labels, bias)
    return loss
