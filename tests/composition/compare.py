"""How far two trainings are from each other, and how far they may be.

exact   fp64: the layouts compute the same sums in another order. 1e-9, relative, on losses, gradient norms, weights
        and states; codes of quantized states at most one apart. Where a method itself makes more of rounding (Adam of
        directions in which a gradient has 1e-8 of its size, say), as far as one process gets from itself by splitting
        its batch, as below.
drift   narrower formats: rounding differs with the order of a sum, and an optimizer that divides by the root of a
        second moment turns a gradient that is all rounding into a full step. How much is measured on the method
        itself: one process that splits the same batch into 2 and into 4 micro-steps, with no collective and no shard
        anywhere, drifts from one process that does not. A layout may drift DRIFT times as far, for both are maxima
        over rounding; one that drifts further is held against three more processes, their MLPs in pieces.
        What is computed before any weight has moved - the first loss and gradient norm - has an absolute limit
        besides.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from tests.composition.case import Report
from trainer.checkpoint import CheckpointStore

EXACT = 1e-9
DRIFT = 5.0
ROUNDING = {
    "fp64": EXACT,
    "fp32": 1e-6,
    "bf16": 2**-7,
    "bf16_pure": 2**-7,
    "bf16_sr": 2**-7,
    "int8_sr": 2**-7,
    "fp8": 2**-5,
}
"""Where the drift of one process happens to be nothing: one unit in the last place of the products' format, which the
norm of bf16 gradients itself has; a few of fp32."""
FIRST = {"fp64": 1e-2, "fp32": 1e-5, "bf16": 2e-3, "bf16_pure": 2e-3, "bf16_sr": 2e-3, "int8_sr": 2e-3, "fp8": 1e-2}
"""Largest relative difference of the first loss and gradient norm; under fp64 that of what drifts in any precision."""

CODE = 2**-8
"""Activations in 8 bits: a rounding elsewhere may turn a code to its neighbour, this far in its group's largest value.
The splits of one process, whose first forward is the same bit for bit, hardly show it."""


@dataclass
class Trained:
    """What a training on any number of ranks left behind."""

    reports: list[Report]
    """Of each rank, in its last process group."""
    records: dict[int, dict[str, float]]
    """Figures of each step, by its number; `eval_loss` among them."""
    tensors: dict[str, Tensor] = field(default_factory=dict)
    """Of the last checkpoint, whole: `model/...`, `optim/...`."""
    numbers: dict[str, dict[str, float]] = field(default_factory=dict)
    """Of the optimizer, by parameter and key."""


def trained(reports: list[Report], earlier: list[Report], folder: Path) -> Trained:
    """Gather what was reported, and the last checkpoint."""
    records: dict[int, dict[str, float]] = {}
    for record in [*(earlier[0].records if earlier else []), *reports[0].records]:
        figures = {key: record[key] for key in ("loss", "grad_norm", "eval_loss") if record.get(key) is not None}
        records.setdefault(record["step"], {}).update(figures)
    checkpoint = CheckpointStore(folder / "checkpoints", keep=0, verify=True).newest()
    assert checkpoint is not None
    names = {name: info for name, info in checkpoint.names().items() if not name.startswith("rng/")}
    tensors = {name: torch.empty(info.shape, dtype=info.dtype) for name, info in names.items()}
    checkpoint.load(tensors)
    return Trained(reports, records, tensors, checkpoint.meta["optimizer_numbers"])


def distances(found: Trained, reference: Trained) -> dict[str, float]:
    """Relative distances by what was compared; `inf` where one has what the other lacks."""
    moved = reference.reports[0].moved
    weights, states = [0.0], [0.0]
    if found.tensors.keys() != reference.tensors.keys():
        return {"tensors": float("inf")}
    for name, expected in reference.tensors.items():
        value = found.tensors[name]
        if value.shape != expected.shape or value.dtype != expected.dtype:
            return {"tensors": float("inf")}
        if name.startswith("optim/"):
            states.append(apart(value, expected))
        elif name.removeprefix("model/") in moved:
            way = moved[name.removeprefix("model/")]
            weights.append(norm(value.double() - expected.double()) / max(way, 1e-30))
    series = {key: curve(found, reference, key) for key in ("loss", "grad_norm", "eval_loss")}
    first = {f"first {key}": values[0] for key, values in series.items() if key != "eval_loss" and values}
    worst = {key: max(values) for key, values in series.items() if values}
    return {**first, **worst, "weights": max(weights), "states": max(states), "numbers": numbers(found, reference)}


def curve(found: Trained, reference: Trained, key: str) -> list[float]:
    """Relative differences of a figure, step by step; those only the reference has are left out."""
    return [
        abs(found.records[step][key] - figures[key]) / max(abs(figures[key]), 1e-30)
        for step, figures in sorted(reference.records.items())
        if key in figures and key in found.records.get(step, {})
    ]


def apart(value: Tensor, expected: Tensor) -> float:
    """Relative difference of a state; of codes 0 where all are at most one apart."""
    if expected.is_floating_point() and expected.itemsize > 1:
        return norm(value.double() - expected.double()) / max(norm(expected.double()), 1e-30)
    codes, wanted = (x.contiguous().view(torch.uint8).to(torch.int16) for x in (value, expected))
    one_apart = (codes - wanted).abs() <= 1
    halves = ((codes & 15) - (wanted & 15)).abs().maximum(((codes >> 4) - (wanted >> 4)).abs()) <= 1
    return float((~(one_apart | halves)).double().mean())


def numbers(found: Trained, reference: Trained) -> float:
    """Largest relative difference of the optimizer's numbers: counts of steps and refreshes, captured energy."""
    worst = 0.0
    for name, expected in reference.numbers.items():
        own: Mapping[str, float] = found.numbers.get(name, {})
        if own.keys() != expected.keys():
            return float("inf")
        worst = max([worst, *(abs(own[key] - value) / max(abs(value), 1.0) for key, value in expected.items())])
    return worst


def norm(tensor: Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor))


def limits(precision: str, yardstick: dict[str, float], *, drifts: bool, lossy: bool) -> dict[str, float]:
    """Largest distances allowed; what has no limit is not in it.

    Args:
        drifts: whether how a batch is split shows in any precision, so that fp64 is not exact.
        lossy: whether activations are kept in 8 bits.
    """
    if precision == "fp64" and not drifts:
        keys = ("first loss", "first grad_norm", "loss", "grad_norm", "eval_loss", "weights", "states", "numbers")
        return {"tensors": 0.0} | {key: max(EXACT, DRIFT * yardstick.get(key, 0.0)) for key in keys}
    least = max(ROUNDING[precision], CODE if lossy else 0.0)
    found = {key: DRIFT * yardstick.get(key, 0.0) + least for key in ("loss", "grad_norm", "eval_loss", "weights")}
    first = FIRST["fp64" if drifts else precision]
    return {**found, "first loss": first, "first grad_norm": first, "tensors": 0.0}
