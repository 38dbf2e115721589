"""Outcomes that outlast a process: a survey that was cut off goes on, and several processes share one.

Each process appends to a file of its own in the journal's folder, a line an outcome; all read all. An outcome counts
for the code it was found with: others are left aside.
"""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import asdict
from functools import cache
from pathlib import Path
from typing import Protocol

import torch

from tests.composition.axes import AXES, Combination
from tests.composition.laboratory import Outcome

ROOT = Path(__file__).parents[2]
CODE = ("parallel", "optim", "offload", "trainer", "configs", "tests/composition")
TELLING = ("__main__.py", "document.py", "journal.py", "survey.py")
"""Files of this folder that say what is run and what becomes of outcomes, and make none."""


class Judge(Protocol):
    """What tells whether a combination holds: a `Laboratory`, or a `Journal` in front of one."""

    def judge(self, combination: Combination) -> Outcome: ...


class Journal:
    """Answers what is written, and asks `judge` for the rest.

    Args:
        folder: made if it is not there.
    """

    def __init__(self, folder: Path, judge: Judge) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._judge = judge
        self._own = folder / f"{code()[:12]}-{os.getpid()}.jsonl"
        self.known = {row: outcome for file in sorted(folder.glob("*.jsonl")) for row, outcome in read(file)}

    def judge(self, combination: Combination) -> Outcome:
        if combination not in self.known:
            self.known[combination] = self._judge.judge(combination)
            line = {"code": code(), "of": dict(combination.items())} | asdict(self.known[combination])
            with self._own.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return self.known[combination]


def read(file: Path) -> Iterator[tuple[Combination, Outcome]]:
    """Outcomes of a file that were found with the code as it is."""
    for line in file.read_text().splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # the last line of a process that was killed
            continue
        if found.pop("code") == code():
            yield Combination.of(**found.pop("of")), Outcome(**found)


@cache
def code() -> str:
    """Digest of everything an outcome depends on: our code and configuration, the axes, torch."""
    digest = hashlib.sha256(f"{torch.__version__} {[axis.name for axis in AXES]}".encode())
    for folder in CODE:
        for path in sorted((ROOT / folder).rglob("*")):
            tells = folder == CODE[-1] and (path.name in TELLING or path.name.startswith("test_"))
            if path.suffix in (".py", ".yaml") and not tells:
                digest.update(f"{path.relative_to(ROOT)} ".encode() + path.read_bytes())
    return digest.hexdigest()
