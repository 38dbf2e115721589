"""Held-out perplexity with the authors' packages and with ours, from the same weights on the same rows.

    python -m benchmarks.authors [--steps 1000] [--seeds 0,1,2] [--jobs 2] [OPTION=VALUE ...]

One plain loop for all: clipping, a cosine of rates with warmup, `optimizer.step()`. Only the optimizer differs: the
authors' class, and ours as it is by default (with `compat="authors"` it follows theirs step for step, which
tests/test_benchmarks.py holds it to). The ratios are seed by seed. Bar: at most 0.5 % above the authors'.
"""

import argparse
import importlib
import multiprocessing
import statistics
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import print_table, write_result
from trainer.cli.recipe import seed_list

BASE = ["recipe=lowrank_vs_adamw", "train.global_batch=8", "train.micro_batch=8"]
SHARED = ("rank", "update_proj_gap", "scale", "proj_type")
RANDOM = {"proj": "random", "scale_type": "channel"}
METHODS: dict[str, tuple[list[str], list[str], str, str, dict[str, Any]]] = {
    "galore": (
        ["optim=galore", "optim.lr=2e-2", "optim.update_proj_gap=50"],
        ["optim.refresh=svd"], "galore_torch", "GaLoreAdamW", {},
    ),
    "apollo": (
        ["optim=apollo", "optim.lr=1e-2", "optim.update_proj_gap=50"],
        [], "apollo_torch", "APOLLOAdamW", RANDOM,
    ),
}  # fmt: skip
"""By name: our options, what `compat=authors` wants beside them, the authors' module and class, and what their groups
want beside SHARED."""
ARMS = ("authors", "default")
COMPAT = "compat=authors"
EPS = 1e-6
"""The authors' default, which they add to the root of the uncorrected v; ours is 1e-8, added after the correction."""
BAR = 0.005


def theirs(groups: list[dict[str, Any]], lr: float, method: str) -> torch.optim.Optimizer:
    """The authors' optimizer over our groups."""
    _, _, module, kind, more = METHODS[method]
    own = [
        {"params": [p for _, p in group["params"]]}
        | ({key: group[key] for key in SHARED} | more if group.get("rank") is not None else {})
        for group in groups
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found: torch.optim.Optimizer = getattr(importlib.import_module(module), kind)(own, lr=lr)
    return found


def trained(method: str, arm: str, seed: int, overrides: list[str]) -> float:
    """Held-out perplexity after one run."""
    from optim import registry
    from optim.schedule import multiplier, scale_rates
    from parallel.launch import World
    from trainer.build import build_parts
    from trainer.cli.compose import load
    from trainer.data.stream import TrainStream, heldout_batches
    from trainer.evaluate import evaluate
    from trainer.loss.head import HeadLoss
    from trainer.state import seed_all

    torch.set_num_threads(1)
    options, with_compat, *_ = METHODS[method]
    more = ["optim.compat=authors", f"optim.eps={EPS}", *with_compat] if arm == COMPAT else []
    cfg = load([*BASE, *options, *more, f"seed={seed}", *overrides])
    world = World(device=torch.device("cpu"))
    seed_all(seed, rank=0)
    corpus, _, model = build_parts(cfg, world)
    named = list(model.named_parameters())
    if arm != "authors":
        optimizer: Any = registry.build(cfg.optim, named)
    else:
        optimizer = theirs(registry.groups(cfg.optim, named), cfg.optim.lr, method)
    batch, micro, loss_of = cfg.train.global_batch, cfg.train.micro_batch, HeadLoss(model, cfg.loss)
    stream = TrainStream(
        corpus.train, seed=seed, global_batch=batch, micro_batch=micro, process_rank=0, process_count=1
    )
    for step in range(cfg.train.steps):
        drawn = next(stream)
        for part in drawn.micros:
            logits = model(input_ids=part.input_ids, position_ids=part.position_ids, use_cache=False).logits
            total = torch.nn.functional.cross_entropy(logits.flatten(0, 1), part.labels.flatten(), reduction="sum")
            (total / drawn.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        scale_rates(optimizer, multiplier(cfg.schedule, step, cfg.train.steps))
        optimizer.step()
        optimizer.zero_grad()
    rows = heldout_batches(corpus.heldout, micro_batch=micro, process_rank=0, process_count=1, limit=cfg.data.eval_rows)
    return evaluate(model, loss_of, rows, world, cfg.precision).perplexity


def measure(methods: list[str], seeds: list[int], jobs: int, overrides: list[str]) -> dict[str, Any]:
    """Train every arm with every seed, and compare."""
    runs = [(method, arm, seed) for seed in seeds for method in methods for arm in ARMS]
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        waiting = {run: pool.submit(trained, *run, overrides) for run in runs}
        found: dict[str, dict[str, dict[str, float]]] = {method: {arm: {} for arm in ARMS} for method in methods}
        for (method, arm, seed), job in waiting.items():
            found[method][arm][str(seed)] = job.result()
            print(f"{method}, {arm}, seed {seed}: {found[method][arm][str(seed)]:.4f}", flush=True)
    ratios = {
        method: [each["default"][seed] / each["authors"][seed] for seed in each["default"]]
        for method, each in found.items()
    }
    print_table(
        ["method", *ARMS, "default over authors, seed by seed", "mean"],
        [
            [
                method,
                *(f"{statistics.fmean(each[arm].values()):.4f}" for arm in ARMS),
                ", ".join(f"{ratio:.4f}" for ratio in ratios[method]),
                f"{statistics.fmean(ratios[method]):.4f}",
            ]
            for method, each in found.items()
        ],
    )
    bars = {}
    for method, each in ratios.items():
        mean = statistics.fmean(each)
        bars[method] = {"at_most": 1 + BAR, "found": mean, "met": mean <= 1 + BAR}
    return {"overrides": overrides, "seeds": seeds, "perplexity": found, "over_authors": ratios, "bars": bars}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", default=",".join(METHODS), help=f"of {', '.join(METHODS)}; default all")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seeds", type=seed_list, default=[0, 1, 2], help="(0,1,2)")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each (2)")
    parser.add_argument("--out", type=Path, help="folder for the JSON; default benchmarks/results")
    parser.add_argument("overrides", nargs="*", help="options of `stowage train`")
    args = parser.parse_args()
    methods = args.methods.split(",")
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        parser.error(f"--methods {unknown[0]}: known are {', '.join(METHODS)}")
    found = measure(methods, args.seeds, args.jobs, [f"train.steps={args.steps}", *args.overrides])
    print("written to", write_result("authors", found, args.out))


if __name__ == "__main__":
    main()
