"""What `stowage eval` and `stowage export` share: arguments of a sub-command, and finding a run."""

import argparse
from pathlib import Path
from typing import NoReturn

from trainer.errors import UserError
from trainer.nearest import hint


class Arguments(argparse.ArgumentParser):
    """An argument parser whose errors are one message, exit code 2."""

    def __init__(self, command: str, description: str) -> None:
        super().__init__(
            prog=f"stowage {command}",
            description=description,
            formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=100),
            allow_abbrev=False,
        )

    def error(self, message: str) -> NoReturn:
        message = message.replace(", key=value", "")  # argparse counts optional overrides among what is required
        raise UserError(f"{self.prog}: {message}; {' '.join(self.format_usage().split())} (--help says more)")


def add_run(parser: Arguments) -> None:
    parser.add_argument("run", type=Path, metavar="RUN", help="run folder, or a folder of runs, whose newest is taken")
    parser.add_argument("--step", type=int, metavar="N", help="checkpoint of this step; default: the newest good one")


def find_run(given: Path) -> Path:
    """Return the run folder that is meant: `given`, or the newest run in it, those of a sweep included.

    Raises:
        UserError: there is none.
    """
    if (given / "config.yaml").is_file():
        return given
    if not given.is_dir():
        beside = [entry.name for entry in given.parent.iterdir()] if given.parent.is_dir() else []
        raise UserError(f"RUN {given}: no such folder; {hint(given.name, beside)}give a run's folder, runs/NAME/TIME")
    inside = [path.parent for pattern in ("*/config.yaml", "*/*/config.yaml") for path in given.glob(pattern)]
    if not inside:
        raise UserError(
            f"RUN {given}: has no config.yaml, nor has any folder in it; give a run's folder, runs/NAME/TIME"
        )
    return max(inside, key=lambda folder: folder.stat().st_mtime)


def check_step(run: Path, step: int | None) -> None:
    """Make sure that the checkpoint asked for is there.

    Raises:
        UserError: it isn't, or the run has none at all.
    """
    steps = sorted(int(path.name[5:]) for path in (run / "checkpoints").glob("step_*") if path.name[5:].isdigit())
    if not steps:
        raise UserError(f"{run}: has no checkpoint yet; checkpoint.every sets how often a run saves one")
    if step is not None and step not in steps:
        raise UserError(f"--step {step}: {run} has no such checkpoint; use --step {' or '.join(map(str, steps))}")
