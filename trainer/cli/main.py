"""Entry: which command, and how it ends.

Exit codes: 0 done; 1 a bug of ours (with its traceback), or a recipe that falls short; 2 the user's mistake;
3 training stopped itself; 130 and 143 interrupted after a clean save.
"""

import importlib
import os
import sys
from collections.abc import Sequence

from trainer.cli.packages import check_packages, version
from trainer.errors import TrainingStopped, UserError
from trainer.nearest import hint
from trainer.quiet import leave_out_noise
from trainer.signals import Interrupted

COMMANDS = {
    "train": "train a model: stowage train [key=value ...] [group=choice ...]",
    "plan": "memory a run will need, without its hardware: stowage plan [key=value ...] [--ranks N] [--json]",
    "eval": "held-out perplexity of a finished or running run: stowage eval RUN [--step N] [data overrides]",
    "export": "Hugging Face folder of a run: stowage export RUN DIR [--step N]",
    "recipe": "reproductions with their claims: stowage recipe list | show | run | check NAME",
}
"""Each is a module of this package with `main(arguments) -> exit code`, imported when asked for."""


def main(argv: Sequence[str] | None = None, *, default: str | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments after the program's name; None takes the process's own.
        default: command that is meant where the arguments name none (`python -m trainer` means train).
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    # Before torch is imported, which is when libgomp reads it. Threads that spin long while they wait keep the one they
    # wait for off its core. Main job's step, 2 cores: 0.30 s with this and with libgomp's default (300,000) on a quiet
    # machine, 1.0 s and 7 s beside one other busy process.
    os.environ.setdefault("GOMP_SPINCOUNT", "20000")
    # When a rank has died, torch's C++ would tell of every socket that broke; parallel/watch.py says which rank it was.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    leave_out_noise()
    try:
        return dispatch(arguments, default)
    except (UserError, TrainingStopped, Interrupted) as error:
        report(error)
        return error.exit_code
    except KeyboardInterrupt:  # before training began, when there was nothing to save
        return 130
    except BrokenPipeError:  # `stowage train --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141


def dispatch(arguments: list[str], default: str | None) -> int:
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        check_packages()
        command: int = importlib.import_module(f"trainer.cli.{first}").main(arguments[1:])
        return command
    if first == "--version":
        print(f"stowage {version()}")
        return 0
    if default is not None:
        return dispatch([default, *arguments], None)
    if first in ("", "-h", "--help", "help"):
        print(overview())
        return 0
    if "=" in first or first.startswith("-"):
        raise UserError(f"{first}: comes before the command; write stowage train {first} (see `stowage --help`)")
    raise UserError(f"{first}: no such command; {hint(first, COMMANDS)}Known: {', '.join(COMMANDS)}")


def overview() -> str:
    lines = [f"  {name:8}{text}" for name, text in COMMANDS.items()]
    return "\n".join(
        [
            f"stowage {version()}: train large language models in the memory you have",
            "",
            "usage: stowage COMMAND ...      (`stowage COMMAND --help` explains its options)",
            "",
            *lines,
            "",
            "`stowage train` without options trains a small LLaMA on this machine, offline, in about a minute.",
            "`python -m trainer ...` is `stowage train ...`; so are `torchrun --nproc-per-node N -m trainer ...`",
            "and `accelerate launch -m trainer ...`.",
        ]
    )


def leads() -> bool:
    """Whether this process speaks for all: rank 0, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def report(error: Exception) -> None:
    """Show an ending that is no bug: once, on stderr, without a traceback."""
    if getattr(error, "speaks", leads()):
        sys.stdout.flush()
        print(f"stowage: {error}", file=sys.stderr)
