"""One combination on one rank of its process group: the real configuration check, build, loop, evaluation and save."""

import traceback
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from parallel.config import EngineName
from parallel.launch import World, connected
from tests.composition.axes import STOP_AFTER
from tests.composition.faults import FAULTS
from trainer.build import build
from trainer.checkpoint import CheckpointStore
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.loop import Run, train
from trainer.run import agree_on_config, begin, find_checkpoint
from trainer.signals import Interrupted

SIGTERM = 15


@dataclass(frozen=True)
class Job:
    """What every rank of a pool is told to do."""

    overrides: tuple[str, ...]
    """With `run.dir`, whose `checkpoints` are gone on from where there are any."""
    stop: bool = False
    """Whether a signal comes after STOP_AFTER steps."""
    fault: str = ""
    """A mistake to make on purpose (`faults.py`)."""


@dataclass
class Report:
    """What one rank saw."""

    kind: str = "done"
    """done; refused before the first step; or crashed."""
    text: str = ""
    """The refusal or the traceback."""
    records: list[dict[str, Any]] = field(default_factory=list)
    """As in metrics.jsonl: of steps and of evaluations."""
    between: dict[str, int] = field(default_factory=dict)
    """Bytes by kind at the end of the last counted step."""
    peak: dict[str, int] = field(default_factory=dict)
    """Most bytes of each kind in a counted step, and of all together as `total`."""
    groups: list[dict[str, Any]] = field(default_factory=list)
    """The optimizer's options, as it has them."""
    moved: dict[str, float] = field(default_factory=dict)
    """One process only: 2-norm of each parameter's way from its first to its last value."""


class Listener:
    """Stands in for the recorder: keeps the records, and sends the signal."""

    def __init__(self, report: Report, stop: SimpleNamespace, stop_after: int | None) -> None:
        self.report, self.stop, self.stop_after = report, stop, stop_after

    def record(self, record: Mapping[str, Any], eta: float | None) -> None:
        self.report.records.append(dict(record))
        if "loss" in record and self.stop_after is not None and record["step"] == self.stop_after - 1:
            self.stop.number = SIGTERM  # seen by the next step, on whichever rank it came

    @contextmanager
    def phase(self, text: str) -> Iterator[None]:
        yield

    def notice(self, text: str) -> None:
        pass

    warn = beside = notice


def run_job(job: Job, world: World) -> Report:
    """Do `job` on this rank; never raises."""
    with FAULTS[job.fault](world) if job.fault else nullcontext():
        return attempt(job, world)


def attempt(job: Job, world: World) -> Report:
    report, started = Report(), False
    with ExitStack() as stack:
        try:
            cfg = load(list(job.overrides))
            world = replace(world, sequence_degree=cfg.parallel.degree(world.process_count))
            if world.process_count == 1 and cfg.parallel.engine is not EngineName.torch:  # which wants a group of one
                world = stack.enter_context(connected(cfg.parallel, "cpu", 1))
            agree_on_config(cfg, world)
            assert cfg.run.dir is not None
            store = CheckpointStore(Path(cfg.run.dir) / "checkpoints", keep=0, verify=True, group=world.control)
            store.check_writable()
            checkpoint = find_checkpoint(cfg, store)
            stop = SimpleNamespace(number=0)
            built = build(cfg, world)
            stack.callback(built.engine.close)
            listener: Any = Listener(report, stop, STOP_AFTER if job.stop and world.leads else None)
            run = begin(built, store, listener, stop, checkpoint)  # type: ignore[arg-type]
            started = True
            train_on(run, report)
        except UserError as error:
            report.kind, report.text = ("crashed" if started else "refused"), str(error)
        except BaseException:
            report.kind, report.text = "crashed", traceback.format_exc()
    return report


def train_on(run: Run, report: Report) -> None:
    """Train to the end or to the signal, and note what was held."""
    built = run.built
    alone = built.world.process_count == 1 and built.cfg.parallel.engine is EngineName.torch  # as references are
    first = {name: p.detach().clone() for name, p in built.model.named_parameters()} if alone else {}
    with suppress(Interrupted):
        train(run)
    last = dict(built.model.named_parameters())
    report.moved = {name: float((last[name].detach().double() - p.double()).norm()) for name, p in first.items()}
    for timeline in run.timelines.values():
        report.between = timeline.at(len(timeline) - 1)
        for kind in report.between:
            most = max(timeline.at(i)[kind] for i in range(len(timeline)))
            report.peak[kind] = max(report.peak.get(kind, 0), most)
        report.peak["total"] = max(report.peak.get("total", 0), timeline.peak.total)
    report.groups = [
        {key: value for key, value in group.items() if isinstance(value, bool | int | float | str)}
        for group in built.optimizer.param_groups
    ]
