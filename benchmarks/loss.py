"""Which loss to compute: bytes and time of forward and backward through a linear head, and the loss that is reported.

    python -m benchmarks.loss

Arms: all logits at once (`plain`), ours in pieces (`chunked`), torch's linear_cross_entropy summed by us row by row
(`torch`) and by torch itself (`torch_sum`, known to report a wrong loss in bf16), Cut Cross Entropy and Liger where
they run. All take turns in one process on the same tensors; bytes are counted in a pass of their own. Bars: peak at
most a quarter of the plain one at V/h >= 32, at least 0.9 of its speed, bf16's loss right to 1e-3.
"""

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.report import now, print_table, spread, write_result
from trainer.loss.chunked import Terms, linear_loss_sum
from trainer.loss.libraries import cce_loss_sum, liger_loss_sum, torch_loss_sum
from trainer.loss.plain import token_loss_sum
from trainer.memory import MemoryMeter, format_bytes

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
TERMS = Terms()


def torch_sum(hidden: Tensor, weight: Tensor, labels: Tensor) -> Tensor:
    """torch's own sum over chunks."""
    options = torch.nn.LinearCrossEntropyOptions()  # type: ignore[attr-defined]
    found: Tensor = torch.nn.functional.linear_cross_entropy(  # type: ignore[attr-defined]
        hidden, weight, labels, reduction="sum", options=options
    )
    return found


ARMS: dict[str, Loss] = {
    "plain": lambda x, w, y: token_loss_sum(linear(x, w), y),
    "chunked": lambda x, w, y: linear_loss_sum(x, w, None, y, TERMS),
    "torch": lambda x, w, y: torch_loss_sum(x, w, None, y, TERMS),
    "torch_sum": torch_sum,
    "cce": lambda x, w, y: cce_loss_sum(x, w, None, y, TERMS),
    "liger": lambda x, w, y: liger_loss_sum(x, w, None, y, TERMS),
}


def step(arm: Loss, hidden: Tensor, head: nn.Linear, labels: Tensor) -> float:
    """Forward and backward; returns the mean loss."""
    hidden.grad = head.weight.grad = None
    loss = arm(hidden, head.weight, labels)
    (loss / len(labels)).backward()
    return float(loss.detach()) / len(labels)


def available(hidden: Tensor, head: nn.Linear, labels: Tensor) -> dict[str, Loss]:
    """Arms that run here."""
    found = {}
    for name, arm in ARMS.items():
        try:
            step(arm, hidden, head, labels)
        except (ImportError, AttributeError, RuntimeError) as error:  # torch up to 2.11 has no such loss
            print(f"{name} does not run here: {str(error).splitlines()[0]}")
            continue
        found[name] = arm
    return found


def measure(rows: int, width: int, vocabulary: int, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """Compare the arms at one size."""
    torch.set_num_threads(1)  # times are of the processor, and threads that wait for each other spin
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hidden = torch.randn(rows, width, device=device, dtype=dtype).requires_grad_()
    head = nn.Linear(width, vocabulary, bias=False, device=device, dtype=dtype)
    labels = torch.randint(0, vocabulary, (rows,), device=device)
    with torch.no_grad():
        exact = token_loss_sum(linear(hidden.double(), head.weight.double()), labels).item() / rows
    arms = available(hidden, head, labels)
    meter = MemoryMeter(head, torch.optim.SGD(head.parameters(), lr=0.0), device)
    peaks, seconds, error = {}, {name: list[float]() for name in arms}, {}
    for name, arm in arms.items():
        hidden.grad = head.weight.grad = None
        with meter.count_step() as timeline:
            error[name] = step(arm, hidden, head, labels) - exact
        peaks[name] = timeline.peak.total - int(timeline.total[0])
    for _ in range(rounds):
        for name, arm in arms.items():
            began = now(device)
            step(arm, hidden, head, labels)
            seconds[name].append(now(device) - began)
    speed = {
        name: spread([p / t for p, t in zip(seconds["plain"], taken, strict=True)]) for name, taken in seconds.items()
    }
    print(f"\n{rows} rows, hidden {width}, vocabulary {vocabulary}, {str(dtype).removeprefix('torch.')}")
    print_table(
        ["arm", "peak", "of plain", "ms (median)", "speed to plain (median)", "min", "max", "loss - exact"],
        [
            [
                name,
                format_bytes(peaks[name]),
                f"{peaks[name] / peaks['plain']:.3f}",
                f"{1000 * spread(seconds[name])['median']:.0f}",
                *(f"{value:.2f}" for value in speed[name].values()),
                f"{error[name]:+.1e}",
            ]
            for name in arms
        ],
    )
    return {
        "rows": rows,
        "hidden": width,
        "vocabulary": vocabulary,
        "dtype": str(dtype),
        "peak_bytes": peaks,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "speed_to_plain": speed,
        "loss_error": error,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    sizes = (args.rows, args.hidden, args.vocabulary)
    cases = [measure(*sizes, dtype, args.rounds) for dtype in (torch.float32, torch.bfloat16)]
    print("written to", write_result("loss", {"rounds": args.rounds, "cases": cases}, args.out))


if __name__ == "__main__":
    main()
