"""Runs combinations and judges them: equal to one process, refused with a reason, or wrong."""

import json
import random
import shutil
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

from tests.composition.axes import Combination
from tests.composition.case import Job, Report
from tests.composition.compare import Trained, distances, limits, trained
from tests.composition.held import ignored
from tests.composition.pool import Pools, worst

TWINS = (2, 4)
"""Micro-steps of the single processes that show how far a method drifts by itself."""
MORE_TWINS = (1, 2, 4)
"""Micro-steps of those that are asked where a layout drifts further, their MLPs in pieces (or whole, if they were not):
a drift is a maximum over rounding, and of two draws often far below what the next one shows."""


@dataclass
class Outcome:
    kind: str
    """equal, refused; or, all failures: differs, ignored, crashed."""
    text: str = ""
    """The reason of a refusal or failure."""
    distances: dict[str, float] = field(default_factory=dict)
    limits: dict[str, float] = field(default_factory=dict)

    @property
    def passes(self) -> bool:
        return self.kind in ("equal", "refused")

    def __str__(self) -> str:
        measured = ", ".join(
            f"{key} {value:.1e}" + (f" (limit {self.limits[key]:.0e})" if value > self.limits.get(key, value) else "")
            for key, value in self.distances.items()
        )
        return f"{self.kind}: {self.text or measured}"


class Failed(Exception):
    def __init__(self, report: Report) -> None:
        super().__init__(report.text)
        self.report = report


class Laboratory:
    """Context that owns the processes and a folder for text and runs; remembers references."""

    def __enter__(self) -> "Laboratory":
        self.folder = Path(tempfile.mkdtemp(prefix="composition-"))
        self.text = documents(self.folder / "text.jsonl")
        self.pools = Pools().__enter__()
        self._references: dict[tuple[Combination, bool], tuple[Trained, dict[str, float]] | Failed] = {}
        self._wider: dict[Combination, list[dict[str, float]]] = {}
        self._runs = 0
        return self

    def __exit__(self, *_: object) -> None:
        self.pools.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, combination: Combination, fault: str = "") -> Outcome:
        """Run a combination, with a mistake made on purpose if named, and its reference, unless known; compare."""
        try:
            found = self.train(combination, fault)
        except Failed as failed:
            kind = "refused" if failed.report.kind == "refused" else "crashed"
            return Outcome(kind, failed.report.text)
        try:
            reference, yardstick = self.reference(combination.reference, codes=combination.splits_codes)
        except Failed as failed:  # the layout accepts what one process refuses, or the method itself is broken
            return Outcome("crashed", f"its reference ({combination.reference}): {failed}")
        measured = distances(found, reference)
        drifts, lossy = combination.drifts, combination["activations"] in ("int8", "fp8")
        allowed = limits(combination["precision"], yardstick, drifts=drifts, lossy=lossy)
        if beyond(measured, allowed) and not combination.is_exact:
            yardstick = self.wider(combination.reference, reference, yardstick)
            allowed = limits(combination["precision"], yardstick, drifts=drifts, lossy=lossy)
        if beyond(measured, allowed):
            return Outcome("differs", "", measured, allowed)
        without_effect = ignored(combination, found, reference)
        return Outcome("ignored" if without_effect else "equal", "; ".join(without_effect), measured, allowed)

    def reference(self, method: Combination, *, codes: bool = False) -> tuple[Trained, dict[str, float]]:
        """The single-process training of a method, and how far it drifts when it splits its own batch otherwise.

        Args:
            codes: count as drift what 8-bit activations lose at all, beside the same that keeps them.
        """
        if (method, codes) not in self._references:
            try:
                alone = self.train(method)
                twins = [] if method.is_exact else [method.but(accumulation=n) for n in TWINS]
                twins += [method.but(activations="keep")] if codes else []
                measured = [distances(self.train(twin), alone) for twin in twins]
                yardstick = {key: max(each[key] for each in measured) for key in (measured[0] if measured else ())}
                self._references[method, codes] = (alone, yardstick)
            except Failed as failed:
                self._references[method, codes] = failed
        found = self._references[method, codes]
        if isinstance(found, Failed):
            raise found
        return found

    def wider(self, method: Combination, alone: Trained, yardstick: dict[str, float]) -> dict[str, float]:
        """The largest of a yardstick and what more single processes show."""
        if method not in self._wider:
            other = "whole" if method["mlp"] == "tiled" else "tiled"
            twins = [method.but(mlp=other, accumulation=n) for n in MORE_TWINS]
            self._wider[method] = [distances(self.train(twin), alone) for twin in twins]
        every = [yardstick, *self._wider[method]]
        return {key: max(each.get(key, 0.0) for each in every) for key in yardstick}

    def train(self, combination: Combination, fault: str = "") -> Trained:
        """Train a combination to its last step.

        Raises:
            Failed: it was refused, crashed or hung.
        """
        self._runs += 1
        folder = self.folder / f"run{self._runs}"
        try:
            first = self._first_part(combination, folder)
            last = combination.reference if combination.resume == "to_one" else combination
            reports = self._do(last, folder, stop=False, fault=fault)
            return trained(reports, first, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _first_part(self, combination: Combination, folder: Path) -> list[Report]:
        if combination.resume == "straight":
            return []
        reports = self._do(
            combination.reference if combination.resume == "from_one" else combination, folder, stop=True
        )
        if combination.resume != "from_one" and combination["checkpoint"] != "sync":
            # The last one was waited for, as a signal asked for the end: as if the run had been killed before that.
            shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
        return reports

    def _do(self, combination: Combination, folder: Path, *, stop: bool, fault: str = "") -> list[Report]:
        reports = self.pools.run(combination.ranks, Job(tuple(self.overrides(combination, folder)), stop, fault))
        wrong = worst(reports)
        if wrong is not None:
            raise Failed(wrong)
        return reports

    def overrides(self, combination: Combination, folder: Path) -> list[str]:
        paths = ["data=jsonl", f"data.path={self.text}", f"data.cache_dir={self.folder / 'cache'}", f"run.dir={folder}"]
        return [*combination.overrides(), *paths]


def beyond(measured: dict[str, float], allowed: dict[str, float]) -> bool:
    return any(not value <= allowed.get(key, float("inf")) for key, value in measured.items())


def documents(path: Path) -> Path:
    """Write a few hundred documents of very different lengths, so that ranks have very different numbers of targets.

    Of all printable characters: gradients of the first block have at most as many directions as there are different
    tokens, and a basis of more is completed by rounding, which no two orders of a sum have in common.
    """
    draw = random.Random(0)
    with path.open("w") as file:
        for index in range(400):
            length = draw.randrange(30, 60) if index % 3 == 0 else draw.randrange(3, 8)
            file.write(json.dumps({"text": "".join(chr(draw.randrange(33, 127)) for _ in range(length))}) + "\n")
    return path
