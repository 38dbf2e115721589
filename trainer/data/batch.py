"""What the loop is fed with."""

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from parallel.sequence.interface import Share


@dataclass(frozen=True)
class Batch:
    """One micro-batch of one rank: host tensors, all (rows, sequence_length) int64; of rows that are split over ranks
    this rank's tokens."""

    input_ids: Tensor
    labels: Tensor
    """Already shifted: labels[b, t] is the token that follows input_ids[b, t] in the same document, else IGNORE."""
    position_ids: Tensor
    """Restart at 0 with each document of a row. transformers builds the mask between documents from this, provided
    that it gets no attention_mask and use_cache=False."""
    share: Share | None = field(default=None, kw_only=True)
    """Where the tokens lie in rows that several ranks share."""

    @property
    def extra(self) -> dict[str, Any]:
        """What the model is given beside ids and positions."""
        return {} if self.share is None else {"sequence": self.share}

    def __len__(self) -> int:
        return int(self.input_ids.shape[0])

    def split(self, rows: int) -> "list[Batch]":
        """Return views of at most `rows` rows each."""
        return [
            Batch(self.input_ids[at : at + rows], self.labels[at : at + rows], self.position_ids[at : at + rows])
            for at in range(0, len(self), rows)
        ]


@dataclass(frozen=True)
class StepBatch:
    """What one rank computes in one optimizer step."""

    micros: list[Batch]
    targets: int
    """Labels that are not IGNORE in the whole global batch, over all ranks and micro-steps; known without talking."""
    first_sample: int
    """Global index of the step's first sample."""
