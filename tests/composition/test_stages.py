"""Every optimizer of ours under every stage of ZeRO on 1 to 4 ranks is one process, 20 steps and 10 refreshes long.

fp64, so that a layout changes the order of sums and nothing else: losses, norms, weights and states are those of one
process to 1e-9, and every rank holds its share of the bytes. Methods for int8 weights, whose rounding is drawn, drift
no further than `compare.py` allows. Ranks of a count stay for all their combinations.
"""

from collections.abc import Iterator
from pathlib import Path

import pytest

from optim import registry
from tests.composition.axes import Combination
from tests.composition.laboratory import Laboratory

STEPS = 20
OURS = [name for name in registry.names() if not name.startswith(("bnb_", "torchao_"))]


class LongLaboratory(Laboratory):
    def overrides(self, combination: Combination, folder: Path) -> list[str]:
        return [*super().overrides(combination, folder), f"train.steps={STEPS}"]


@pytest.fixture(scope="module")
def laboratory() -> Iterator[Laboratory]:
    with LongLaboratory() as found:
        yield found


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("optimizer", OURS)
def test_twenty_steps_under_every_stage_are_those_of_one_process(
    laboratory: Laboratory, optimizer: str, ranks: int
) -> None:
    precision = "int8_sr" if optimizer.startswith("q") else "fp64"
    for zero in range(4) if ranks > 1 else (3,):  # nobody to share with: the stages are one
        outcome = laboratory.judge(Combination.of(optimizer=optimizer, precision=precision, zero=zero, ranks=ranks))
        assert outcome.kind == "equal", f"zero={zero}: {outcome}"
