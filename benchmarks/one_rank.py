"""ZeRO-3 on one rank: does FSDP2 hold what the formula says, with states on the device and on the host?

    python -m benchmarks.one_rank [--hidden 2048 --layers 8]

A run of one process has nothing to share and leaves FSDP2 out; here it is put around the model all the same, so that
one device shows what a rank holds: N shards of 1. Between steps fp32 AdamW's weights take 4 bytes a parameter and its
states 8; while the norm is taken gradients take 4 more, and nothing else grows with the model. With states on the host
the device holds the 4 + 4. Bar: counted bytes are within 1 %. On CUDA the JSON has beside them what the allocator held
beyond the count, cuBLAS' own 32 MiB among it.
"""

import argparse
import gc
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_table, write_result
from offload.states import OffloadedStates, offloaded
from optim import registry
from optim.residency import kept_by
from parallel.config import EngineName, ParallelConfig
from parallel.launch import World, connected
from parallel.mesh import make_grid
from parallel.shard import Shards
from trainer.adapt import blocks, untied_ends
from trainer.build import Trainable
from trainer.cli.compose import load
from trainer.engines.torch_engine import TorchEngine
from trainer.loss.head import HeadLoss
from trainer.memory import MemoryMeter, format_bytes
from trainer.model import build_model, parameter_count
from trainer.plan import made_up_batch, planned_config
from trainer.schema import Config
from trainer.step import train_step

NEAR = 0.01
WHERE = {"on the device": "none", "on the host": "host"}


def sharded(cfg: Config, world: World) -> Trainable:
    """As `trainer.build` makes it on several ranks."""
    config = planned_config(cfg)
    model = build_model(cfg.model, config, weights=cfg.precision.weights, device=world.device, seed=0)
    loss = HeadLoss(model, cfg.loss)
    spread = Shards(
        model, [block for _, block in blocks(model)], untied_ends(model), cfg.parallel, make_grid(world, cfg.parallel)
    )
    with kept_by(OffloadedStates(cfg.offload, world.device)) if cfg.offload.moves_states else nullcontext():
        optimizer = registry.build(cfg.optim, spread.named_parameters())
    states = offloaded(optimizer)
    meter = MemoryMeter(model, optimizer, world.device, beside=states.ledgers if states is not None else None)
    return Trainable(
        cfg=cfg, world=world, model=model, optimizer=optimizer, engine=TorchEngine(spread, optimizer),
        in_backward=None, meter=meter, loss=loss, activations=None, states=states,
    )  # fmt: skip


def counted(options: list[str], world: World, states: str) -> dict[str, Any]:
    """Bytes of a steady step, beside those of the formula."""
    built = sharded(load([*options, f"offload.states={states}"]), world)
    batch = made_up_batch(built.cfg, 1)
    for step in range(2):
        with built.meter.count_step() as timeline:
            train_step(built, batch, step, 0)
    whole, away = 4 * parameter_count(built.model), states != "none"
    update, held = timeline.peak_by_phase["clip"], built.meter.held()
    wanted = {"weights": whole, "gradients": whole, "states": 0 if away else 2 * whole}
    found = {"weights": held["weights"], "gradients": update.by_kind["gradients"], "states": held["states"]}
    if away:
        wanted["host"], found["host"] = 2 * whole, built.meter.held_beside().get("states_host", 0)
    far = {kind: abs(found[kind] - size) / max(size, whole) for kind, size in wanted.items()}
    workspace = update.by_kind["workspace"] - update.unaccounted
    far["workspace"] = workspace / whole
    return {
        "found": found,
        "wanted": wanted,
        "workspace_of_update": workspace,
        "unaccounted_in_update": update.unaccounted,
        "peak": timeline.peak.total,
        "allocator": timeline.allocator,
        "farthest": max(far.values()),
        "met": max(far.values()) <= NEAR,
    }


def measure(hidden: int, layers: int, length: int) -> dict[str, Any]:
    options = [
        f"model.hidden_size={hidden}", f"model.intermediate_size={hidden * 43 // 16}", f"model.layers={layers}",
        "model.heads=8", "model.kv_heads=8", "model.vocab_size=2048", f"data.sequence_length={length}",
        "train.micro_batch=1", "train.global_batch=1", "precision=fp32", "optim=adamw", "parallel.zero=3",
    ]  # fmt: skip
    device = "cuda" if torch.cuda.is_available() else "cpu"
    group_of_one = ParallelConfig(engine=EngineName.accelerate)  # the torch engine makes none for one process
    with connected(group_of_one, device) as world:
        arms = {}
        for name, states in WHERE.items():
            arms[name] = counted(options, world, states)
            gc.collect()  # a model lies in cycles with its hooks
    return {"hidden": hidden, "layers": layers, "length": length, "device": device, "states": arms}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    found = measure(args.hidden, args.layers, args.length)
    rows = [
        [name, kind, format_bytes(arm["found"][kind]), format_bytes(size), f"{100 * arm['farthest']:.2f} %",
         "met" if arm["met"] else "MISSED"]
        for name, arm in found["states"].items() for kind, size in arm["wanted"].items()
    ]  # fmt: skip
    print_table(["states", "kind", "held", "formula", "farthest of all", "bar"], rows)
    print("written to", write_result("one_rank", found, args.out))


if __name__ == "__main__":
    main()
