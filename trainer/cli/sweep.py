"""`stowage train -m`: Hydra's own multirun, with its sweeper and launcher, and one run folder for each job.

Every job that can be foreseen is checked before the first one starts. A job that fails leaves the others running; an
interrupt ends the sweep. Hydra's files and log lines are kept out of the way.
"""

import itertools
import json
import os
import shutil
import sys
import time
import traceback
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Override, ValueType
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from trainer import check, check_machine
from trainer.cli import store
from trainer.cli.compose import as_object, conclude, judge, message, text
from trainer.cli.main import leads, report
from trainer.cli.overrides import Findings, parse, quote, split
from trainer.errors import TrainingStopped, UserError
from trainer.schema import Config
from trainer.signals import Interrupted

QUIET = ["hydra.output_subdir=null", "hydra/job_logging=none", "hydra/hydra_logging=none"]
OUTCOMES = ".sweep"
"""Folder inside the sweep's own for what only this file needs; removed at the end."""


@dataclass(frozen=True)
class Outcome:
    """How a job ended."""

    number: int
    overrides: list[str]
    folder: str
    exit_code: int
    problem: str = ""


def sweep(overrides: list[str]) -> int:
    """Run every job of a sweep and print a table of them; return the first exit code that isn't 0."""
    found = Findings()
    groups, values = split(parse(overrides, found), found, sweep=True)
    if found.problems:
        raise UserError(message(found.problems))
    asked = [override for override in [*groups, *values] if not override.key_or_group.startswith("hydra")]
    first = check_jobs(jobs(asked))
    base = sweep_folder(first)
    (base / OUTCOMES).mkdir(parents=True, exist_ok=True)
    try:
        interrupted = launch([text(override) for override in [*groups, *values]], base)
        outcomes = read_outcomes(base / OUTCOMES)
    finally:
        shutil.rmtree(base / OUTCOMES, ignore_errors=True)
    if leads():
        swept = [override.key_or_group for override in asked if override.is_sweep_override()]
        print_table(outcomes, swept, base)
    return interrupted or next((outcome.exit_code for outcome in outcomes if outcome.exit_code), 0)


def jobs(asked: list[Override]) -> list[list[str]]:
    """Return the overrides of each job, without sweeps that only Hydra's sweeper can spread out (glob, interval)."""
    spread = []
    for override in asked:
        if not override.is_sweep_override():
            spread.append([str(override.input_line)])
        elif override.is_discrete_sweep() and override.value_type is not ValueType.GLOB_CHOICE_SWEEP:
            spread.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
    return [list(job) for job in itertools.product(*spread)]


def check_jobs(lists: list[list[str]]) -> Config:
    """Check every job and return the first one's configuration.

    Raises:
        UserError: every problem of any job, each once.
    """
    judged = [judge(overrides) for overrides in lists]
    problems = dict.fromkeys(problem for _, found in judged for problem in found)
    first = judged[0][0]
    if problems or first is None:
        raise UserError(message(list(problems)))
    return first


def sweep_folder(first: Config) -> Path:
    """Return the folder that holds the run folders 0, 1, ... of the jobs."""
    if first.run.dir is not None:
        return Path(first.run.dir).absolute()
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("-m over several ranks: needs run.dir=PATH, so that all ranks write into the same folders")
    return (Path("runs") / first.run.name / time.strftime("%Y-%m-%d_%H-%M-%S_sweep")).absolute()


def launch(overrides: list[str], base: Path) -> int:
    """Hand over to Hydra. Return 0, or the exit code of the interrupt that ended the sweep."""

    def job(cfg: DictConfig) -> None:
        own = HydraConfig.get()
        outcome = run_job(cfg, base / str(own.job.num), int(own.job.num), list(own.overrides.task))
        (base / OUTCOMES / f"{outcome.number}.json").write_text(json.dumps(asdict(outcome)))
        if outcome.exit_code in (130, 143):
            raise SystemExit(outcome.exit_code)  # Hydra catches every Exception and would start the next job

    store.register()
    before = sys.argv
    os.environ["HYDRA_FULL_ERROR"] = "1"  # our errors come back as they are, not as Hydra's text and exit code 1
    sys.argv = ["stowage", f"hydra.sweep.dir={quote(str(base / OUTCOMES))}", *QUIET, *overrides, "--multirun"]
    try:
        hydra.main(version_base="1.3", config_path=str(store.CONFIGS), config_name=store.MAIN)(job)()
    except SystemExit as end:
        return int(end.code or 0)
    finally:
        sys.argv = before
    return 0


def run_job(cfg: DictConfig, folder: Path, number: int, overrides: list[str]) -> Outcome:
    """Run one job in `folder`; whatever ends it early becomes part of the outcome."""

    def ended(exit_code: int, problem: object = "") -> Outcome:
        return Outcome(number, overrides, str(folder), exit_code, str(problem))

    try:
        from trainer.run import run

        config = checked(cfg, folder)
        check_machine.check_hardware(config)
        run(config)
        return ended(0)
    except (UserError, TrainingStopped, Interrupted) as error:
        report(error)
        return ended(error.exit_code, error)
    except KeyboardInterrupt:
        return ended(130, "interrupted")
    except Exception as error:
        traceback.print_exc()
        return ended(1, f"{type(error).__name__}: {error}")


def checked(cfg: DictConfig, folder: Path) -> Config:
    """Return a job's configuration with its own run folder, checked: a sweeper may have chosen values only now."""
    found = Findings()
    config = as_object(cfg, found)
    if config is not None:
        config.run.dir = str(folder)
        conclude(found, [*check.problems(config), *check.start_problems(config)])
    if config is None or found.problems:
        raise UserError(message(found.problems))
    return config


def read_outcomes(folder: Path) -> list[Outcome]:
    return sorted((Outcome(**json.loads(p.read_text())) for p in folder.glob("*.json")), key=lambda o: o.number)


def print_table(outcomes: list[Outcome], swept: list[str], base: Path) -> None:
    """Print one line a job: what differed, and what came out."""
    table = Table(title=f"Sweep in {base}", title_justify="left", box=None, pad_edge=False)
    for column in ("job", *swept):
        table.add_column(column)
    for column in ("held-out loss", "perplexity", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for outcome in outcomes:
        given = dict(override.split("=", 1) for override in outcome.overrides if "=" in override)
        figures = summary(Path(outcome.folder))
        numbers = [figures.get(name) for name in ("eval_loss", "eval_perplexity", "tokens_per_second")]
        cells = ["" if number is None else f"{number:.5g}" for number in numbers]
        result = "done" if outcome.exit_code == 0 else f"exit {outcome.exit_code}: {outcome.problem.splitlines()[0]}"
        table.add_row(str(outcome.number), *(given.get(key, "") for key in swept), *cells, result)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def summary(folder: Path) -> dict[str, Any]:
    """Return the figures a finished run left, none if it didn't finish."""
    path = folder / "summary.json"
    content = json.loads(path.read_text()) if path.is_file() else {}
    return content if isinstance(content, dict) else {}
