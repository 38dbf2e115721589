"""`stowage plan`: bytes a run will hold on each rank, by kind and phase, without its hardware or its data."""

import argparse
import json
import os
import sys

from trainer import check, check_ranks
from trainer.cli.compose import as_object, compose, conclude, message
from trainer.cli.main import leads
from trainer.cli.overrides import Findings
from trainer.cli.runs import Arguments
from trainer.errors import UserError
from trainer.schema import Config

DESCRIPTION = """Predicted peak memory of each rank, by kind and phase: the run's own step, on
fake tensors. Takes the options of `stowage train`, reads no data, and needs
neither the GPU nor the memory of the run.

  stowage plan
  stowage plan model=llama_7b precision=bf16_pure data.sequence_length=2048
  stowage plan --ranks 8 model=llama_1b train.global_batch=512
  stowage plan --json activations=recompute"""

SECONDS = 30.0
"""Spent on planning other choices; those that would take longer are named and left out."""


def main(arguments: list[str]) -> int:
    asked = parse(arguments)
    cfg = load(asked.overrides, asked.ranks)  # mistakes come before torch is imported
    if not leads():
        return 0
    from trainer.plan import compare, counting_device, planned_config, predict
    from trainer.plan_report import plan_json, plan_report, plan_text

    config, device = planned_config(cfg), counting_device(cfg)
    plan = predict(cfg, config, ranks=asked.ranks, device=device)
    instead, untried = ({}, []) if asked.alone else compare(cfg, config, plan, device=device, seconds=SECONDS)
    if asked.json:
        print(json.dumps(plan_json(cfg, plan, instead, untried), indent=2))
    elif sys.stdout.isatty():
        from rich.console import Console

        Console(highlight=False).print(plan_report(cfg, plan, instead, untried))
    else:
        print(plan_text(cfg, plan, instead, untried), end="")
    return 0


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = Arguments("plan", DESCRIPTION)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="options and choices, as for `stowage train`")
    parser.add_argument(
        "--ranks", type=int, metavar="N", default=int(os.environ.get("WORLD_SIZE", "1")),
        help="processes of the run, of which one is predicted; default 1",
    )  # fmt: skip
    parser.add_argument(
        "--alone", action="store_true", help="plan these choices only, not what could be chosen instead"
    )
    parser.add_argument("--json", action="store_true", help="print the same as JSON, in bytes")
    asked = parser.parse_intermixed_args(arguments)
    if asked.ranks < 1:
        raise UserError(f"--ranks {asked.ranks}: must be at least 1")
    return asked


def load(overrides: list[str], ranks: int) -> Config:
    """Compose and check the configuration of a run on `ranks` ranks; where it would write does not matter.

    Raises:
        UserError: names every problem of the whole configuration.
    """
    found = Findings()
    composed = compose(overrides, found)
    cfg = None if composed is None else as_object(composed, found)
    if cfg is not None:
        conclude(
            found, [*check.problems(cfg), *check_ranks.rank_count_problems(cfg, ranks), *check.schedule_problems(cfg)]
        )
    if found.problems or cfg is None:
        raise UserError(message(found.problems))
    return cfg
