"""The `stowage` command, and `python -m trainer`, which is `stowage train`."""

import sys

from trainer.cli.main import main

if __name__ == "__main__":
    sys.exit(main(default="train"))
