"""`stowage recipe`: list them, show one, run one, hold its runs against its claim."""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from trainer import recipes
from trainer.cli.recipe_runs import Measured, measure, read_results
from trainer.cli.runs import Arguments
from trainer.errors import UserError
from trainer.nearest import hint
from trainer.recipes import Arm, Recipe, Verdict

DESCRIPTION = """Reproductions: a configuration, what it is claimed to give, and a check that it does.

  stowage recipe list
  stowage recipe show quickstart
  stowage recipe run quickstart                    every arm and seed, each in a process of its own
  stowage recipe run quickstart --seeds 0,1 train.steps=100
  stowage recipe run lowrank_vs_adamw --arms adamw,galore    some arms; --resume adds others
  stowage recipe run quickstart --resume           go on with a batch that was interrupted
  stowage recipe run lowrank_vs_adamw --jobs 8     eight runs at a time, each on a part of a GPU
  stowage recipe check quickstart                  exit code 1 if the last run falls short

A recipe is a name from the list or a folder with config.yaml (an overlay) and claim.yaml."""

ACTIONS = ("list", "show", "run", "check")


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    if asked.action == "list":
        return list_recipes()
    if not asked.name:
        raise UserError(f"stowage recipe {asked.action}: needs a NAME; known: {', '.join(recipes.names())}")
    recipe = recipes.read(asked.name)
    out = asked.out or Path("runs") / "recipes" / recipe.name
    if asked.action == "show":
        return show(recipe)
    if asked.action == "run":
        seeds = asked.seeds or recipe.claim.seeds
        measure(chosen(recipe, asked.arms), seeds, asked.overrides, out, resume=asked.resume, jobs=asked.jobs)
        return judge(recipe, read_results(out, recipe), out)
    return judge(recipe, read_results(out, recipe), out)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Arguments("recipe", DESCRIPTION)
    parser.add_argument("action", metavar="ACTION", help=", ".join(ACTIONS))
    parser.add_argument("name", nargs="?", metavar="NAME", help="recipe, by name or by folder")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="run: changes to every arm, noted beside it")
    parser.add_argument("--arms", metavar="A,B", help="run: these arms of the claim only; default all")
    parser.add_argument("--seeds", type=seed_list, metavar="0,1,2", help="run: seeds instead of the claim's own")
    parser.add_argument("--out", type=Path, metavar="DIR", help="run, check: results; default runs/recipes/NAME")
    parser.add_argument("--resume", action="store_true", help="run: only what the newest batch of DIR still lacks")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="run: as many runs at a time; default 1")
    asked = parser.parse_intermixed_args(arguments)
    if asked.action not in ACTIONS:
        near = hint(asked.action, ACTIONS)
        raise UserError(f"stowage recipe {asked.action}: no such action; {near}Known: {', '.join(ACTIONS)}")
    if asked.jobs < 1:
        raise UserError(f"stowage recipe {asked.action}: --jobs {asked.jobs}: at least one run at a time; use --jobs 1")
    options = {"--arms": asked.arms, "--seeds": asked.seeds, "--resume": asked.resume, "--jobs": asked.jobs != 1}
    extra = [*asked.overrides, *(option for option, given in options.items() if given)]
    if asked.action != "run" and extra:
        raise UserError(
            f"stowage recipe {asked.action}: {' '.join(extra)} has an effect on `recipe run` alone; leave it out"
        )
    return asked


def seed_list(text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no list of whole numbers such as 0,1,2") from None


def chosen(recipe: Recipe, arms: str | None) -> Recipe:
    """Return the recipe with the named arms alone.

    Raises:
        UserError: there is no arm of a name, or one that begins with the weights of an arm left out.
    """
    if arms is None:
        return recipe
    names, known = arms.split(","), recipe.claim.arms
    for name in names:
        if name not in known:
            near = hint(name, known)
            raise UserError(f"--arms {name}: {recipe.name} has no such arm; {near}Known: {', '.join(known)}")
        before = known[name].after
        if before is not None and before not in names:
            raise UserError(f"--arms {arms}: {name} begins with the weights of {before}; add it: {before},{arms}")
    kept = {name: arm for name, arm in known.items() if name in names}
    return replace(recipe, claim=replace(recipe.claim, arms=kept))


def list_recipes() -> int:
    table = Table(box=None, pad_edge=False, show_header=False)
    for name in recipes.names():
        table.add_row(name, recipes.read(name).claim.claim)
    console().print(table)
    return 0


def show(recipe: Recipe) -> int:
    """Print claim, arms and checks, and the figures that came with the recipe."""
    claim, out = recipe.claim, console()
    out.print(f"{recipe.name}: {claim.claim}", markup=False)
    out.print(f"\n{recipe.folder}\nseeds {', '.join(map(str, claim.seeds))}; arms:", markup=False)
    for name, arm in claim.arms.items():
        out.print(f"  {name}: {command(recipe, arm)}", markup=False)
    out.print("checks:")
    for check in claim.checks:
        out.print(f"  {check.name}: {check.promise}", markup=False)
    out.print("\nconfig.yaml:")
    out.print((recipe.folder / "config.yaml").read_text(), markup=False)
    return 0


def command(recipe: Recipe, arm: Arm) -> str:
    """Return what runs an arm by hand."""
    start = f"torchrun --nproc-per-node {arm.ranks} -m trainer" if arm.ranks > 1 else "stowage train"
    begins = ["model=hf", f"model.path=EXPORT_OF_{arm.after}"] if arm.after is not None else []
    return " ".join([start, f"recipe={recipe.name}", *begins, *arm.overrides])


def judge(recipe: Recipe, measured: Measured, folder: Path) -> int:
    """Print expected, measured and spread; return 1 if the claim does not hold, else 0."""
    verdicts = recipe.judge(measured.runs, measured.seeds)
    out = console()
    out.print(figures_table(recipe, measured))
    out.print()
    out.print(verdict_table(verdicts))
    if measured.overrides:
        out.print(f"\nThese runs differ from the recipe: {' '.join(measured.overrides)}", markup=False)
    held = all(verdict.holds for verdict in verdicts)
    out.print(f"\n{recipe.name}: {'the claim holds' if held else 'the claim does NOT hold'} ({folder})", markup=False)
    return 0 if held else 1


def figures_table(recipe: Recipe, measured: Measured) -> Table:
    """One line a run."""
    table = Table(box=None, pad_edge=False)
    for column in ("arm", "seed"):
        table.add_column(column)
    for metric in recipe.claim.metrics:
        table.add_column(metric, justify="right")
    for (arm, seed), summary in sorted(measured.runs.items()):
        figures = [recipes.figure(summary, metric) for metric in recipe.claim.metrics]
        table.add_row(arm, str(seed), *("" if value is None else f"{value:,.6g}" for value in figures))
    return table


def verdict_table(verdicts: list[Verdict]) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in ("check", "expected", "measured", "spread", "seeds", ""):
        table.add_column(column)
    for verdict in verdicts:
        mean = "not measured" if verdict.mean is None else f"{verdict.mean:.4g}"
        spread = "" if verdict.spread is None else f"± {verdict.spread:.2g}"
        result = "holds" if verdict.holds else "FALLS SHORT" if verdict.complete else "INCOMPLETE"
        table.add_row(verdict.check.name, verdict.check.promise, mean, spread, str(len(verdict.values)), result)
    return table


def console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)
