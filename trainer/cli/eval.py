"""`stowage eval`: held-out loss and perplexity of a checkpoint, on the run's own held-out text or on other text."""

import os

from trainer.cli.compose import load_saved
from trainer.cli.main import leads
from trainer.cli.runs import Arguments, add_run, check_step, find_run
from trainer.errors import UserError

ALLOWED = ("data", "precision", "run.device", "run.threads", "train.micro_batch", "model.attention", "parallel.zero")
"""Options that can differ between training and evaluation; any other would be ignored, so it is refused."""

DESCRIPTION = """Held-out perplexity of a run's checkpoint, token-weighted and exact.

Overrides choose other text or another way of computing:
  stowage eval runs/train data.eval_rows=0
  stowage eval runs/train/2026-01-01_12-00-00 --step 200 data=text data.path=book.txt run.device=cpu

Several ranks share the text; with parallel.zero=2 or 3, of the run or given here, the weights too:
  torchrun --nproc-per-node 4 -m trainer eval runs/train parallel.zero=3"""


def main(arguments: list[str]) -> int:
    parser = Arguments("eval", DESCRIPTION)
    add_run(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"overrides of the run's options: {', '.join(ALLOWED)}"
    )
    asked = parser.parse_intermixed_args(arguments)
    run = find_run(asked.run)
    check_step(run, asked.step)
    check_overrides(asked.overrides)
    load_saved(run / "config.yaml", asked.overrides)  # mistakes come before torch is imported
    if os.environ.get("WORLD_SIZE", "1") == "1" and any(each.startswith("parallel.zero=") for each in asked.overrides):
        raise UserError(
            "parallel.zero: one process has nobody to share weights with; start several (torchrun --nproc-per-node N "
            "-m trainer eval RUN ...), or leave it out"
        )
    if run != asked.run and leads():
        print(f"evaluating {run}")
    from trainer.evaluate import evaluate_run

    evaluate_run(run, asked.overrides, asked.step)
    return 0


def check_overrides(overrides: list[str]) -> None:
    """Refuse overrides that an evaluation would not heed."""
    problems = []
    for override in overrides:
        key = override.partition("=")[0]
        if "=" in override and key not in ALLOWED and key.partition(".")[0] not in ALLOWED:
            problems.append(f"{override}: has no effect on an evaluation; what can be set is {', '.join(ALLOWED)}")
    if problems:
        raise UserError("\n".join(problems))
