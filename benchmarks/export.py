"""What it takes to make a Hugging Face folder of a sharded run's checkpoint.

    python -m benchmarks.export [--model llama_1b] [--folder DIR]      # three times the model's bytes on that disk

Arms: `stowage export`, and `load and save`, which builds the model, loads the checkpoint and calls save_pretrained, as
scripts that merge shards do. Both read the same checkpoint, in bf16, of `--ranks` ranks with rows each, and write the
same files. Each in a process of its own: seconds, and the most memory of it that no file stands behind (RssAnon; what
is mapped from files the system takes back when it needs it), less what it held before.
Bar: `stowage export` holds no more than two of the files it writes (of 2 GB each at most), or half the model.
"""

import argparse
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing as mp
from torch.distributed.tensor import DTensor

from benchmarks.ranks import on_ranks
from benchmarks.report import print_table, write_result
from parallel.launch import World, connected
from parallel.mesh import make_grid
from trainer.checkpoint import CheckpointStore
from trainer.checkpoint.checkpoint import TensorInfo
from trainer.cli.compose import load, load_saved
from trainer.data.tokenizer import load_tokenizer
from trainer.export import SHARD, export_run, in_file
from trainer.finished import load_model, open_checkpoint, open_run
from trainer.folder import RunFolder, identity, save_config
from trainer.memory import format_bytes
from trainer.model import build_model
from trainer.plan import planned_config
from trainer.schema import Config
from trainer.state import model_tensors

GB = 10**9


def overrides(model: str, folder: Path) -> list[str]:
    return [
        f"model={model}", "precision=bf16_pure", "parallel.zero=3", "optim=sgd", "run.device=cpu", "run.threads=1",
        f"run.dir={folder}",
    ]  # fmt: skip


def shapes(cfg: Config) -> dict[str, torch.Size]:
    """Of the weights, by their names in a checkpoint."""
    model = build_model(
        cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=torch.device("meta"), seed=0
    )
    return {name: tensor.shape for name, tensor in model_tensors(model).items()}


def write_checkpoint(model: str, folder: Path) -> None:
    """On each rank: save rows of zeros that lie in files, so that nobody needs the memory of the model."""
    cfg = load(overrides(model, folder))
    with connected(cfg.parallel, "cpu", 1) as world, tempfile.TemporaryDirectory(dir=folder) as mapped:
        grid = make_grid(world, cfg.parallel)
        tensors: dict[str, DTensor] = {}
        for place, (name, shape) in enumerate(shapes(cfg).items()):
            rows = grid.rows(shape[0])
            info = TensorInfo((rows.stop - rows.start, *shape[1:]), torch.bfloat16)
            tensors[name] = grid.wrap(in_file(Path(mapped) / f"{world.process_rank}.{place}", info), shape)
        store = CheckpointStore(RunFolder(folder).checkpoints, keep=0, verify=True, group=world.control)
        store.check_writable()
        store.save(1, tensors, {"identity": identity(cfg)})
        if world.leads:
            save_config(cfg, RunFolder(folder).config)
            load_tokenizer(cfg.data.tokenizer).save_pretrained(RunFolder(folder).tokenizer)


def by_export(run: Path, target: Path) -> None:
    export_run(run, target, None)


def by_load_and_save(run: Path, target: Path) -> None:
    folder = open_run(run)
    model: Any
    model, tokenizer = load_model(load_saved(folder.config), folder, open_checkpoint(folder, None, World()), World())
    model.save_pretrained(target, max_shard_size=SHARD)
    tokenizer.save_pretrained(target)


ARMS: dict[str, Callable[[Path, Path], None]] = {"stowage export": by_export, "load and save": by_load_and_save}


def anonymous() -> int:
    """Bytes of this process that no file stands behind and that are in memory just now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("RssAnon"))


@contextmanager
def sampled(most: list[int]) -> Iterator[None]:
    """Append to `most` the largest of what `anonymous` returns meanwhile, looked at every 10 ms."""
    ended, seen = threading.Event(), [anonymous()]

    def look() -> None:
        while not ended.wait(0.01):
            seen.append(max(seen.pop(), anonymous()))

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()
        most.append(seen[0])


def measured(name: str, run: Path, target: Path, found: Any) -> None:
    """In a process of its own."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    before, most = anonymous(), []
    began = time.perf_counter()
    with sampled(most):
        ARMS[name](run, target)
    files = [path.stat().st_size for path in target.glob("*.safetensors")]
    found[name] = {
        "seconds": time.perf_counter() - began,
        "held": most[0] - before,
        "files": len(files),
        "largest_file": max(files),
        "written": sum(files),
    }


def measure(model: str, ranks: int, folder: Path) -> dict[str, Any]:
    run = folder / "run"
    run.mkdir()
    on_ranks(ranks, write_checkpoint, model, run)
    context = mp.get_context("spawn")
    with context.Manager() as manager:
        found = manager.dict()
        for name in ARMS:
            process = context.Process(target=measured, args=(name, run, folder / "exported", found))
            process.start()
            process.join()
            assert process.exitcode == 0, f"{name} ended with {process.exitcode}"
            shutil.rmtree(folder / "exported")
        arms = dict(found)
    ours = arms["stowage export"]
    most = min(2 * ours["largest_file"], ours["written"] // 2) + GB // 10
    return {
        "model": model, "ranks": ranks, "arms": arms,
        "bars": {"held": {"found": ours["held"], "at_most": most, "met": ours["held"] <= most}},
    }  # fmt: skip


def show(found: dict[str, Any]) -> None:
    print(f"\n{found['model']}, bf16, saved by {found['ranks']} ranks with rows each")
    head = ["arm", "seconds", "most held", "files", "largest", "written"]
    rows = [
        [name, f"{arm['seconds']:.0f}", format_bytes(arm["held"]), str(arm["files"]),
         format_bytes(arm["largest_file"]), format_bytes(arm["written"])]
        for name, arm in found["arms"].items()
    ]  # fmt: skip
    print_table(head, rows)
    bar = found["bars"]["held"]
    verdict = "met" if bar["met"] else "MISSED"
    print(f"bar {verdict}: it holds {format_bytes(bar['found'])}, at most {format_bytes(bar['at_most'])}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="llama_1b", help="one of `stowage train --help`'s (default llama_1b)")
    parser.add_argument("--ranks", type=int, default=2, help="that saved the checkpoint (default 2)")
    parser.add_argument("--folder", type=Path, help="where there is room; default the system's for temporary files")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        found = measure(args.model, args.ranks, Path(folder))
    show(found)
    print("written to", write_result("export", found, args.out))


if __name__ == "__main__":
    main()
