"""When things happen: steps, log lines, evaluations, checkpoints, and how a run ends."""

import signal
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

from optim.describe import subspaces
from optim.schedule import multiplier
from parallel.collectives import sum_over_ranks
from parallel.traffic import Traffic
from trainer.build import Built
from trainer.by_position import buckets_of
from trainer.checkpoint.store import CheckpointStore
from trainer.data.shared import SharedStream
from trainer.data.stream import TrainStream, heldout_batches
from trainer.errors import TrainingStopped
from trainer.evaluate import Evaluation, evaluate
from trainer.folder import identity
from trainer.memory import Timeline
from trainer.metrics import Throughput
from trainer.recorder import Recorder
from trainer.saver import Saver
from trainer.signals import Interrupted, StopRequest
from trainer.state import run_tensors, still
from trainer.step import Stepped, train_step


@dataclass(kw_only=True)
class Run:
    """A training run in progress: what it is made of, where it stands, whom it tells."""

    built: Built
    stream: TrainStream | SharedStream
    store: CheckpointStore
    saver: Saver
    recorder: Recorder
    throughput: Throughput
    stop: StopRequest
    step: int = 0
    tokens: int = 0
    """Token slots trained on: sequences times their length, over all ranks."""
    skipped: int = 0
    skipped_in_a_row: int = 0
    first_evaluation: float | None = None
    first_by_position: dict[str, dict[str, Any]] = field(default_factory=dict)
    evaluation: Evaluation | None = None
    subspaces: dict[str, Any] | None = None
    """How well the optimizer's subspaces fit at their newest refreshes, as last written."""
    timelines: dict[str, Timeline] = field(default_factory=dict)
    """Exact memory countings: `first` step of the process (with whatever it sets up) and the last `steady` one."""
    sent: dict[str, int] = field(default_factory=dict)
    """Bytes that this rank has sent in the last counted step, by kind of collective (`parallel.traffic`)."""

    @property
    def saved_step(self) -> int | None:
        """Newest step that is saved."""
        return self.saver.saved_step

    def due(self, every: int) -> bool:
        """Whether something that happens `every` steps, and at the last one, happens now."""
        return self.step == self.built.cfg.train.steps or (every > 0 and self.step % every == 0)

    def place(self) -> tuple[int, str]:
        """Step and phase this rank is in; evaluation and saving belong to the step before."""
        at = self.built.meter.at
        return self.step + (at not in ("eval", "save")), at

    def meta(self) -> dict[str, Any]:
        """Where the run stands, as numbers for a checkpoint's manifest."""
        return {
            "step": self.step,
            "data": self.stream.state(),
            "tokens": self.tokens,
            "skipped": self.skipped,
            "skipped_in_a_row": self.skipped_in_a_row,
            "seconds": self.throughput.seconds,
            "first_evaluation": self.first_evaluation,
            "first_by_position": self.first_by_position,
            "previous_norm": self.built.in_backward.previous if self.built.in_backward is not None else None,
            "identity": identity(self.built.cfg),
            "data_fingerprint": self.built.corpus.fingerprint,
            "optimizer_numbers": self.built.engine.numbers(),
        }


def train(run: Run) -> None:
    """Train until the last step. However it ends, a checkpoint that is being written is finished first.

    Raises:
        Interrupted: a signal asked for the end; the state is saved.
        TrainingStopped: too many steps in a row were not finite, or a checkpoint that had to be written was not.
    """
    try:
        take_steps(run)
    finally:
        run.saver.close()


def take_steps(run: Run) -> None:
    """Take the steps from where the run stands; raises as `train`."""
    cfg = run.built.cfg
    first_step = run.step
    if run.step >= cfg.train.steps:
        run.recorder.notice(f"all {cfg.train.steps} steps are done already; a larger train.steps goes on")
    if run.step == 0 or run.step >= cfg.train.steps:
        measure(run)
    while run.step < cfg.train.steps:
        run.built.meter.at = "data"
        batch = next(run.stream)
        with counted(run, first_step):
            stepped = train_step(run.built, batch, run.step, run.stop.number)
        run.step += 1
        run.tokens += cfg.train.global_batch * cfg.data.sequence_length
        run.saver.at_border()
        note_skip(run, stepped)
        note_tiers(run, first=run.step == first_step + 1)
        if run.due(cfg.train.log_every) or run.step == first_step + 1:
            log(run, stepped)
        if run.due(cfg.train.eval_every):
            measure(run)
        if run.due(cfg.checkpoint.every) or stepped.stop:
            save(run, last=bool(stepped.stop) or run.step == cfg.train.steps)
        if stepped.stop and run.step < cfg.train.steps:
            name = signal.Signals(stepped.stop).name
            raise Interrupted(stepped.stop, f"{name}: stopped after step {run.step} of {cfg.train.steps}, all saved")


def log(run: Run, stepped: Stepped) -> None:
    """Write one line of figures, the same on every rank, by rank 0."""
    cfg = run.built.cfg
    loss = sum_over_ranks(run.built.world, stepped.loss).item()
    run.throughput.mark(run.step, run.tokens)
    run.recorder.record(
        {
            "step": run.step,
            "tokens": run.tokens,
            "loss": loss,
            "lr": cfg.optim.lr * multiplier(cfg.schedule, run.step - 1, cfg.train.steps),
            "grad_norm": stepped.norm,
            "tokens_per_second": run.throughput.tokens_per_second,
            "seconds": run.throughput.seconds,
            "memory": memory_now(run),
            "beside": beside_now(run) or None,
            "checkpoint_wait_seconds": run.saver.seconds_to_log(),
            "skipped": run.skipped or None,
            "subspace": new_subspaces(run),
        },
        eta=run.throughput.eta,
    )


def new_subspaces(run: Run) -> dict[str, Any] | None:
    """Return how well the subspaces fit, if one was refreshed since this was last written."""
    before, run.subspaces = run.subspaces, subspaces_of(run.built)
    return None if run.subspaces == before else run.subspaces


def subspaces_of(built: Built) -> dict[str, Any] | None:
    """How well the subspaces fit, whichever ranks they are on. Every rank calls it."""
    return subspaces(built.engine.numbers().values()) if hasattr(built.cfg.optim, "rank") else None


def measure(run: Run) -> None:
    """Evaluate on held-out text and write what was found."""
    cfg, world = run.built.cfg, run.built.world
    with run.throughput.aside("eval"), run.recorder.phase("evaluating"), run.built.meter.phase("eval"):
        batches = heldout_batches(
            run.built.corpus.heldout,
            micro_batch=cfg.train.micro_batch,
            process_rank=world.data_rank,
            process_count=world.data_count,
            limit=cfg.data.eval_rows,
        )
        buckets = buckets_of(cfg.train.eval_by_position, cfg.data.sequence_length)
        run.evaluation = evaluate(
            run.built.model, run.built.loss, batches, world, cfg.precision, run.built.strategy, buckets
        )
    if run.first_evaluation is None:
        run.first_evaluation, run.first_by_position = run.evaluation.loss, run.evaluation.by_position
    run.recorder.record(
        {
            "step": run.step,
            "tokens": run.tokens,
            "seconds": run.throughput.seconds,
            "eval_loss": run.evaluation.loss,
            "eval_perplexity": run.evaluation.perplexity,
            "eval_perplexity_authors": run.evaluation.authors_perplexity,
            "eval_by_position": run.evaluation.by_position or None,
        },
        eta=run.throughput.eta,
    )


def save(run: Run, *, last: bool = False) -> None:
    """Write a checkpoint of this step, unless this very step is saved already.

    In the background where that is asked for, but for the `last` one.

    Raises:
        TrainingStopped: the disk refused, and it was the last occasion or checkpoint.on_failure=stop.
    """
    if run.saved_step == run.step:
        return
    built, world, saver = run.built, run.built.world, run.saver
    with (
        run.throughput.aside("save"),
        saver.timed(),
        run.recorder.phase(f"saving step {run.step}"),
        built.meter.phase("save"),
    ):
        tensors = run_tensors(built.engine, world.process_rank, world.device)
        if saver.beside(last=last):
            tensors = still(tensors, built.model)
        saver.save(run.step, tensors, run.meta(), last=last)


def note_skip(run: Run, stepped: Stepped) -> None:
    """Count a step that was not applied; end the run where they follow each other too often."""
    if stepped.applied:
        run.skipped_in_a_row = 0
        return
    run.skipped += 1
    run.skipped_in_a_row += 1
    limit = run.built.cfg.train.max_skipped
    run.recorder.warn(f"{skipped_text(run.step, stepped)}; {run.skipped_in_a_row} in a row, the limit is {limit}")
    if run.skipped_in_a_row >= limit:
        run.saver.settle()
        last = (
            f"the last good checkpoint is step {run.saved_step}" if run.saved_step else "no checkpoint was written yet"
        )
        raise TrainingStopped(
            f"{run.skipped_in_a_row} steps in a row up to step {run.step} had a non-finite loss or gradient "
            f"(train.max_skipped={limit}); {last}. Lower optim.lr, lengthen schedule.warmup, or set train.clip_norm."
        )


def skipped_text(step: int, stepped: Stepped) -> str:
    """Say what of a step was left out."""
    if not stepped.left_out:
        norm = "" if stepped.norm is None else f" (gradient norm {stepped.norm})"
        return f"step {step} skipped on all ranks: loss or gradient not finite{norm}"
    some = ", ".join(stepped.left_out[:3]) + (", ..." if len(stepped.left_out) > 3 else "")
    return f"step {step} left out {len(stepped.left_out)} parameters on all ranks: gradients not finite ({some})"


def note_tiers(run: Run, *, first: bool) -> None:
    """Pass on what those who move bytes have to say: tiers without room, and rules that met nothing in a step."""
    activations, states = run.built.activations, run.built.states
    for message in states.take_messages() if states is not None else ():
        run.recorder.warn(message)
    if activations is not None:
        for message in [*activations.take_messages(), *(activations.rules_without_effect() if first else [])]:
            run.recorder.warn(message)


@contextmanager
def counted(run: Run, first_step: int) -> Iterator[None]:
    """Count this step's memory exactly where it is due: the process's first two steps, then as configured.

    The first step holds what happens once (states born, a basis found), the second is like all others.
    """
    since, every = run.step - first_step, run.built.cfg.memory.sample_every
    due = since < 2 or (every > 0 and since % every == 1 % every)
    counting: AbstractContextManager[Timeline | None] = run.built.meter.count_step() if due else nullcontext()
    cfg = run.built.cfg
    slots = cfg.train.global_batch * cfg.data.sequence_length
    aside = run.throughput.aside("count", steps=1, tokens=slots) if due else nullcontext()
    traffic = Traffic(apart=run.built.world.control) if due and run.built.world.process_count > 1 else None
    with aside, counting as timeline, traffic or nullcontext():
        yield
    if traffic is not None:
        run.sent = dict(traffic.sent)
    if timeline is not None:
        run.timelines["first" if since == 0 else "steady"] = timeline


def beside_now(run: Run) -> dict[str, int]:
    """Bytes that other tiers held at the most in the last counted step; before there is one, that they hold now."""
    return list(run.timelines.values())[-1].elsewhere if run.timelines else run.built.meter.held_beside()


def memory_now(run: Run) -> dict[str, int]:
    """Bytes by kind at the peak of the last counted step; before there is one, of the kinds held between steps."""
    if run.timelines:
        return list(run.timelines.values())[-1].peak.by_kind
    return run.built.meter.held()
