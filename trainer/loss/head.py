"""A model's loss from what goes into its head, so that all logits need not exist.

The head module is given the labels beforehand and returns the loss in place of logits. So the model's own forward runs
as it is, inside DDP, FSDP or DeepSpeed: what gathers the head's weight for its module gathers it here, the weight has
one gradient that arrives once, tied or not.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from trainer.errors import UserError
from trainer.loss.chunked import Terms, linear_loss_sum
from trainer.loss.config import LossConfig, LossKind
from trainer.loss.libraries import cce_loss_sum, liger_loss_sum, takes_a_bias, torch_loss_sum
from trainer.loss.plain import token_loss_sum

LINEAR_LOSSES = {
    LossKind.chunked: linear_loss_sum,
    LossKind.torch: torch_loss_sum,
    LossKind.cce: cce_loss_sum,
    LossKind.liger: liger_loss_sum,
}


@dataclass(frozen=True)
class Groups:
    """Which of some groups each target belongs to."""

    of: Tensor
    """(rows, sequence) int64, from 0."""
    count: int

    def sums(self, loss: Callable[[Tensor, Tensor], Tensor], rows: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of each group, (count,).

        Args:
            loss: of some rows (n, width) and their labels (n,).
        """
        flat, of = labels.reshape(-1), self.of.reshape(-1)
        found = []
        for group in range(self.count):
            mine = of == group
            found.append(loss(rows[mine], flat[mine]) if mine.any() else rows.new_zeros((), dtype=torch.float64))
        return torch.stack([each.double() for each in found])


class HeadLoss:
    """Computes the loss of `model`. Made once; the model gives logits as before wherever no loss is asked for.

    Raises:
        UserError: the model has no linear head.
    """

    def __init__(self, model: nn.Module, cfg: LossConfig) -> None:
        self._model, self._kind = model, cfg.kind
        self._training = Terms(cfg.label_smoothing, cfg.z_loss, cfg.chunk_rows)
        self._evaluating = Terms(chunk_rows=cfg.chunk_rows)
        self._asked: tuple[Tensor, Terms, Groups | None] | None = None
        self._given: Tensor | None = None
        if cfg.kind is not LossKind.plain:
            self._install(model)

    def __call__(
        self,
        forward: Callable[[], Any],
        labels: Tensor,
        *,
        evaluating: bool = False,
        groups: Groups | None = None,
    ) -> Tensor:
        """Return the summed loss over counted targets, a scalar of at least fp32; of each of `groups` where given.

        Args:
            forward: runs the model (or what an engine made of it) and returns its output.
            labels: (rows, sequence) int64, already shifted.
            evaluating: plain cross entropy, without smoothing and z-loss.
        """
        terms = self._evaluating if evaluating else self._training
        if self._kind is LossKind.plain:
            plain = partial(token_loss_sum, label_smoothing=terms.label_smoothing, z_loss=terms.z_loss)
            logits = forward().logits
            return plain(logits, labels) if groups is None else groups.sums(plain, logits.flatten(0, -2), labels)
        self._asked = labels, terms, groups
        try:
            loss: Tensor = forward().logits
        finally:
            self._asked = self._given = None
        return loss

    def _install(self, model: nn.Module) -> None:
        finder: Any = getattr(model, "get_output_embeddings", lambda: None)
        head = finder()
        if not isinstance(head, nn.Linear):
            raise UserError(
                f"loss={self._kind.value}: {type(model).__name__} has no linear head to take rows through in pieces "
                f"({type(head).__name__}). Use loss=plain."
            )
        if self._kind is LossKind.cce and head.bias is not None and not takes_a_bias():
            raise UserError(
                f"loss=cce: the head of {type(model).__name__} has a bias, which this version of cut-cross-entropy "
                "does not compute. Use loss=chunked."
            )
        inner, function = head.forward, LINEAR_LOSSES[self._kind]

        def forward(hidden: Tensor) -> Tensor:
            if self._asked is None:
                return inner(hidden)
            labels, terms, groups = self._asked
            rows = hidden.reshape(-1, hidden.shape[-1])

            def loss(some: Tensor, of_some: Tensor) -> Tensor:
                return function(some, head.weight, head.bias, of_some, terms)

            self._given = loss(rows, labels.reshape(-1)) if groups is None else groups.sums(loss, rows, labels)
            return self._given

        head.forward = forward  # type: ignore[assignment, method-assign]
        model.register_forward_hook(self._check_output)

    def _check_output(self, model: nn.Module, args: Any, output: Any) -> None:
        """Refuse a model that does something to its logits, which by now are the loss."""
        # by storage: DeepSpeed's hooks hand on an alias
        if self._asked is not None and not same_storage(output.logits, self._given):
            raise UserError(
                f"loss={self._kind.value}: {type(model).__name__} changes the logits that its head makes (a softcap or "
                "a scale), so the loss cannot be made inside the head. Use loss=plain."
            )


def same_storage(one: Tensor, other: Tensor | None) -> bool:
    """Whether two tensors are the same memory, fake ones too."""
    return other is not None and one.untyped_storage()._cdata == other.untyped_storage()._cdata
