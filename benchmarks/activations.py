"""What each fate of activations costs and saves: peak bytes and time of a step, beside transformers' and torch's own.

    python -m benchmarks.activations

Arms: every preset; `hf_checkpointing`, transformers' gradient checkpointing; `save_on_cpu`, torch's hook, which copies
each save by itself and on CPU copies nothing (the arm known to save nothing here). The arms take turns in one process
on copies of one model; bytes are counted in a step of their own. On CPU the tiers are host copies and files, so times
show what the bookkeeping and the copies cost, not what an accelerator would hide. Under 4 minutes.
"""

import argparse
import copy
import re
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.report import now, print_table, spread, write_result
from offload.config import ActivationsConfig, Fate
from offload.float8_layers import use_float8
from parallel.launch import World
from trainer.adapt import blocks, manage_activations
from trainer.loss.config import LossConfig
from trainer.loss.head import HeadLoss
from trainer.memory import MemoryMeter, format_bytes

PRESETS: dict[str, dict[str, Any]] = {
    "keep": {},
    "lean": {"lean": True},
    "recompute": {"fate": Fate.recompute},
    "recompute_host": {"fate": Fate.recompute, "inputs": Fate.host},
    "selective": {"fate": Fate.selective},
    "host": {"fate": Fate.host},
    "disk": {"fate": Fate.disk},
    "int8": {"fate": Fate.int8, "lean": True},
    "fp8": {"fate": Fate.fp8, "lean": True},
}


PRODUCTS = r"(attn|mlp)\..*weight$"
"""Weights whose products run in FP8, where an arm has such."""


class Arm:
    """One way to treat the activations of a model: a preset's name, or another's way; after a plus, products in FP8:
    `ours` (`precision.compute=fp8`) or `torchao`'s own layer.
    """

    def __init__(self, name: str, model: Any, device: torch.device) -> None:
        self.model = model
        self._around: Callable[[], AbstractContextManager[Any]] = nullcontext
        self.activations = None
        name, _, products = name.partition(" + ")
        if products == "ours":
            use_float8(blocks(model), PRODUCTS, "tensorwise")
        elif products == "torchao":
            use_torchaos(model, emulate=device.type != "cuda")
        if name == "hf_checkpointing":
            enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
            enable({"use_reentrant": False})
        elif name == "save_on_cpu":
            self._around = lambda: torch.autograd.graph.save_on_cpu(pin_memory=device.type == "cuda")
        else:
            cfg = ActivationsConfig(**PRESETS[name])
            self.activations = manage_activations(cfg, World(device=device), model)
        self._loss = HeadLoss(model, LossConfig())
        ledger = self.activations.ledger if self.activations else None
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
        self.meter = MemoryMeter(model, optimizer, device, elsewhere=ledger)

    def step(self, ids: Tensor) -> float:
        """Forward and backward."""
        self.model.zero_grad()
        with self._around(), self.meter.phase("forward"):
            loss = self._loss(lambda: self.model(input_ids=ids, use_cache=False), ids) / ids.numel()
        with self.meter.phase("backward"):
            loss.backward()
        return float(loss.detach())


def use_torchaos(model: nn.Module, *, emulate: bool) -> None:
    """Put torchao's Float8Linear in the place of the blocks' layers."""
    from torchao.float8 import Float8LinearConfig, convert_to_float8_training

    convert_to_float8_training(
        model,
        config=Float8LinearConfig(emulate=emulate),
        module_filter_fn=lambda module, name: re.search(PRODUCTS, f"{name}.weight") is not None,
    )


def gradient_error(arm: Arm, expected: list[Tensor]) -> float:
    """Largest relative difference of a parameter's gradient."""
    found = [p.grad for p in arm.model.parameters()]
    return max(float((a - b).norm() / b.norm()) for a, b in zip(found, expected, strict=True))


def measure(rows: int, length: int, rounds: int) -> dict[str, object]:
    """Compare all arms."""
    torch.set_num_threads(1)  # times are of the processor, and threads that wait for each other spin
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = LlamaConfig(
        hidden_size=256, intermediate_size=688, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=512, max_position_embeddings=length,
    )  # fmt: skip
    origin: nn.Module = LlamaForCausalLM(sizes).to(device, torch.bfloat16).train()
    ids = torch.randint(0, 512, (rows, length), device=device)
    arms = {name: Arm(name, copy.deepcopy(origin), device) for name in [*PRESETS, "hf_checkpointing", "save_on_cpu"]}
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    figures: dict[str, dict[str, float]] = {}
    expected: list[Tensor] = []
    for name, arm in arms.items():
        arm.step(ids)
        expected = expected or [p.grad.clone() for p in arm.model.parameters()]
        error = gradient_error(arm, expected)
        with arm.meter.count_step() as timeline:
            arm.step(ids)
        activations = int(timeline.bytes_by_kind[3].max())
        figures[name] = {
            "peak": timeline.peak.total,
            "activations": activations,
            **timeline.elsewhere,
            "gradient_error": error,
        }
    for _ in range(rounds):
        for name, arm in arms.items():
            began = now(device)
            arm.step(ids)
            seconds[name].append(now(device) - began)
    times = {
        name: spread([t / k for t, k in zip(taken, seconds["keep"], strict=True)]) for name, taken in seconds.items()
    }
    print_table(
        [
            "arm",
            "peak",
            "activations",
            "of keep",
            "elsewhere",
            "ms",
            "time to keep (median)",
            "min",
            "max",
            "gradients",
        ],
        [
            [
                name,
                format_bytes(found["peak"]),
                format_bytes(found["activations"]),
                f"{found['activations'] / figures['keep']['activations']:.2f}",
                format_bytes(found.get("host", 0) + found.get("disk", 0)),
                f"{1000 * spread(seconds[name])['median']:.0f}",
                *(f"{value:.2f}" for value in times[name].values()),
                "same bits" if not found["gradient_error"] else f"{found['gradient_error']:.1e}",
            ]
            for name, found in figures.items()
        ],
    )
    return {
        "model": sizes.to_diff_dict(),
        "rows": rows,
        "length": length,
        "rounds": rounds,
        "bytes": figures,
        "seconds": {name: spread(taken) for name, taken in seconds.items()},
        "time_to_keep": times,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=2)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    print("written to", write_result("activations", measure(args.rows, args.length, args.rounds), args.out))


if __name__ == "__main__":
    main()
