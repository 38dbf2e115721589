"""What a rank sends in a step is what the formulas of the stage and of the method say, to the byte."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest

from optim.projection import side_of
from parallel.config import Matrices
from parallel.launch import World, connected
from parallel.mesh import shard_rows
from parallel.traffic import Traffic
from tests.parallel.sharded import BASE, make, on_each_rank, step_batch
from trainer.adapt import blocks
from trainer.build import Trainable
from trainer.cli.compose import load
from trainer.step import train_step

RANK = 5
"""Which neither 2 nor 3 ranks divide."""
OPTIMIZERS = {
    "adamw": ["optim=adamw"],
    "adamw_8bit": ["optim=adamw_8bit"],
    "galore": ["optim=galore", f"optim.rank={RANK}"],
    "apollo": ["optim=apollo", f"optim.rank={RANK}"],
    "cosmos": ["optim=cosmos", f"optim.rank={RANK}"],
}
MATRICES = ("rows", "owners")
"""With zero=1."""
STAGES = range(4)
FP32 = 4


def measured(count: int, cases: list[list[str]]) -> list[tuple[dict[str, int], dict[str, int], int, int]]:
    """Of each case: bytes that this rank sends by kind in a steady step, and by the formulas; the largest tensor of a
    collective while a basis is found, and the gradient of an MLP matrix."""
    found = []
    with connected(load(BASE).parallel, "cpu", 1) as world:
        for overrides in cases:
            built = make([*BASE, "precision=fp32", "optim.lr=0.01", *overrides], world)
            with Traffic(world.control) as first:
                update = built.engine.update

                def updating(multiplier: float, update: Any = update, first: Traffic = first) -> None:
                    first.largest.clear()  # what came before is the stage's
                    update(multiplier)

                built.engine.update = updating  # type: ignore[method-assign]
                train_step(built, step_batch(built.cfg, world, 0), 0, 0)
            built.engine.update = update  # type: ignore[method-assign]
            train_step(built, step_batch(built.cfg, world, 1), 1, 0)  # in which DDP makes its buckets anew
            with Traffic(world.control) as steady:
                train_step(built, step_batch(built.cfg, world, 2), 2, 0)
            wanted = by_formula(built, count)
            sent = {kind: size for kind, size in steady.sent.items() if size}
            matrices = [p.numel() * FP32 for name, p in built.model.named_parameters() if "mlp" in name]
            found.append((sent, wanted, max(first.largest.values(), default=0), min(matrices)))
    return found


def by_formula(built: Trainable, count: int) -> dict[str, int]:
    """Bytes that a rank sends in a step of fp32 without a refresh."""
    zero, micros = built.cfg.parallel.zero, built.cfg.train.global_batch // built.cfg.train.micro_batch // count
    part = (count - 1) / count

    def padded(shape: Any) -> int:
        """Values of a tensor whose rows are cut: shards are as large as the largest."""
        return count * -(-shape[0] // count) * (shape[1] if len(shape) > 1 else 1)

    shapes = [p.shape for p in built.model.parameters()]
    model, whole = sum(map(padded, shapes)), sum(shape.numel() for shape in shapes)
    in_blocks = sum(padded(p.shape) for _, block in blocks(built.model) for p in block.parameters())
    values: Counter[str] = Counter()
    if zero == 0:
        values["all_reduce"] += 2 * whole
        return counted(values, part)
    values["all_reduce"] += 2 * len(shapes)  # the norm of all gradients, from the norm of each
    if zero == 1:
        values.update(reduce_scatter=model, all_gather=model)
    if zero == 2:
        values.update(reduce_scatter=micros * model, all_gather=model)
    if zero == 3:
        values.update(reduce_scatter=micros * model, all_gather=micros * (model + in_blocks))
    if built.cfg.parallel.matrices is Matrices.owners:  # which send nothing for the method
        owned = sum(padded(shape) for shape in shapes if len(shape) == 2)
        exact = sum(shape.numel() for shape in shapes if len(shape) == 2)
        values.update(reduce_scatter=-owned, all_gather=-owned, reduce=exact, broadcast=exact)
        return counted(values, part)
    for group in built.optimizer.param_groups:
        for p in group["params"] if group.get("rank") is not None else ():
            if built.cfg.optim.name == "cosmos":
                values.update(cosmos(p.shape, padded, shard_rows(p.shape[0], count, built.world.process_rank), count))
            else:
                values.update(method(built.cfg.optim.name, p.shape, padded))
    return counted(values, part)


def cosmos(shape: Any, padded: Any, mine: slice, count: int) -> Counter[str]:
    """Values of a matrix: U gathered; G^T G U, S, five Gram matrices and three norms summed; where shards cut the
    smaller side, parts of it exchanged for parts of the longer one, there and back."""
    (m, n), k, r = shape, min(shape), min(RANK, *shape)
    found = Counter(all_gather=padded((r, k)), all_reduce=2 * (r * k + r * r + 5 * k * k + 3))
    if m < n:
        rows = mine.stop - mine.start
        columns = len(range(n)[-(-n // count) * (mine.start // -(-m // count)) :][: -(-n // count)])
        to_others = rows * (n - columns) + (m - rows) * columns
        found["all_to_all"] = to_others * count / (count - 1)  # of which `counted` takes the part that is sent
    return found


def method(name: str, shape: Any, padded: Any) -> dict[str, int]:
    """Values of a projected matrix: its basis where shards keep the projected side whole, else R there and back."""
    if side_of(shape, "std") == "right":
        basis = padded((RANK, shape[1]))
        return {"all_gather": basis} | ({"all_reduce": 2} if name == "apollo" else {})  # its growth
    low = padded((RANK, shape[1]))
    if name == "galore":
        return {"reduce_scatter": low, "all_gather": low}
    return {"reduce_scatter": low, "all_reduce": 2 * 3 * shape[1]}  # three sums for each channel


def counted(values: Counter[str], part: float) -> dict[str, int]:
    return {kind: round(size * part * FP32) for kind, size in values.items()}


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_rank_sends_what_the_formulas_say_and_never_a_gradient_for_a_basis(count: int) -> None:
    """ZeRO-1 sends what DDP does, and nothing beside it where matrices have owners; ZeRO-2 and 3 reduce every
    micro-step, 3 gathers blocks twice."""
    cases = {
        f"{name}, zero={zero}, {micro} rows, {matrices}": [
            *options, f"parallel.zero={zero}", f"train.micro_batch={micro}", f"parallel.matrices={matrices}",
        ]
        for name, options in OPTIMIZERS.items()
        for zero in STAGES
        for micro in ((2,) if name != "adamw" else (2, 12 // count))
        for matrices in (MATRICES if zero == 1 else ("auto",))
    }  # fmt: skip
    for rank in on_each_rank(count, measured, count, list(cases.values())):
        for what, (sent, wanted, refresh, matrix) in zip(cases, rank, strict=True):
            assert sent == pytest.approx(wanted, abs=8), what
            if "zero=2" in what or "zero=3" in what:  # at stage 1 weights are gathered after the step
                assert refresh < matrix, f"{what}: {refresh} bytes in one collective, a gradient has {matrix}"


def of_gradients(cases: list[list[str]]) -> list[dict[str, int]]:
    """Bytes that this rank sends in a steady step, but for those of attention."""
    found = []
    with connected(load(BASE).parallel, "cpu", 1) as alone:
        for overrides in cases:
            world = replace(alone, sequence_degree=load([*BASE, *overrides]).parallel.degree(alone.process_count))
            built = make([*BASE, "precision=fp32", *overrides], world)
            reader = World(world.data_rank, world.data_count)  # ranks that share rows read the same
            for step in range(2):
                train_step(built, step_batch(built.cfg, reader, step), step, 0)
            with Traffic(world.control) as steady:
                train_step(built, step_batch(built.cfg, reader, 2), 2, 0)
            assert bool(steady.sent["send"]) is (world.sequence_degree > 1)
            found.append({kind: size for kind, size in steady.sent.items() if size and kind != "send"})
    return found


def test_ranks_that_share_rows_sum_their_gradients_with_those_of_all_once() -> None:
    """As many bytes as where each has rows of its own, in the same collectives."""
    stages = [f"parallel.zero={zero}" for zero in (0, 3)]
    plain = [[stage, "train.micro_batch=6"] for stage in stages]
    shared = [[stage, "train.micro_batch=12", "parallel.sequence=ring"] for stage in stages]
    for found in on_each_rank(2, of_gradients, [*plain, *shared]):
        assert found[: len(plain)] == found[len(plain) :]
