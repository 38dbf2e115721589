"""`stowage eval`: held-out loss and perplexity of a checkpoint, on the run's own held-out text or on other text."""

import os

from trainer.cli.compose import load_saved
from trainer.cli.main import leads
from trainer.cli.runs import Arguments, add_run, check_step, find_run
from trainer.errors import UserError

ALLOWED = (
    "data", "precision", "run.device", "run.threads", "train.micro_batch", "train.eval_by_position", "model.attention",
    "model.rope", "parallel.zero",
)  # fmt: skip
"""Options that can differ between training and evaluation; any other would be ignored, so it is refused."""

DESCRIPTION = """Held-out perplexity of a run's checkpoint, token-weighted and exact.

Overrides choose other text or another way of computing:
  stowage eval runs/train data.eval_rows=0
  stowage eval runs/train/2026-01-01_12-00-00 --step 200 data=text data.path=book.txt run.device=cpu
  stowage eval runs/train data.sequence_length=8192 model.rope.type=yarn model.rope.factor=4
  stowage eval runs/train train.eval_by_position=64

On several ranks (torchrun --nproc-per-node 2 -m trainer eval runs/train) each takes some rows, or
its part of every row where the run was split so; with parallel.zero=2 or 3, of the run or given
here, they share the weights too."""


def main(arguments: list[str]) -> int:
    parser = Arguments("eval", DESCRIPTION)
    add_run(parser)
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help=f"overrides of the run's options: {', '.join(ALLOWED)}"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    asked = parser.parse_intermixed_args(arguments)
    run = find_run(asked.run)
    check_step(run, asked.step)
    check_overrides(asked.overrides)
    load_saved(run / "config.yaml", asked.overrides)  # mistakes come before torch is imported
    stages = [each for each in asked.overrides if each.startswith("parallel.zero=")]
    if stages and os.environ.get("WORLD_SIZE", "1") == "1":
        raise UserError(
            f"{stages[-1]}: one process has nobody to share weights with; start several (torchrun --nproc-per-node N "
            "-m trainer eval RUN ...), or leave it out"
        )
    if run != asked.run and leads() and not asked.json:
        print(f"evaluating {run}")
    from trainer.evaluate import evaluate_run

    evaluate_run(run, asked.overrides, asked.step, asked.json)
    return 0


def check_overrides(overrides: list[str]) -> None:
    """Refuse overrides that an evaluation would not heed."""
    problems = []
    for override in overrides:
        key = override.partition("=")[0]
        if "=" in override and not any(key == name or key.startswith(f"{name}.") for name in ALLOWED):
            problems.append(f"{override}: has no effect on an evaluation; what can be set is {', '.join(ALLOWED)}")
    if problems:
        raise UserError("\n".join(problems))
