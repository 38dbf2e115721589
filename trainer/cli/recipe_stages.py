"""Arms that begin with the weights of another arm: the command line of each, checked before there are any weights."""

import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from trainer.check_model import longest_sequence
from trainer.cli.compose import load
from trainer.cli.overrides import quote
from trainer.cli.recipe_jobs import Job
from trainer.recipes import RECIPES, Arm, Recipe
from trainer.rope.config import RopeType
from trainer.schema import Config, ModelConfig

EXPORTED = "exported"
"""Folder beside a run's files with its weights as transformers reads them."""


def exported(batch: Path, arm: Arm, seed: int) -> Path | None:
    """Return the folder of the weights that a run of `arm` begins with; None where it draws its own."""
    return None if arm.after is None else batch / f"{arm.after}-seed{seed}" / EXPORTED


def with_exports(runs: list[Job]) -> list[Job]:
    """Put before the first run that begins with the weights of another what writes them, unless that was done."""
    found: list[Job] = []
    for run in runs:
        if (
            run.needs is not None
            and not run.needs.exists()
            and run.needs not in [Path(job.arguments[-1]) for job in found]
        ):
            before = run.needs.parent
            export = ["export", str(before), str(run.needs)]
            found.append(Job(f"exporting {before}", export, needs=before / "summary.json", log=run.log))
        found.append(run)
    return found


def arguments(
    recipe: Recipe, arm: Arm, seed: int, overrides: list[str], folder: Path, weights: Path | None
) -> list[str]:
    """Return the command line of one run; the user's overrides win over the arm's.

    Args:
        folder: of the run.
        weights: exported ones of the arm before; None for an arm that draws its own.
    """
    asked = recipe.name if recipe.folder.parent == RECIPES else str(recipe.folder)
    begins = ["model=hf", f"model.path={quote(str(weights))}"] if weights is not None else []
    return [
        f"recipe={quote(asked)}", *begins, *arm.overrides, *overrides, f"seed={seed}", f"run.dir={quote(str(folder))}"
    ]  # fmt: skip


def check_arms(recipe: Recipe, seeds: Sequence[int], overrides: list[str], folder: Path) -> None:
    """Compose and check every run of a recipe, on as many ranks as it will have.

    Args:
        folder: where runs would be.

    Raises:
        UserError: names every problem of the first run that has one.
    """
    with tempfile.TemporaryDirectory(prefix="stowage-") as trained:
        for seed in seeds:
            for name, arm in recipe.claim.arms.items():
                weights = Path(trained) / arm.after if arm.after is not None else None
                with launched(arm.ranks):
                    cfg = load(arguments(recipe, arm, seed, overrides, folder / name, weights))
                stand_in(Path(trained) / name, cfg)


def stand_in(folder: Path, cfg: Config) -> None:
    """Write what a check asks of the model that a run of `cfg` would leave."""
    folder.mkdir(exist_ok=True)
    known = {
        "max_position_embeddings": longest_sequence(cfg.model),
        "hidden_size": cfg.model.hidden_size,
        "rope_parameters": positions(cfg.model),
    }
    (folder / "config.json").write_text(json.dumps({key: value for key, value in known.items() if value}))
    (folder / "model.safetensors").write_bytes(b"-")


def positions(model: ModelConfig) -> dict[str, object]:
    """Return how the trained model's positions will be scaled, as its config.json will say."""
    rope, longest = model.rope, longest_sequence(model)
    if rope.type is RopeType.linear:
        return {"rope_type": "linear", "factor": rope.times}
    if longest is None or rope.type not in (RopeType.yarn, RopeType.llama3, RopeType.longrope):
        return {}
    return {"rope_type": rope.type.value, "original_max_position_embeddings": round(longest / rope.times)}


@contextmanager
def launched(ranks: int) -> Iterator[None]:
    """Let configurations be checked as under a launcher of `ranks` processes."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = str(ranks)
    try:
        yield
    finally:
        del os.environ["WORLD_SIZE"]
        if before is not None:
            os.environ["WORLD_SIZE"] = before
