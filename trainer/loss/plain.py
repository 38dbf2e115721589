"""Cross entropy as a sum over counted targets; whoever sums also knows the global count to divide by."""

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from trainer.data import IGNORE


def token_loss_sum(logits: Tensor, labels: Tensor, *, label_smoothing: float = 0.0, z_loss: float = 0.0) -> Tensor:
    """Sum of -log p(label) over positions whose label is not IGNORE; 0 where all are ignored.

    A sum and not a mean: a mean of means weights short rows more, and is NaN for a rank whose labels are all
    ignored. At least fp32, since bf16 has 8 bits for a sum over thousands of tokens.

    Args:
        logits: (rows, sequence, vocabulary), any float dtype.
        labels: (rows, sequence) int64, already shifted.
        label_smoothing: share of each target spread over the vocabulary.
        z_loss: weight of each counted position's squared log-sum-exp.
    """
    precise = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
    flat = labels.flatten()
    loss = cross_entropy(precise, flat, ignore_index=IGNORE, reduction="sum", label_smoothing=label_smoothing)
    if z_loss:
        squares = precise.logsumexp(-1).square()
        loss = loss + z_loss * squares.masked_fill(flat == IGNORE, 0).sum()
    return loss
