"""Runs combinations and judges them: equal to one process, refused with a reason, or wrong."""

import itertools
import json
import random
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor, wait
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
    """Context that owns the processes and a folder for text and runs; remembers single processes."""

    def __enter__(self) -> "Laboratory":
        self.folder = Path(tempfile.mkdtemp(prefix="composition-"))
        self.text = documents(self.folder / "text.jsonl")
        self.pools = Pools().__enter__()
        self.pools_beside = Pools().__enter__()
        """Of references, which run beside what is compared with them."""
        self._beside = ThreadPoolExecutor(1)
        self._alone: dict[Combination, Trained | Failed] = {}
        self._drifts: dict[tuple[Combination, Combination], dict[str, float]] = {}
        self._runs = itertools.count()
        return self

    def __exit__(self, *_: object) -> None:
        self._beside.shutdown(cancel_futures=True)
        self.pools_beside.__exit__()
        self.pools.__exit__()
        shutil.rmtree(self.folder, ignore_errors=True)

    def judge(self, combination: Combination, fault: str = "") -> Outcome:
        """Run a combination, with a mistake made on purpose if named, and its reference, unless known; compare."""
        method = combination.reference
        reading = self._beside.submit(self.alone, method)
        try:
            found = self.train(combination, self.pools, fault)
        except Failed as failed:
            kind = "refused" if failed.report.kind == "refused" else "crashed"
            return Outcome(kind, failed.report.text)
        finally:
            wait([reading])
        try:
            reference = reading.result()
            measured = distances(found, reference)
            allowed = self.allowed(combination, reference, measured)
        except Failed as failed:  # the layout accepts what one process refuses, or the method itself is broken
            return Outcome("crashed", f"its reference ({method}): {failed}")
        if beyond(measured, allowed):
            return Outcome("differs", "", measured, allowed)
        without_effect = ignored(combination, found, reference)
        return Outcome("ignored" if without_effect else "equal", "; ".join(without_effect), measured, allowed)

    def alone(self, method: Combination) -> Trained:
        """The single-process training of a method.

        Raises:
            Failed: it was refused or crashed.
        """
        if method not in self._alone:
            try:
                self._alone[method] = self.train(method, self.pools_beside)
            except Failed as failed:
                self._alone[method] = failed
        found = self._alone[method]
        if isinstance(found, Failed):
            raise found
        return found

    def allowed(self, combination: Combination, reference: Trained, measured: dict[str, float]) -> dict[str, float]:
        """How far a combination may be from its reference: by as many twins of that as it takes to allow `measured`,
        for each can only widen the limits; at last by all of them."""
        drifts, lossy = combination.drifts, combination["activations"] in ("int8", "fp8")
        yardstick: dict[str, float] = {}
        for twin in [None, *twins(combination)]:
            for key, value in self.drift(combination.reference, twin, reference).items() if twin else ():
                yardstick[key] = max(yardstick.get(key, 0.0), value)
            allowed = limits(combination["precision"], yardstick, drifts=drifts, lossy=lossy)
            if not beyond(measured, allowed):
                break
        return allowed

    def drift(self, method: Combination, twin: Combination, reference: Trained) -> dict[str, float]:
        """How far a method is from itself, trained in one process in another way."""
        if (method, twin) not in self._drifts:
            self._drifts[method, twin] = distances(self.train(twin, self.pools_beside), reference)
        return self._drifts[method, twin]

    def train(self, combination: Combination, pools: Pools, fault: str = "") -> Trained:
        """Train a combination to its last step, on processes of `pools`.

        Raises:
            Failed: it was refused, crashed or hung.
        """
        folder = self.folder / f"run{next(self._runs)}"
        try:
            first = self._first_part(combination, pools, folder)
            last = combination.reference if combination.resume == "to_one" else combination
            reports = self._do(last, pools, folder, fault=fault)
            return trained(reports, first, folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def _first_part(self, combination: Combination, pools: Pools, folder: Path) -> list[Report]:
        if combination.resume == "straight":
            return []
        first = combination.reference if combination.resume == "from_one" else combination
        reports = self._do(first, pools, folder, stop=True)
        if combination.resume != "from_one" and combination["checkpoint"] != "sync":
            # The last one was waited for, as a signal asked for the end: as if the run had been killed before that.
            shutil.rmtree(max((folder / "checkpoints").glob("step_*")))
        return reports

    def _do(
        self, combination: Combination, pools: Pools, folder: Path, *, stop: bool = False, fault: str = ""
    ) -> list[Report]:
        reports = pools.run(combination.ranks, Job(tuple(self.overrides(combination, folder)), stop, fault))
        wrong = worst(reports)
        if wrong is not None:
            raise Failed(wrong)
        return reports

    def overrides(self, combination: Combination, folder: Path) -> list[str]:
        paths = ["data=jsonl", f"data.path={self.text}", f"data.cache_dir={self.folder / 'cache'}", f"run.dir={folder}"]
        return [*combination.overrides(), *paths]


def twins(combination: Combination) -> list[Combination]:
    """Single processes that show how far the method of a combination drifts by itself: those that split the batch
    otherwise, that keep what 8-bit codes lose where it shows at all, and in narrow formats that run MLPs otherwise, and
    attention too where rows are split, by other kernels."""
    method = combination.reference
    found = [method.but(accumulation=n) for n in TWINS]
    if combination.splits_codes:
        found.append(method.but(activations="keep"))
    if not combination.is_exact:
        other = "whole" if method["mlp"] == "tiled" else "tiled"
        found += [method.but(mlp=other, accumulation=n) for n in MORE_TWINS]
        if combination["sequence"] != "none":
            other = "transformers" if method["blocks"] == "lean" else "lean"
            found += [method.but(blocks=other, accumulation=n) for n in MORE_TWINS]
    return found


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
