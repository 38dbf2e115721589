"""How long a row may be, and what that costs: bytes a token, the longest row that fits, and the time of a step.

    python -m benchmarks.longest_row [--shape 8b] [--gib 76] [--confirm ARM,ARM]

Arms: every preset of activations, transformers' checkpointing, torch's save_on_cpu, and products in FP8 (ours, and
torchao's own layers). Each is built anew on some blocks in bf16, and steps forward and backward on one row of two
lengths. A peak grows by a fixed number of bytes a token, so those two tell the longest row; `--confirm` takes a step at
95 % of it and compares. Times are of the longer of the two rows. Bytes: the allocator's on CUDA, counted on CPU.
"""

import argparse
import gc
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.activations import PRESETS, Arm
from benchmarks.report import now, print_table, spread, write_result
from trainer.memory import format_bytes

SHAPES: dict[str, dict[str, int]] = {
    "small": {
        "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 2048,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 4, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 32000,
    },
}  # fmt: skip
"""`8b`: four blocks of LLaMA 3 8B."""
LENGTHS = {"small": (256, 512), "8b": (8192, 16384)}
PRODUCTS = ("keep + torchao", "lean + ours", "fp8 + ours")
ARMS = (*PRESETS, *PRODUCTS, "hf_checkpointing", "save_on_cpu")
GIB = 2**30


def build(name: str, shape: str, device: torch.device) -> Arm:
    """A fresh model, treated as the arm does."""
    torch.manual_seed(0)
    with device:
        model: Any = LlamaForCausalLM(LlamaConfig(**SHAPES[shape], max_position_embeddings=2**20)).to(torch.bfloat16)
    return Arm(name, model.train(), device)


def row(shape: str, length: int, device: torch.device) -> torch.Tensor:
    return torch.randint(0, SHAPES[shape]["vocab_size"], (1, length), device=device)


def peak_of(arm: Arm, ids: torch.Tensor) -> int:
    """Most bytes of one step on a row."""
    if ids.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        arm.step(ids)
        return torch.cuda.max_memory_allocated()
    with arm.meter.count_step() as timeline:
        arm.step(ids)
    return timeline.peak.total


def measure(
    name: str, shape: str, capacity: int, rounds: int, *, confirm: bool, device: torch.device
) -> dict[str, Any]:
    """Bytes and seconds of one arm."""
    arm = build(name, shape, device)
    short, long = LENGTHS[shape]
    peaks = []
    for length in (short, long):
        ids = row(shape, length, device)
        arm.step(ids)  # what happens once: kernels compiled, buffers pinned
        peaks.append(peak_of(arm, ids))
    seconds = []
    for _ in range(rounds):
        began = now(device)
        arm.step(ids)
        seconds.append(now(device) - began)
    a_token = (peaks[1] - peaks[0]) / (long - short)
    fixed = peaks[0] - a_token * short
    found: dict[str, Any] = {
        "bytes_a_token": a_token,
        "fixed_bytes": fixed,
        "peaks": dict(zip((short, long), peaks, strict=True)),
        "longest_row": int((capacity - fixed) / a_token),
        "seconds": spread(seconds),
    }
    if confirm:
        length = int(0.95 * found["longest_row"]) // 128 * 128
        found["confirmed"] = {"length": length, "expected": fixed + a_token * length}
        try:
            found["confirmed"]["peak"] = peak_of(arm, row(shape, length, device))
        except torch.OutOfMemoryError:
            found["confirmed"]["peak"] = None
    return found


def run(
    names: list[str], shape: str, capacity: int, rounds: int, confirm: list[str], device: torch.device
) -> dict[str, Any]:
    """Every arm in turn; one that does not run here says why."""
    found: dict[str, Any] = {}
    for name in names:
        try:
            found[name] = measure(name, shape, capacity, rounds, confirm=name in confirm, device=device)
        except (ImportError, RuntimeError) as error:
            found[name] = {"failed": str(error).splitlines()[0][:300]}
        print(f"{name}: {found[name].get('failed', 'measured')}", flush=True)
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="small")
    parser.add_argument("--gib", type=float, help="memory to fit into; default: 95 %% of the device's, 1 on a CPU")
    parser.add_argument("--arms", default=",".join(ARMS), help="names, with commas")
    parser.add_argument("--confirm", default="", help="arms that also step on a row of 95 %% of what they say fits")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    unknown = [name for name in args.arms.split(",") if name not in ARMS]
    if unknown:
        parser.error(f"no such arm: {', '.join(unknown)}; there are {', '.join(ARMS)}")
    cuda = torch.cuda.is_available()
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if not cuda:
        torch.set_num_threads(1)
    whole = 0.95 * torch.cuda.get_device_properties(device).total_memory if cuda else GIB
    capacity = int(whole if args.gib is None else args.gib * GIB)
    found = run(args.arms.split(","), args.shape, capacity, args.rounds, args.confirm.split(","), device)
    base = found.get("keep", {}).get("seconds", {}).get("median")
    rows = []
    for name, figures in found.items():
        if "failed" in figures:
            rows.append([name, "failed", "", "", "", ""])
            continue
        median = figures["seconds"]["median"]
        confirmed = figures.get("confirmed")
        said = (
            "" if confirmed is None else "did not fit" if confirmed["peak"] is None else format_bytes(confirmed["peak"])
        )
        rows.append(
            [
                name, format_bytes(figures["bytes_a_token"]), f"{figures['longest_row']:,}", f"{1000 * median:.0f}",
                f"{median / base:.2f}" if base else "", said,
            ]
        )  # fmt: skip
    print_table(["arm", "a token", f"longest row in {format_bytes(capacity)}", "ms", "of keep", "at 95 % of it"], rows)
    content = {
        "shape": args.shape,
        "model": SHAPES[args.shape],
        "capacity": capacity,
        "rounds": args.rounds,
        "arms": found,
    }
    print("written to", write_result("longest_row", content, args.out))


if __name__ == "__main__":
    main()
