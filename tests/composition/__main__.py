"""Try combinations: `python -m tests.composition --pairs`, `--only optimizer=galore zero=3`, `--random 50 --seed 7`.

    --pairs          a covering array of all pairs of values (the default)
    --all            every combination of the axes that --only names without a value: --only optimizer ranks=2
    --random N       N random combinations; --seed repeats a draw
    --only A=V ...   with these values fixed
    --docs           all pairs, written to docs/composition.md
    --minutes N      begin no combination later than that
    --journal DIR    write each outcome there, and answer from there what is known for the code as it is: a survey that
                     was cut off goes on
    --part I/N       of all pairs every N-th row alone, from the I-th on: for N processes with one journal
    --list           the axes and their values

docs/composition.md on two cores, with `survey="python -m tests.composition --journal runs/survey"`:
    $survey --part 1/2 & $survey --part 2/2; wait; $survey --docs

Prints one line a combination; exit code 1 if any is neither equal to one process nor refused with a reason.
"""

import argparse
import math
import random
import sys
import time
from pathlib import Path

from tests.composition import document
from tests.composition.axes import AXES, Combination
from tests.composition.cover import drawn, product
from tests.composition.journal import Journal, Judge
from tests.composition.laboratory import Laboratory
from tests.composition.survey import Survey, all_pairs, one_part, run


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.composition", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--pairs", action="store_true")
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--random", type=int, metavar="N")
    parser.add_argument("--seed", type=int)
    parser.add_argument("--only", nargs="*", default=[], metavar="AXIS[=VALUE]")
    parser.add_argument("--docs", action="store_true")
    parser.add_argument("--minutes", type=float, default=math.inf)
    parser.add_argument("--journal", type=Path, metavar="DIR")
    parser.add_argument("--part", type=part, metavar="I/N")
    parser.add_argument("--list", action="store_true")
    asked = parser.parse_args()
    if asked.list:
        for axis in AXES:
            print(f"{axis.name}: {', '.join(value.name for value in axis.values)}\n    {axis.about}")
        return 0
    chosen = dict(item.split("=", 1) for item in asked.only if "=" in item)
    Combination.of(**chosen)  # refuses unknown ones
    until = time.monotonic() + 60 * asked.minutes
    fixed, free = frozenset(chosen.items()), [item for item in asked.only if "=" not in item]
    with Laboratory() as processes:
        laboratory: Judge = Journal(asked.journal, processes) if asked.journal else processes
        if asked.random:
            seed = random.randrange(10**6) if asked.seed is None else asked.seed
            print(f"--random {asked.random} --seed {seed}", flush=True)
            survey = Survey(run(laboratory, drawn(asked.random, seed, fixed), tell, until))
        elif asked.all:
            survey = Survey(
                run(laboratory, product(free if asked.only else [axis.name for axis in AXES], fixed), tell, until)
            )
        elif asked.part:
            survey = one_part(laboratory, fixed, *asked.part, tell, until)
        else:
            survey = all_pairs(laboratory, fixed, tell, until)
            if asked.docs and not fixed:
                document.PATH.write_text(document.written(survey))
    return conclude(survey)


def part(text: str) -> tuple[int, int]:
    """`2/3`: the second of three."""
    one, of = map(int, text.split("/"))
    if not 1 <= one <= of:
        raise ValueError(text)
    return one, of


def tell(line: str) -> None:
    print(line, flush=True)


def conclude(survey: Survey) -> int:
    kinds = [outcome.kind for outcome in survey.outcomes.values()]
    print(", ".join(f"{kinds.count(kind)} {kind}" for kind in dict.fromkeys(kinds)))
    for combination, outcome in survey.failures.items():
        print(f"{combination}\n    {outcome}")
    return 1 if survey.failures else 0


if __name__ == "__main__":
    sys.exit(main())
