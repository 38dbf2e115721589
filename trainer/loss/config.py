"""How the loss is computed, and what it adds to cross entropy."""

from dataclasses import dataclass
from enum import Enum


class LossKind(Enum):
    chunked = "chunked"
    plain = "plain"
    torch = "torch"
    cce = "cce"
    liger = "liger"


EXTRAS: dict[LossKind, tuple[str, ...]] = {
    LossKind.chunked: ("chunk_rows", "label_smoothing", "z_loss"),
    LossKind.plain: ("label_smoothing", "z_loss"),
    LossKind.torch: ("chunk_rows",),  # it takes label smoothing, but then makes all logits
    LossKind.cce: (),
    LossKind.liger: ("label_smoothing", "z_loss"),
}
"""Options each kind honours."""


@dataclass(kw_only=True)
class LossConfig:
    kind: LossKind = LossKind.chunked
    """Set by `loss=...`. `chunked`: logits of some rows at a time, whose gradients are made at once, so that all of
    them never exist; `plain`: all logits; `torch`, `cce`, `liger`: the same idea by torch's linear_cross_entropy, the
    package cut-cross-entropy, the package liger-kernel (CUDA)."""
    chunk_rows: int | None = None
    """Rows (tokens) whose logits exist at once; default: as many as make them about as large as the hidden states, but
    at least 128."""
    label_smoothing: float = 0.0
    """Share of each target that is spread evenly over the vocabulary, in [0, 1). Evaluation has none of it."""
    z_loss: float = 0.0
    """Weight of (log of the sum of exp(logits)) squared, which keeps logits from drifting; PaLM's is 1e-4. Evaluation
    has none of it."""

    def problems(self) -> list[str]:
        found = []
        if self.chunk_rows is not None and self.chunk_rows < 1:
            found.append(f"loss.chunk_rows={self.chunk_rows}: must be at least 1; null chooses by the model's sizes")
        if not 0 <= self.label_smoothing < 1:
            found.append(f"loss.label_smoothing={self.label_smoothing}: must lie in [0, 1); 0 switches it off")
        if not self.z_loss >= 0:
            found.append(f"loss.z_loss={self.z_loss}: must be at least 0; 0 switches it off, 1e-4 is usual")
        for option in ("chunk_rows", "label_smoothing", "z_loss"):
            value = getattr(self, option)
            if value and option not in EXTRAS[self.kind]:
                having = " or ".join(f"loss={kind.value}" for kind, extras in EXTRAS.items() if option in extras)
                found.append(f"loss.{option}={value}: loss={self.kind.value} has no such thing; use {having}")
        return found
