"""Held-out loss by position: how much a model makes of the text before a token, and up to where.

A target's position is that of the last token the model has seen, counted from the beginning of its document within the
row, so that a target at position p is told from p + 1 tokens. Buckets double in size: what a model gains from more text
falls off as a power of its length (Xiong et al. 2023, arXiv:2309.16039, section 4).
"""

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from trainer.data import IGNORE
from trainer.data.batch import Batch
from trainer.loss.head import Groups


@dataclass(frozen=True)
class Buckets:
    """Positions 0 .. first - 1, then twice as many each time."""

    first: int
    """Positions in the first."""
    length: int
    """Tokens in a row."""

    @cached_property
    def borders(self) -> list[int]:
        """Where each bucket begins, and behind the last where the row ends."""
        found = [0, self.first]
        while found[-1] < self.length:
            found.append(2 * found[-1])
        return [*found[:-1], self.length]

    def __len__(self) -> int:
        return len(self.borders) - 1

    @property
    def names(self) -> list[str]:
        return [f"{begin}-{end - 1}" for begin, end in zip(self.borders, self.borders[1:], strict=False)]

    def groups(self, batch: Batch) -> Groups:
        """Say which bucket each target of a batch is in."""
        inner = torch.tensor(self.borders[1:-1], device=batch.position_ids.device)
        return Groups(torch.bucketize(batch.position_ids, inner, right=True), len(self))

    def targets(self, batch: Batch) -> Tensor:
        """Count the targets in each bucket, (buckets,) int64."""
        of = self.groups(batch).of[batch.labels != IGNORE]
        return torch.bincount(of, minlength=len(self))

    def found(self, losses: list[float], targets: list[float]) -> dict[str, dict[str, Any]]:
        """Return `loss`, `perplexity` and `targets` by bucket, given sums; a bucket without targets is left out."""
        return {
            name: {"loss": loss / count, "perplexity": math.exp(min(loss / count, 700.0)), "targets": int(count)}
            for name, loss, count in zip(self.names, losses, targets, strict=True)
            if count
        }


def buckets_of(first: int, length: int) -> Buckets | None:
    """Return the buckets that `train.eval_by_position` asks for, None where it asks for none."""
    return Buckets(first, length) if first else None
