"""What ZeRO costs and saves: step time and peak bytes of `parallel.zero=0..3`, beside FSDP2 by hand and DeepSpeed.

    python -m benchmarks.sharding [--minutes 12]        # 2 gloo ranks of this machine

Arms: four of our optimizers under every stage; `FSDP2 by hand`, a plain loop of torch's `fully_shard` and fused AdamW;
DeepSpeed's ZeRO-1, 2 and 3 with torch's fused AdamW, buckets of our size and its own thresholds else, by which ZeRO-3
keeps the weights of a small model gathered from forward to backward. All train the same LLaMA in fp32 on the same rows,
one step each a round, in one launch; DeepSpeed's in a second, where our AdamW under zero=3 runs again, so that both can
be compared with it. A ratio is taken in every round and its median told.

Ranks share this machine's cores and memory: figures compare arms, and what is sent costs next to nothing. `amortised`
adds to a step its share of a refresh every 200 steps. Bar: no low-rank optimizer's step under zero=3, so amortised,
takes more than 1.3 of AdamW's.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer

from benchmarks.ranks import on_ranks
from benchmarks.report import print_table, spread, write_result
from parallel.collectives import any_rank, gather_objects
from parallel.launch import World, connected
from parallel.traffic import Traffic
from trainer.build import make_trainable
from trainer.cli.compose import load
from trainer.data.batch import Batch, StepBatch
from trainer.memory import MemoryMeter, format_bytes
from trainer.model import build_model
from trainer.plan import planned_config
from trainer.schema import Config
from trainer.step import train_step

OPTIMIZERS = ("adamw", "galore", "apollo", "adamw_8bit")
LOW_RANK = ("galore", "apollo")
GAP = 200
MOST = 1.3
LINK = "adamw zero=3"
"""The arm of both launches."""


@dataclass(frozen=True)
class Size:
    hidden: int = 512
    layers: int = 4
    vocabulary: int = 2048
    rows: int = 2
    length: int = 512
    ranks: int = 2
    stages: tuple[int, ...] = (0, 1, 2, 3)

    def overrides(self) -> list[str]:
        """The options all arms have in common."""
        return [
            f"model.hidden_size={self.hidden}", f"model.intermediate_size={self.hidden * 43 // 16}",
            f"model.layers={self.layers}", "model.heads=8", "model.kv_heads=8", f"model.vocab_size={self.vocabulary}",
            f"data.sequence_length={self.length}", f"train.micro_batch={self.rows}", "train.clip_norm=1.0",
            f"train.global_batch={self.rows * self.ranks}", "train.steps=1000000", "schedule=constant", "loss=plain",
            "precision=fp32", "run.device=cpu", "run.threads=1",
        ]  # fmt: skip


@dataclass
class Arm:
    step: Callable[[], None]
    meter: MemoryMeter
    refresh: Callable[[], None] | None = None
    """Makes the next step find new bases."""
    seconds: list[float] = field(default_factory=list)
    refresh_seconds: list[float] = field(default_factory=list)


def made(cfg: Config) -> nn.Module:
    config = planned_config(cfg)
    return build_model(cfg.model, config, weights=cfg.precision.weights, device=torch.device("cpu"), seed=0)


def rows_of(cfg: Config, world: World) -> Batch:
    """This rank's rows; every token has a target."""
    generator = torch.Generator().manual_seed(world.process_rank)
    shape = (cfg.train.micro_batch, cfg.data.sequence_length)
    ids = torch.randint(0, cfg.model.vocab_size or 0, shape, generator=generator)
    return Batch(ids, ids.roll(-1, 1), torch.arange(shape[1]).expand(shape))


def ours(size: Size, world: World, name: str, zero: int) -> Arm:
    low = [f"optim.rank={size.hidden // 4}", f"optim.update_proj_gap={10**9}"] if name in LOW_RANK else []
    cfg = load([*size.overrides(), f"optim={name}", "optim.lr=1e-4", f"parallel.zero={zero}", *low])
    built = make_trainable(cfg, world, made(cfg))
    rows = rows_of(cfg, world)
    batch = StepBatch([rows], targets=rows.labels.numel() * world.process_count, first_sample=0)

    def refresh() -> None:
        for state in built.optimizer.state.values():
            if "next_refresh" in state:
                state["next_refresh"] = 0

    def step() -> None:
        train_step(built, batch, 0, 0)

    return Arm(step, built.meter, refresh if low else None)


def loss_of(model: Any, rows: Batch) -> Any:
    logits = model(input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1), rows.labels.flatten())


def fsdp2_by_hand(size: Size, world: World) -> Arm:
    from torch.distributed.fsdp import fully_shard

    cfg = load([*size.overrides(), "optim=adamw"])
    model: Any = made(cfg)
    for layer in model.model.layers:
        fully_shard(layer)
    fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    rows = rows_of(cfg, world)

    def step() -> None:
        loss_of(model, rows).backward()
        nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        optimizer.step()
        optimizer.zero_grad()

    return Arm(step, MemoryMeter(model, optimizer, world.device))


def deepspeed_zero(size: Size, world: World, stage: int) -> Arm:
    from trainer.engines.deepspeed_engine import quiet_deepspeed

    cfg = load([*size.overrides(), "optim=adamw"])
    model, rows = made(cfg), rows_of(cfg, world)
    optimizer: Optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    bucket = cfg.parallel.bucket_mib * 2**20 // 4
    linear = nn.functional.linear
    engine, *_ = quiet_deepspeed(world).initialize(
        model=model, optimizer=optimizer, dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": size.rows, "gradient_clipping": cfg.train.clip_norm,
            "zero_optimization": {"stage": stage, "reduce_bucket_size": bucket, "allgather_bucket_size": bucket},
            "zero_force_ds_cpu_optimizer": False, "steps_per_print": 2**62,
        },
    )  # fmt: skip
    nn.functional.linear = linear  # which stage 3 replaces for all arms; it saves the same

    def step() -> None:
        engine.backward(loss_of(engine, rows))
        engine.step()

    return Arm(step, MemoryMeter(model, optimizer, world.device))


def first_launch(size: Size, world: World) -> Iterator[tuple[str, Arm]]:
    for zero in size.stages:
        for name in OPTIMIZERS:
            yield f"{name} zero={zero}", ours(size, world, name, zero)
    yield "FSDP2 by hand", fsdp2_by_hand(size, world)


def second_launch(size: Size, world: World) -> Iterator[tuple[str, Arm]]:
    yield LINK, ours(size, world, "adamw", 3)
    for stage in filter(None, size.stages):
        yield f"DeepSpeed ZeRO-{stage}", deepspeed_zero(size, world, stage)


def timed(arm: Arm, world: World) -> float:
    """Wall seconds of a step of the slowest rank."""
    world.barrier()
    began = time.perf_counter()
    arm.step()
    return float(max(gather_objects(world, time.perf_counter() - began)))


def on_rank(launch: Callable[[Size, World], Iterator[tuple[str, Arm]]], size: Size, until: float) -> dict[str, Any]:
    """Build all arms, count each, then time them in turn until the clock says `until`, twice at least."""
    found: dict[str, Any] = {}
    with connected(load(size.overrides()).parallel, "cpu", threads=1) as world:
        arms = dict(launch(size, world))
        for name, arm in arms.items():
            for _ in range(2):  # finds bases; DDP makes its buckets anew
                arm.step()
            with Traffic(world.control) as traffic:
                arm.step()
            with arm.meter.count_step() as timeline:
                arm.step()
            found[name] = {"peak": timeline.peak.total, **arm.meter.held(), "sent": sum(traffic.sent.values())}
        order = list(arms.values())
        rounds = 0
        while rounds < 2 or any_rank(world, time.time() < until) == [1]:
            for arm in order:
                arm.seconds.append(timed(arm, world))
                if arm.refresh is not None:
                    arm.refresh()
                    arm.refresh_seconds.append(timed(arm, world))
            order.reverse()  # so that none always follows the same
            rounds += 1
        for name, arm in arms.items():
            found[name] |= {"seconds": arm.seconds, "refresh_seconds": arm.refresh_seconds}
    return found


def compared(ranks: list[dict[str, Any]]) -> dict[str, Any]:
    """What one launch's arms are, beside its AdamW under zero=3 and ours under the same stage. Bytes of the rank that
    holds or sends the most, of each kind by itself."""
    arms = {}
    for name, first in ranks[0].items():
        seconds, stage = first["seconds"], name.partition("zero=")[2]
        bytes_ = {key: max(rank[name][key] for rank in ranks) for key in ("peak", "weights", "states", "sent")}
        arms[name] = {**bytes_, "seconds": spread(seconds), "rounds": len(seconds)}
        arms[name]["to_adamw_zero3"] = spread(ratios(seconds, ranks[0][LINK]["seconds"]))
        if stage:
            usual = ranks[0][f"adamw zero={stage}"]["seconds"]
            extra = [max(r - s, 0.0) for r, s in zip(first["refresh_seconds"], seconds, strict=False)]
            amortised = [s + e / GAP for s, e in zip(seconds, extra or [0.0] * len(seconds), strict=True)]
            arms[name]["amortised_to_adamw"] = spread(ratios(amortised, usual))
            arms[name]["refresh_extra_seconds"] = statistics.median(extra) if extra else 0.0
    return arms


def ratios(values: list[float], usual: list[float]) -> list[float]:
    return [value / base for value, base in zip(values, usual, strict=True)]


def judged(arms: dict[str, Any]) -> dict[str, Any]:
    found = {name: arms[f"{name} zero=3"]["amortised_to_adamw"]["median"] for name in LOW_RANK}
    return {name: {"found": value, "at_most": MOST, "met": value <= MOST} for name, value in found.items()}


def measure(size: Size, minutes: float) -> dict[str, Any]:
    began = time.time()
    arms = compared(on_ranks(size.ranks, on_rank, first_launch, size, began + 60 * 0.8 * minutes))
    second = compared(on_ranks(size.ranks, on_rank, second_launch, size, began + 60 * minutes))
    arms |= {name: arm for name, arm in second.items() if name != LINK}
    return {"size": vars(size), "refresh_every": GAP, "arms": arms, "link_again": second[LINK], "bars": judged(arms)}


def show(found: dict[str, Any]) -> None:
    size = found["size"]
    print(f"\n{size['ranks']} ranks, hidden {size['hidden']}, {size['layers']} layers, fp32, {size['rows']} x "
          f"{size['length']} tokens a rank; bytes of a rank; ratios are medians of those of each round")  # fmt: skip
    head = ["arm", "ms a step", "/ adamw zero=3", "min", "max", "amortised / adamw of the stage", "refresh, ms more"]
    rows = []
    for name, arm in found["arms"].items():
        own, refresh = arm.get("amortised_to_adamw"), arm.get("refresh_extra_seconds")
        rows.append([
            name, f"{1000 * arm['seconds']['median']:.0f}", *(f"{x:.2f}" for x in arm["to_adamw_zero3"].values()),
            f"{own['median']:.2f}" if own else "", f"{1000 * refresh:.0f}" if refresh else "",
            *(format_bytes(arm[key]) for key in ("peak", "weights", "states", "sent")),
        ])  # fmt: skip
    print_table([*head, "peak", "weights between", "states", "sent a step"], rows)
    for name, bar in found["bars"].items():
        verdict = "met" if bar["met"] else "MISSED"
        print(f"bar {verdict}: {name} under zero=3 takes {bar['found']:.2f} of AdamW's step, at most {bar['at_most']}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=12.0, help="for both launches (default 12)")
    parser.add_argument("--stages", type=int, nargs="*", default=range(4), help="which, beside 3 that the bars are of")
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--length", type=int, default=Size.length, help="tokens of a row; two rows a rank")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    stages = tuple(sorted({3, *args.stages}))
    found = measure(Size(args.hidden, args.layers, length=args.length, stages=stages), args.minutes)
    show(found)
    print("written to", write_result("sharding", found, args.out))


if __name__ == "__main__":
    main()
