"""What it costs to keep optimizer states off the device: step time and bytes, beside states that stay.

    python -m benchmarks.optimizer_offload [--size 7B] [--blocks 8] [--optim adamw,galore] [--window 128]

Each arm steps the matrices of some LLaMA blocks with the same gradients in a process of its own. `resident` keeps its
states; `host` and `disk` bring them window by window; `host step` leaves them on the host and steps there (gradients
leave after backward here, where `offload.gradients` would have hidden that in it); `host, whole` has one window for
all, so that nothing overlaps (the arm known to be slow, and large); `bnb paged` is bitsandbytes' AdamW in CUDA's
managed memory, on CUDA alone.
Device bytes: the allocator's on CUDA; on CPU the storages counted, as the device there is the process itself.
"""

import argparse
import json
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.optimizer_arms import SIZES
from benchmarks.report import print_table, spread, write_result
from offload.config import OffloadConfig, StatePlace, StepPlace
from offload.host_step import states_away
from optim import registry
from optim.residency import kept_by
from trainer.memory import format_bytes

ARMS = ("resident", "host", "host step", "host, whole", "disk", "bnb paged")


def measure(arm: str, optim: str, size: str, blocks: int, window: float, rounds: int) -> dict[str, Any]:
    """Step `rounds` times after one that is not counted."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    shapes = SIZES[size].shapes * blocks
    named = [
        (f"layers.{i}.mlp.weight", torch.nn.Parameter(torch.zeros(shape, device=device)))
        for i, shape in enumerate(shapes)
    ]
    for _, p in named:
        p.grad = torch.randn(p.shape, device=device)
    cfg: Any = registry.config_class("bnb_paged_adamw" if arm == "bnb paged" else optim)()
    if hasattr(cfg, "rank"):
        cfg.rank = SIZES[size].rank
    states = None
    if arm not in ("resident", "bnb paged"):
        place = StatePlace.disk if arm == "disk" else StatePlace.host
        step = StepPlace.host if arm == "host step" else StepPlace.device
        chosen = OffloadConfig(states=place, step=step, window_mib=1e6 if arm == "host, whole" else window)
        states = states_away(chosen, device)
    with kept_by(states) if states is not None else nullcontext():
        optimizer = registry.build(cfg, named)
    optimizer.check_finite = False
    optimizer.step()
    before = held(optimizer, device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    times = []
    for _ in range(rounds):
        begin = wall(device)
        optimizer.step()
        times.append(wall(device) - begin)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else None
    moved = sum(states.ledger.held.values()) if states is not None else 0
    median = spread(times)["median"]
    return {
        "seconds": spread(times),
        "device_bytes_between_steps": before,
        "device_bytes_peak": peak,
        "elsewhere_bytes": moved,
        "gib_per_second_of_states": moved / 2**30 / median,
        "weights": sum(p.numel() for _, p in named),
    }


def wall(device: torch.device) -> float:
    """Seconds of the wall, which threads that copy share, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def held(optimizer: Any, device: torch.device) -> int:
    """Bytes on the device between two steps: allocated, or of states alone."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    storages = {
        value.untyped_storage()._cdata: value.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    }
    return sum(storages.values())


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Every arm in a fresh process; one that fails says why."""
    found: dict[str, Any] = {}
    arms = [arm for arm in ARMS if arm != "bnb paged" or torch.cuda.is_available()]
    for optim in options.optim.split(","):
        found[optim] = {}
        for arm in arms if optim == "adamw" else [arm for arm in arms if arm != "bnb paged"]:
            command = [sys.executable, "-m", "benchmarks.optimizer_offload", "--arm", arm, "--optim", optim]
            for name in ("size", "blocks", "window", "rounds"):
                command += [f"--{name}", str(getattr(options, name))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            lines = done.stdout.splitlines()
            found[optim][arm] = json.loads(lines[-1]) if done.returncode == 0 else {"failed": done.stderr[-1000:]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=list(SIZES), default="60M")
    parser.add_argument("--blocks", type=int, default=2, help="times the blocks of that size (default 2)")
    parser.add_argument("--optim", default="adamw,galore", help="names, with commas")
    parser.add_argument("--window", type=float, default=128.0, help="offload.window_mib (default 128)")
    parser.add_argument("--rounds", type=int, default=10, help="steps measured (default 10)")
    parser.add_argument("--arm", choices=ARMS, help="measure this one here, and print JSON")
    parser.add_argument("--out", type=Path, default=None, help="folder of the JSON")
    options = parser.parse_args()
    if options.arm:
        print(
            json.dumps(
                measure(options.arm, options.optim, options.size, options.blocks, options.window, options.rounds)
            )
        )
        return
    found = run(options)
    rows = []
    for optim, arms in found.items():
        base = arms["resident"].get("seconds", {}).get("median")
        for arm, result in arms.items():
            if "failed" in result:
                rows.append([optim, arm, "failed", "", "", "", ""])
                continue
            seconds = result["seconds"]["median"]
            peak = result["device_bytes_peak"]
            rows.append(
                [
                    optim, arm, f"{1000 * seconds:.1f} ms", f"{seconds / base:.2f}x" if base else "",
                    format_bytes(result["device_bytes_between_steps"]), format_bytes(peak) if peak else "-",
                    format_bytes(result["elsewhere_bytes"]),
                ]
            )  # fmt: skip
    print_table(["optimizer", "states", "step", "of resident", "device", "peak", "elsewhere"], rows)
    settings = {name: getattr(options, name) for name in ("size", "blocks", "window", "rounds")}
    print("written to", write_result("optimizer_offload", {**settings, "arms": found}, options.out))


if __name__ == "__main__":
    main()
