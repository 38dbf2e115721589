"""What the trainer costs over a bare loop: same model, same batches, AdamW, clipping; display and checkpoints off.

    python -m benchmarks.loop_overhead

Both arms run in fresh processes in turn (A B A B ...). Each reports the median time of a step over windows of ten
steps after warm-up; the table gives the median over the pairs, and the ratio pair by pair, which holds when the
machine's speed drifts. Bar: within 2 %. The control arm is the bare loop again: its ratio shows what noise alone does.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.report import print_table, spread, write_result

WINDOW = 10
OVERRIDES = [
    "optim=adamw",
    "schedule=constant",
    "train.eval_every=0",
    "checkpoint.every=0",
    "data.eval_rows=1",
    f"train.log_every={WINDOW}",
    "train.resume=never",
]


def stowage_arm(overrides: list[str], steps: int) -> float:
    """Seconds a step of the trainer itself, from what it writes to metrics.jsonl."""
    from trainer.cli.compose import load
    from trainer.metrics import read_metrics
    from trainer.run import run

    with tempfile.TemporaryDirectory() as folder:
        run(load([*OVERRIDES, *overrides, f"train.steps={steps}", f"run.dir={folder}/run"]))
        marks = [
            r for r in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss" in r and r["step"] % WINDOW == 0
        ]
    # the first windows warm up and hold the two counted steps
    gaps = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in zip(marks[1:], marks[2:], strict=False)]
    return statistics.median(gaps)


def bare_arm(overrides: list[str], steps: int) -> float:
    """Seconds a step of the plainest loop that trains the same model on the same batches."""
    from torch.nn.functional import cross_entropy

    from parallel.launch import World, cpu_threads
    from trainer.build import build_parts
    from trainer.cli.compose import load
    from trainer.data.stream import TrainStream

    torch.set_num_threads(cpu_threads(1))
    cfg = load([*OVERRIDES, *overrides, f"train.steps={steps}"])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    corpus, _, model = build_parts(cfg, World(device=device))
    stream = TrainStream(
        corpus.train,
        seed=cfg.seed,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        process_rank=0,
        process_count=1,
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim.lr, weight_decay=0.0, fused=True)
    times, began = [], 0.0
    for step in range(steps):
        if step % WINDOW == 0:
            if device.type == "cuda":
                torch.cuda.synchronize()
            now = time.perf_counter()
            times.append((now - began) / WINDOW)
            began = now
        batch = next(stream)
        for micro in batch.micros:
            logits = model(
                input_ids=micro.input_ids.to(device), position_ids=micro.position_ids.to(device), use_cache=False
            ).logits
            labels = micro.labels.to(device)
            loss = cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="sum") / batch.targets
            del logits
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()
    return statistics.median(times[2:])


def child(arm: str, overrides: list[str], steps: int) -> float:
    """Run one arm in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.loop_overhead", "--arm", arm, "--steps", str(steps), *overrides]
    threads = {"GOMP_SPINCOUNT": "20000", **os.environ}  # as the command line sets it, for both arms
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=threads)
    return float(json.loads(done.stdout.splitlines()[-1])["seconds_per_step"])


def measure(overrides: list[str], steps: int, pairs: int) -> dict[str, object]:
    """Run the arms in turn and compare."""
    seconds: dict[str, list[float]] = {"bare": [], "stowage": [], "control": []}
    for _ in range(pairs):
        for arm, taken in seconds.items():
            taken.append(child("bare" if arm == "control" else arm, overrides, steps))
    ratios = {arm: [t / b for t, b in zip(seconds[arm], seconds["bare"], strict=True)] for arm in seconds}
    print_table(
        ["arm", "ms a step (median)", "min", "max", "ratio to bare (median)", "min", "max"],
        [
            [
                arm,
                *(f"{1000 * v:.1f}" for v in spread(seconds[arm]).values()),
                *(f"{v:.3f}" for v in spread(ratios[arm]).values()),
            ]
            for arm in seconds
        ],
    )
    return {
        "overrides": overrides,
        "steps": steps,
        "pairs": pairs,
        "bar": "stowage / bare <= 1.02",
        "seconds_per_step": {arm: spread(v) for arm, v in seconds.items()},
        "ratio": {arm: spread(v) for arm, v in ratios.items()},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arm", choices=["bare", "stowage"], help="run one arm in this process")
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="options of `stowage train`, such as model=llama_60m")
    args = parser.parse_args()
    if args.arm:
        arm = {"bare": bare_arm, "stowage": stowage_arm}[args.arm]
        print(json.dumps({"seconds_per_step": arm(args.overrides, args.steps)}))
        return
    print("written to", write_result("loop_overhead", measure(args.overrides, args.steps, args.pairs), args.out))


if __name__ == "__main__":
    main()
