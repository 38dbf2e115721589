"""What a checkpoint costs the training thread: seconds it waits, and seconds that the steps around a save take longer.

    python -m benchmarks.checkpoint [--hidden N] [--layers N] [--rounds N] [OVERRIDE ...]

Arms: torch.save to a file that is synced, torch.distributed.checkpoint (`dcp_sync`, and `dcp_async`, its async_save on
a thread), ours in three modes. All save the same weights and AdamW states of the same model, into a folder on the same
disk, between real steps; the arms take turns, each in a fresh folder. `waited` is what the training thread spends in
the save and before the next update; `steps` is how much longer the save and the steps after it take, until all is on
the disk, than as many steps without a save. Only ours reads its files back, digests and publishes them by a rename.
Bar: lazy waits at most a tenth of sync.
"""

import argparse
import os
import shutil
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemWriter
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.checkpoint.state_dict_saver import save as dcp_save

from benchmarks.report import print_table, spread, write_result
from parallel.launch import World
from trainer.build import Trainable, make_trainable
from trainer.checkpoint import CheckpointStore
from trainer.cli.compose import load
from trainer.data.batch import Batch, StepBatch
from trainer.memory import format_bytes
from trainer.model import build_model, model_config
from trainer.saver import Saver
from trainer.schema import CheckpointConfig, SaveMode
from trainer.state import run_tensors, still
from trainer.step import train_step

VOCABULARY = 1024


class Quiet:
    """Stands in for a run's recorder."""

    def notice(self, text: str) -> None: ...

    def beside(self, text: str) -> None: ...

    def warn(self, text: str) -> None:
        print("!", text, flush=True)


@dataclass
class Arm:
    """One way to save. `begin` may return before the files are written; `end` returns when they are."""

    begin: Callable[[dict[str, Any]], None]
    end: Callable[[], None] = lambda: None
    border: Callable[[], None] = lambda: None
    waited: list[float] = field(default_factory=list)
    longer: list[float] = field(default_factory=list)


def training(overrides: list[str], hidden: int, layers: int, device: torch.device) -> Trainable:
    """A LLaMA of the given size, with AdamW."""
    cfg = load([
        f"model.hidden_size={hidden}", f"model.intermediate_size={hidden * 11 // 4}", f"model.layers={layers}",
        f"model.vocab_size={VOCABULARY}", "model.heads=4", "data.sequence_length=128", "train.global_batch=8",
        "train.micro_batch=4", "optim=adamw", "train.steps=1000000", "checkpoint.every=1", *overrides,
    ])  # fmt: skip
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})()
    config = model_config(cfg.model, tokenizer, VOCABULARY)
    model = build_model(cfg.model, config, weights=cfg.precision.weights, device=device, seed=0)
    return make_trainable(cfg, World(device=device), model)


def rows(built: Trainable) -> StepBatch:
    shape = (built.cfg.train.global_batch, built.cfg.data.sequence_length)
    ids = torch.randint(3, VOCABULARY, shape)
    batch = Batch(ids, ids, torch.arange(shape[1]).expand(shape).contiguous())
    return StepBatch(batch.split(built.cfg.train.micro_batch), targets=ids.numel(), first_sample=0)


def arms(built: Trainable, folder: Path) -> dict[str, Arm]:
    """The ways to save `built` below `folder`."""
    found: dict[str, Arm] = {}
    pending: list[Any] = []

    def fresh(name: str) -> Path:
        path = folder / name
        shutil.rmtree(path, ignore_errors=True)
        path.mkdir(parents=True)
        return path

    def torch_save(tensors: dict[str, Any]) -> None:
        with open(fresh("torch_save") / "state.pt", "wb") as file:
            torch.save(tensors, file)
            file.flush()
            os.fsync(file.fileno())

    def dcp_begin(tensors: dict[str, Any]) -> None:
        pending.append(async_save(tensors, storage_writer=FileSystemWriter(fresh("dcp_async"))))

    found["torch_save"] = Arm(torch_save)
    found["dcp_sync"] = Arm(lambda tensors: void(dcp_save(tensors, storage_writer=FileSystemWriter(fresh("dcp_sync")))))
    found["dcp_async"] = Arm(dcp_begin, lambda: pending.pop().result())
    for mode in SaveMode:
        store = CheckpointStore(folder / mode.value, keep=1, verify=True)
        cfg, recorder = CheckpointConfig(mode=mode, keep=1), Quiet()
        saver = Saver(cfg, built.world, store, recorder, built.gate, timeout=600, saved_step=None)  # type: ignore[arg-type]
        found[f"ours_{mode.value}"] = ours(saver, built)
    return found


def wall(device: torch.device) -> float:
    """Seconds on the wall, which a wait takes though it computes nothing; on CUDA once its work is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def void(_: object) -> None:
    """Forget a result."""


def ours(saver: Saver, built: Trainable) -> Arm:
    step = 0

    def begin(tensors: dict[str, Any]) -> None:
        nonlocal step
        step += 1
        saver.save(step, still(tensors, built.model), {"optimizer_numbers": built.engine.numbers()}, last=False)

    return Arm(begin, saver.settle, saver.at_border)


def measure(built: Trainable, arm: Arm, batch: StepBatch, steps: int) -> None:
    """Save once, take `steps` steps, and wait for the end; then take as many without a save."""
    device, waits = built.world.device, [0.0]

    def open_gate() -> None:
        began = time.perf_counter()  # what has been queued is not what is waited for
        gate.__class__.open(gate)
        waits.append(time.perf_counter() - began)

    gate = built.gate
    began = wall(device)
    arm.begin(run_tensors(built.engine, 0, device))
    waits[0] = wall(device) - began
    gate.open = open_gate  # type: ignore[method-assign]
    for _ in range(steps):
        train_step(built, batch, 0, stop=0)
        arm.border()
    del gate.open
    arm.end()
    with_save = wall(device) - began
    began = wall(device)
    for _ in range(steps):
        train_step(built, batch, 0, stop=0)
    arm.waited.append(sum(waits))
    arm.longer.append(with_save - (wall(device) - began))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=3, help="steps after each save")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="torch.distributed is")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    built = training(args.overrides, args.hidden, args.layers, device)
    batch = rows(built)
    for _ in range(2):
        train_step(built, batch, 0, stop=0)
    size = sum(tensor.nbytes for tensor in built.engine.tensors().values())
    began = wall(device)
    train_step(built, batch, 0, stop=0)
    step_seconds = wall(device) - began
    with tempfile.TemporaryDirectory(dir=args.out or Path.cwd(), prefix=".checkpoint-") as folder:
        found = arms(built, Path(folder))
        for turn in range(args.rounds + 1):
            for arm in found.values():
                measure(built, arm, batch, args.steps)
                if turn == 0:  # memory is touched for the first time
                    arm.waited.clear()
                    arm.longer.clear()
    sync = spread(found["ours_sync"].waited)["median"]
    print(f"{format_bytes(size)} of weights and states, a step takes {step_seconds:.2f} s")
    print_table(
        ["arm", "waited s (median)", "min", "max", "of ours_sync", "steps longer by s (median)"],
        [
            [
                name,
                *(f"{value:.3f}" for value in spread(arm.waited).values()),
                f"{spread(arm.waited)['median'] / sync:.3f}",
                f"{spread(arm.longer)['median']:.3f}",
            ]
            for name, arm in found.items()
        ],
    )
    content = {
        "bytes": size,
        "step_seconds": step_seconds,
        "steps_after_a_save": args.steps,
        "rounds": args.rounds,
        "waited_seconds": {name: spread(arm.waited) for name, arm in found.items()},
        "waited_over_sync": {name: spread(arm.waited)["median"] / sync for name, arm in found.items()},
        "longer_seconds": {name: spread(arm.longer) for name, arm in found.items()},
        "bar": {"lazy_over_sync": 0.1, "met": spread(found["ours_lazy"].waited)["median"] <= 0.1 * sync},
    }
    print("written to", write_result("checkpoint", content, args.out))


if __name__ == "__main__":
    main()
