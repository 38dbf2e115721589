"""`stowage export`: a run's weights and tokenizer as a folder that transformers opens."""

from pathlib import Path

from trainer.cli.main import leads
from trainer.cli.runs import Arguments, add_run, check_step, find_run
from trainer.errors import UserError

DESCRIPTION = """Write a checkpoint as a Hugging Face folder that AutoModelForCausalLM.from_pretrained opens.

  stowage export runs/train exported
  stowage export runs/train/2026-01-01_12-00-00 exported --step 200"""


def main(arguments: list[str]) -> int:
    parser = Arguments("export", DESCRIPTION)
    add_run(parser)
    parser.add_argument("target", type=Path, metavar="DIR", help="folder to write; must be new or empty")
    asked = parser.parse_intermixed_args(arguments)
    run = find_run(asked.run)
    check_step(run, asked.step)
    if asked.target.exists() and (not asked.target.is_dir() or any(asked.target.iterdir())):
        raise UserError(f"DIR {asked.target}: exists already and is not an empty folder; give a new one")
    if run != asked.run and leads():
        print(f"exporting {run}")
    from trainer.export import export_run

    export_run(run, asked.target, asked.step)
    return 0
