"""What counting a step's memory exactly costs, and how seldom it must be done to cost under 1 %.

    python -m benchmarks.memory_counting

Counted and plain steps of the main job's model take turns in one process. A step that isn't counted pays nothing: its
phases are null contexts.
"""

import argparse
import math
import statistics
import time
from pathlib import Path

import torch

from benchmarks.report import print_table, spread, write_result
from parallel.launch import World, cpu_threads
from trainer.build import build
from trainer.cli.compose import load
from trainer.data.stream import TrainStream
from trainer.step import train_step


def measure(pairs: int, overrides: list[str]) -> dict[str, object]:
    """Time `pairs` of a counted and a plain step."""
    torch.set_num_threads(cpu_threads(1))
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    cfg = load(["optim=adamw", *overrides])
    built = build(cfg, World(device=device))
    stream = TrainStream(
        built.corpus.train, seed=0, global_batch=cfg.train.global_batch, micro_batch=cfg.train.micro_batch
    )
    seconds: dict[str, list[float]] = {"plain": [], "counted": []}
    for index in range(2 * pairs + 4):
        counted = index % 2 == 1
        batch = next(stream)
        began = time.perf_counter()
        if counted:
            with built.meter.count_step():
                train_step(built, batch, 0, 0)
        else:
            train_step(built, batch, 0, 0)
        if index >= 4:
            seconds["counted" if counted else "plain"].append(time.perf_counter() - began)
    ratios = [c / p for c, p in zip(seconds["counted"], seconds["plain"], strict=True)]
    extra = max(statistics.median(ratios) - 1, 0.0)
    every = max(1, math.ceil(extra / 0.01))
    print_table(
        ["step", "ms (median)", "min", "max"],
        [[name, *(f"{1000 * v:.1f}" for v in spread(taken).values())] for name, taken in seconds.items()],
    )
    print(f"a counted step takes {100 * extra:.1f} % longer; counting one step in {every} costs 1 % or less")
    return {
        "overrides": overrides,
        "pairs": pairs,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "ratio": spread(ratios),
        "steps_between_counts_for_1_percent": every,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="options of `stowage train`")
    args = parser.parse_args()
    print("written to", write_result("memory_counting", measure(args.pairs, args.overrides), args.out))


if __name__ == "__main__":
    main()
