"""Deterministic kernels where a model has them, a warning where it has not; torch's switches as they were."""

from collections.abc import Iterator
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from trainer.determinism import make_deterministic


class Model(nn.Module):
    """Takes the trainer's arguments; fails as torch does where an operator has no deterministic kernel."""

    def __init__(self, error: str | None = None) -> None:
        super().__init__()
        self.table = nn.Embedding(32, 4)
        self.error = error

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> SimpleNamespace:
        if self.error and not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(self.error)
        return SimpleNamespace(logits=torch.dropout(self.table(input_ids), 0.5, True))


@pytest.fixture(autouse=True)
def switches() -> Iterator[None]:
    yield
    torch.use_deterministic_algorithms(False)
    torch.utils.deterministic.fill_uninitialized_memory = True


def test_a_model_with_deterministic_kernels_gets_them_strictly_and_is_left_as_it_was() -> None:
    model, state = Model(), torch.get_rng_state()
    assert make_deterministic(model, 32) is None
    assert torch.are_deterministic_algorithms_enabled() and not torch.is_deterministic_algorithms_warn_only_enabled()
    assert model.table.weight.grad is None and torch.equal(torch.get_rng_state(), state)


def test_a_model_without_one_still_trains_and_the_reason_is_told() -> None:
    said = make_deterministic(Model("put_ does not have a deterministic implementation, but you set ..."), 32)
    assert said is not None and "only up to rounding: put_ does not have" in said
    assert torch.is_deterministic_algorithms_warn_only_enabled()


def test_another_error_is_not_taken_for_it() -> None:
    with pytest.raises(RuntimeError, match="shape"):
        make_deterministic(Model("shape mismatch"), 32)
