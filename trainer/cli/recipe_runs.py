"""Running a recipe: every arm and seed in a process of its own, and the files that show what came out."""

import csv
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from trainer.cli import store
from trainer.cli.recipe_jobs import Job, run_jobs
from trainer.cli.recipe_stages import arguments, check_arms, exported, with_exports
from trainer.errors import UserError
from trainer.metrics import read_metrics
from trainer.recipes import Arm, Recipe

RESULTS = "runs.jsonl"


@dataclass(frozen=True)
class Measured:
    """The runs of one `recipe run`."""

    runs: dict[tuple[str, int], dict[str, Any]]
    """(arm, seed) -> summary.json."""
    seeds: list[int]
    overrides: list[str]
    """What the user changed in every arm."""


def measure(
    recipe: Recipe, seeds: Sequence[int], overrides: list[str], out: Path, *, resume: bool = False, jobs: int = 1
) -> None:
    """Run every arm with every seed and append one line each to `out`/runs.jsonl.

    Beside it: resolved.yaml, versions.txt and loss.csv of these runs, and their run folders. All arms of a seed come
    before the next seed, so that a batch that is interrupted can be compared as far as it came.

    Args:
        resume: go on with the newest batch of `out`: runs that are in runs.jsonl are not run again, one that was
            interrupted goes on from its last checkpoint.
        jobs: runs at a time, on the same device; what each prints is then in a file beside its folder.

    Raises:
        UserError: there is nothing to go on with, or the recipe is another than that batch's.
        UserError, TrainingStopped, Interrupted: as the first run that does not finish.
    """
    plan = [(name, arm, seed) for seed in seeds for name, arm in recipe.claim.arms.items()]
    check_arms(recipe, seeds, overrides, out / "check")  # all mistakes before the first minute is spent
    batch = newest_batch(out, recipe, overrides) if resume else time.strftime("%Y-%m-%d_%H-%M-%S")
    done = finished(out, batch)
    out.mkdir(parents=True, exist_ok=True)
    (out / "resolved.yaml").write_text(resolved(recipe, overrides))

    def job(number: int, name: str, arm: Arm, seed: int) -> Job:
        folder = out / batch / f"{name}-seed{seed}"
        weights = exported(out / batch, arm, seed)
        title = f"{recipe.name}: run {number} of {len(plan)}, arm {name}, seed {seed}"

        def note(seconds: float) -> None:
            print(f"{title}: done in {seconds:.0f} s", flush=True)
            line = {
                "batch": batch,
                "arm": name,
                "seed": seed,
                "overrides": overrides,
                "wall_seconds": round(seconds, 1),
            }
            write_down(out, batch, folder, line)

        log = folder.with_suffix(".log") if jobs > 1 else None
        return Job(title, arguments(recipe, arm, seed, overrides, folder, weights), arm.ranks, weights, log, note)

    numbered = enumerate(plan, 1)
    runs = [job(n, name, arm, seed) for n, (name, arm, seed) in numbered if (name, seed) not in done]
    run_jobs(with_exports(runs), jobs)


def write_down(out: Path, batch: str, folder: Path, line: dict[str, Any]) -> None:
    """Add a finished run to the files of `out`."""
    line = {**line, "summary": json.loads((folder / "summary.json").read_text())}
    with (out / RESULTS).open("a") as file:
        file.write(json.dumps(line) + "\n")
    write_curves(out / "loss.csv", {run: out / batch / f"{run[0]}-seed{run[1]}" for run in finished(out, batch)})
    (out / "versions.txt").write_text(versions(folder))


def newest_batch(out: Path, recipe: Recipe, overrides: list[str]) -> str:
    """Return the name of the batch that was begun last in `out`.

    Raises:
        UserError: nothing was begun there, or with another configuration.
    """
    begun = sorted(folder.parent.name for folder in out.glob("*/*-seed*") if folder.is_dir())
    again = f"run it without --resume, or into another --out: stowage recipe run {recipe.name}"
    if not begun:
        raise UserError(f"--resume: no runs of {recipe.name} lie in {out}; {again}")
    before = out / "resolved.yaml"
    if not before.is_file() or before.read_text() != resolved(recipe, overrides):
        raise UserError(f"--resume: {before} is not what the recipe and the options given now amount to; {again}")
    return begun[-1]


def finished(out: Path, batch: str) -> list[tuple[str, int]]:
    """Return arm and seed of the runs of `batch` that runs.jsonl holds, in its order."""
    path = out / RESULTS
    lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()] if path.is_file() else []
    return [(line["arm"], int(line["seed"])) for line in lines if line["batch"] == batch]


def read_results(out: Path, recipe: Recipe) -> Measured:
    """Read the newest batch of `out`/runs.jsonl.

    Raises:
        UserError: nothing has been measured there, or the file is damaged.
    """
    path = out / RESULTS
    if not path.is_file():
        raise UserError(f"{path}: no such file, so there is nothing to check; first `stowage recipe run {recipe.name}`")
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines() if line.strip()]
        newest = [line for line in lines if line["batch"] == lines[-1]["batch"]]
        runs = {(line["arm"], int(line["seed"])): dict(line["summary"]) for line in newest}
        seeds = sorted({seed for _, seed in runs})
        return Measured(runs, seeds, list(newest[-1]["overrides"]))
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise UserError(
            f"{path}: is not a list of runs ({type(error).__name__}: {error}); run the recipe again"
        ) from error


def resolved(recipe: Recipe, overrides: list[str]) -> str:
    """Return the whole configuration, defaults included; paths inside the repository stay relative to it."""
    name = store.add_recipe(str(recipe.folder))
    return str(OmegaConf.to_yaml(store.composed([f"recipe={name}", *overrides]), resolve=False))


def write_curves(path: Path, folders: dict[tuple[str, int], Path]) -> None:
    """Write the losses of every logged step of every run."""
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["arm", "seed", "step", "loss", "eval_loss"])
        for (arm, seed), folder in folders.items():
            for record in read_metrics(folder / "metrics.jsonl"):
                writer.writerow([arm, seed, record["step"], record.get("loss", ""), record.get("eval_loss", "")])


def versions(run: Path) -> str:
    """Return what a run ran on, one `name value` a line."""
    found = json.loads((run / "environment.json").read_text())
    lines = [f"{name} {found[name]}" for name in ("python", "platform", "cpu", "cuda", "driver") if found.get(name)]
    lines += [f"gpu {gpu['name']}" for gpu in found.get("gpus", [])]
    lines += [f"commit {found['git']['commit']}"] if found.get("git") else []
    return "\n".join([*lines, *(f"{name} {number}" for name, number in found.get("libraries", {}).items())]) + "\n"
