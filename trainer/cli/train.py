"""`stowage train`: flags apart from overrides, then help, a printed configuration, a sweep, or the run."""

from dataclasses import dataclass

from trainer.check_machine import check_hardware
from trainer.cli.compose import load, to_yaml
from trainer.cli.main import leads
from trainer.errors import UserError
from trainer.nearest import hint

FLAGS = {"-h": "help", "--help": "help", "-m": "multirun", "--multirun": "multirun", "-c": "cfg", "--cfg": "cfg"}


@dataclass
class Flags:
    help: bool = False
    multirun: bool = False
    cfg: bool = False


def main(arguments: list[str]) -> int:
    flags, overrides = separate(arguments)
    if flags.help:
        from trainer.cli.help import print_train_help

        if leads():
            print_train_help(overrides)
        return 0
    if flags.multirun:
        from trainer.cli.sweep import sweep

        return sweep(overrides)
    cfg = load(overrides)
    if flags.cfg:
        if leads():
            print(to_yaml(cfg), end="")
        return 0
    check_hardware(cfg)
    from trainer.run import run

    run(cfg)
    return 0


def separate(arguments: list[str]) -> tuple[Flags, list[str]]:
    """Take the flags out of the arguments; what is left are overrides."""
    flags, overrides = Flags(), []
    for argument in arguments:
        if argument in FLAGS:
            setattr(flags, FLAGS[argument], True)
        elif argument.startswith("--") and "=" not in argument:
            near = hint(argument, FLAGS)
            raise UserError(f"{argument}: no such flag; {near}Options are written key=value, such as train.steps=100")
        else:
            overrides.append(argument)
    if flags.multirun and flags.cfg:
        raise UserError("--cfg with -m: a sweep has no single configuration to print; leave one of the two out")
    return flags, overrides
