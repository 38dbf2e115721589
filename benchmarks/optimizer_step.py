"""How long an optimizer step takes: ours, the authors' packages, torch, bitsandbytes and torchao, in turn.

    python -m benchmarks.optimizer_step [--minutes 5] [--sizes 60M,350M,7B] [--arms galore,...] [--weights bf16]

All arms step the same weights with the same gradients, one step of each in turn, round after round, so that what else
the machine does touches all alike; figures are medians, ratios are medians of the ratios round by round. Then a
refresh of each low-rank arm, and the energy that ours captures beside the optimum of an SVD.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.optimizer_arms import ARMS, ON_CUDA, SIZES, Arm, Size, gradients
from benchmarks.report import print_table, spread, write_result
from parallel.launch import cpu_threads

RIVALS = {
    "adamw": ["torch adamw fused"],
    "galore": ["galore products", "galore-torch"],
    "galore-torch": ["galore products"],
    "apollo": ["apollo-torch", "adamw"],
    "apollo_mini": ["apollo-torch mini"],
    "fira": ["fira (authors)"],
    "adamw_8bit": ["bitsandbytes 8bit", "torchao 8bit"],
    "adamw_4bit": ["torchao 4bit"],
    "adamw_fp8": ["torchao fp8", "torchao 8bit"],
}
"""Whose time each arm's is divided by."""
BARS = {
    ("galore", "galore products"): 1.25,
    ("apollo", "apollo-torch"): 1.0,
    ("apollo_mini", "apollo-torch mini"): 1.0,
    ("adamw_8bit", "bitsandbytes 8bit"): 1.0,
    ("adamw_8bit", "torchao 8bit"): 1.0,
    ("adamw_fp8", "torchao fp8"): 1.0,
}
"""Largest ratio of steady steps."""
REFRESH_BAR = 1 / 20
"""Largest ratio of our refresh to the authors' SVD."""
ENERGY_BAR = 0.99
"""Least share of the optimal energy that a warm refresh captures."""
SLOW = ("galore-torch", "fira (authors)", "cosmos", "torchao 8bit", "torchao 4bit", "torchao fp8")
SKIPPED_AT = {"350M": ("torchao 4bit",), "1B": SLOW, "7B": SLOW}
"""On a CPU: their SVD of a large matrix takes minutes, torchao compiles 5 to 10 seconds for each shape."""


def clocked(step: Callable[[], None], device: torch.device, times: int = 1) -> float:
    """Seconds that a step takes, one of `times` in a row, the device's work included."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    for _ in range(times):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return (time.perf_counter() - began) / times


def build(
    names: list[str], size: Size, device: torch.device, dtype: torch.dtype
) -> tuple[dict[str, Any], list[Tensor], dict[str, Any]]:
    """Arms that could be built and stepped twice, their weights, and what was found on the way."""
    params = [torch.nn.Parameter((torch.randn(shape, device=device) * 0.02).to(dtype)) for shape in size.shapes]
    for p, grad in zip(params, gradients(size.shapes, device, drift=0.0, seed=0), strict=True):
        p.grad = grad.to(dtype)
    arms: dict[str, Any] = {}
    found: dict[str, Any] = {"first_step_seconds": {}, "left_out": {}}
    for name in names:
        try:
            arm = ARMS[name](params, size.apollo_rank if "apollo" in name else size.rank)
            if not size.svd and isinstance(arm, Arm):
                arm.begin_anywhere()
            found["first_step_seconds"][name] = clocked(arm.step, device)
            arm.step()
        except Exception as error:  # a package that is not there, or does not run with these versions
            found["left_out"][name] = (
                f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
            )
            continue
        arms[name] = arm
    return arms, params, found


def steady(arms: dict[str, Any], device: torch.device, seconds: float, rounds: int) -> dict[str, list[float]]:
    """Time one step of each arm in turn, for at most `rounds` rounds or `seconds`, at least three rounds.

    On CUDA ten in a row: there the host runs ahead, in training as here.
    """
    times = 10 if device.type == "cuda" else 1
    taken: dict[str, list[float]] = {name: [] for name in arms}
    until = time.monotonic() + seconds
    while (done := len(next(iter(taken.values()))) if taken else rounds) < rounds:
        if done >= 3 and time.monotonic() > until:
            break
        for name, arm in arms.items():
            taken[name].append(clocked(arm.step, device, times))
    return taken


def refreshes(
    arms: dict[str, Any], params: list[Tensor], size: Size, device: torch.device, seconds: float
) -> dict[str, Any]:
    """Time steps with a refresh on drifted gradients, in turn; compare the energy captured with an SVD's."""
    low_rank = {name: arm for name, arm in arms.items() if arm.refresh is not None}
    taken: dict[str, list[float]] = {name: [] for name in low_rank}
    searched: dict[str, list[float]] = {name: [] for name, arm in low_rank.items() if arm.search is not None}
    shares: list[float] = []
    until = time.monotonic() + seconds
    for round_ in range(5):
        if round_ and time.monotonic() > until:
            break
        for p, grad in zip(params, gradients(size.shapes, device, drift=0.15 * (round_ + 1), seed=0), strict=True):
            p.grad = grad.to(p.dtype)
        for name, arm in low_rank.items():
            arm.refresh()
            taken[name].append(clocked(arm.step, device))
        for name, times in searched.items():
            low_rank[name].search()
            times.append(clocked(low_rank[name].step, device))
        if "galore" in arms and size.svd and not round_:
            shares = [
                arms["galore"].optimizer.state[p]["captured"] / optimal_energy(p.grad, size.rank)
                for p in params[:7]
                if p.grad is not None
            ]
    return {"seconds": taken, "search_seconds": searched, "captured_over_optimum": shares}


def optimal_energy(grad: Tensor, rank: int) -> float:
    """Largest share of the energy that `rank` directions can hold."""
    energies = torch.linalg.svdvals(grad.float()).square()
    return float(energies[:rank].sum() / energies.sum())


def ratios(taken: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Median of the ratios round by round, of each arm to its rivals."""
    return {
        name: {
            rival: statistics.median(a / b for a, b in zip(taken[name], taken[rival], strict=True))
            for rival in rivals
            if rival in taken
        }
        for name, rivals in RIVALS.items()
        if name in taken
    }


def measure(
    size_name: str, names: list[str], device: torch.device, seconds: float, rounds: int, dtype: torch.dtype
) -> dict[str, Any]:
    """Everything about one size; prints its table."""
    size = SIZES[size_name]
    chosen = [name for name in names if device.type == "cuda" or name not in SKIPPED_AT.get(size_name, ())]
    arms, params, found = build(chosen, size, device, dtype)
    taken = steady(arms, device, 0.6 * seconds, rounds)
    refreshed = refreshes(arms, params, size, device, 0.2 * seconds)
    compared = ratios(taken)
    medians = {name: statistics.median(times) for name, times in taken.items()}
    extra, searching = (
        {name: statistics.median(times) - medians[name] for name, times in refreshed[key].items()}
        for key in ("seconds", "search_seconds")
    )
    print(
        f"\n{size_name}: {len(params)} matrices, {sum(p.numel() for p in params) / 1e6:.1f}M values, rank {size.rank}"
    )
    print_table(
        ["arm", "ms a step", "min", "max", "ms more at a refresh", "ratios"],
        [
            [
                name,
                *(f"{1000 * v:.2f}" for v in spread(times).values()),
                f"{1000 * extra[name]:.1f}" if name in extra else "",
                ", ".join(f"{ratio:.2f} {rival}" for rival, ratio in compared.get(name, {}).items()),
            ]
            for name, times in taken.items()
        ],
    )
    for name, why in found["left_out"].items():
        print(f"left out: {name}: {why}")
    return found | {
        "steady_seconds": {name: spread(times) for name, times in taken.items()},
        "rounds": len(next(iter(taken.values()), [])),
        "ratios": compared,
        "refresh_extra_seconds": extra,
        "search_extra_seconds": searching,
        "captured_over_optimum": spread(refreshed["captured_over_optimum"])
        if refreshed["captured_over_optimum"]
        else None,
        "bars": bars(compared, extra, refreshed["captured_over_optimum"]),
    }


def bars(compared: dict[str, Any], extra: dict[str, float], shares: list[float]) -> dict[str, Any]:
    """Each bar with what was found; prints those that are missed."""
    found: dict[str, dict[str, Any]] = {}
    for (name, rival), most in BARS.items():
        if rival in compared.get(name, {}):
            value = compared[name][rival]
            found[f"{name} / {rival}"] = {"at_most": most, "found": value, "met": value <= most}
    if "galore" in extra and "galore-torch" in extra:
        value = extra["galore"] / extra["galore-torch"]
        found["refresh galore / galore-torch"] = {"at_most": REFRESH_BAR, "found": value, "met": value <= REFRESH_BAR}
    if shares:
        value = min(shares)
        found["captured / optimum"] = {"at_least": ENERGY_BAR, "found": value, "met": value >= ENERGY_BAR}
    for name, bar in found.items():
        limit = bar.get("at_most", ENERGY_BAR)
        print(f"{'met   ' if bar['met'] else 'MISSED'} {name}: {bar['found']:.3f}, bar {limit:.3g}")
    return found


def run(
    sizes: list[str], names: list[str], device: torch.device, minutes: float, rounds: int = 30,
    dtype: torch.dtype = torch.float32,
) -> dict[str, Any]:  # fmt: skip
    """Measure `sizes` one after the other; what is over goes to the next."""
    until = time.monotonic() + 60 * minutes
    found = {}
    for done, size in enumerate(sizes):
        found[size] = measure(size, names, device, (until - time.monotonic()) / (len(sizes) - done), rounds, dtype)
    return {"device": str(device), "threads": torch.get_num_threads(), "weights": str(dtype), "sizes": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=4.0, help="for the measurements, without warming up (4)")
    parser.add_argument("--sizes", default="60M,350M,7B", help=f"of {', '.join(SIZES)} (60M,350M,7B)")
    everywhere = [name for name in ARMS if torch.cuda.is_available() or name not in ON_CUDA]
    parser.add_argument("--arms", default=",".join(everywhere), help="comma-separated names; default all")
    parser.add_argument("--rounds", type=int, default=30, help="steps of each arm at most (30)")
    parser.add_argument("--weights", choices=("fp32", "bf16"), default="fp32", help="and gradients (fp32)")
    parser.add_argument("--threads", type=int, default=cpu_threads(1), help="of torch; default: the cores there are")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    unknown = [name for name in args.arms.split(",") if name not in ARMS]
    if unknown:
        parser.error(f"--arms {unknown[0]}: known are {', '.join(ARMS)}")
    torch.set_num_threads(args.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[args.weights]
    found = run(args.sizes.split(","), args.arms.split(","), device, args.minutes, args.rounds, dtype)
    print("written to", write_result("optimizer_step", found, args.out))


if __name__ == "__main__":
    main()
