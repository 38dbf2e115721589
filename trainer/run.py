"""One training run from configuration to run folder: join, open, build, go on or begin, train, report."""

from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from offload.config import Fate
from offload.pool import TierError
from optim.describe import uncoded
from parallel.collectives import gather_objects
from parallel.config import EngineName
from parallel.launch import RanksMissing, World, connected, sequence_group
from parallel.place import spread_text
from parallel.watch import RankLost, Watch
from trainer.build import Built, build
from trainer.checkpoint.checkpoint import Checkpoint
from trainer.checkpoint.room import check_room
from trainer.checkpoint.store import CheckpointStore
from trainer.data.shared import SharedStream
from trainer.data.stream import TrainStream
from trainer.data.streamed import StreamedRows
from trainer.environment import environment
from trainer.errors import RankFailed, TrainingStopped, UserError, first_line
from trainer.folder import differences, identity, open_folder, plain, save_config
from trainer.loop import Run, save, train
from trainer.memory import by_kind_line, format_bytes
from trainer.metrics import Throughput
from trainer.recorder import Recorder
from trainer.rope.scaling import rope_text
from trainer.saver import Saver
from trainer.schema import Config, Dtype
from trainer.sequence import sequence_text
from trainer.signals import Interrupted, StopRequest
from trainer.state import restore
from trainer.step import kept_notes
from trainer.summary import draw, figures, finish, resume_command, run_info
from trainer.tiers import check_tiers


@dataclass(frozen=True)
class Result:
    """What a finished run leaves: its folder and the figures of summary.json."""

    folder: Path
    summary: dict[str, Any]


def run(cfg: Config) -> Result:
    """Train as `cfg` says.

    Raises:
        UserError: data, model files or a checkpoint do not fit.
        TrainingStopped: non-finite loss past its limit, or out of memory.
        RankFailed: another rank failed, or did not come in time, to the start or to a collective.
        Interrupted: a signal asked for the end; everything is saved.
    """
    try:
        return run_watched(cfg)
    except (RanksMissing, RankLost) as error:
        raise RankFailed(str(error), speaks=error.speaks) from error


def run_watched(cfg: Config) -> Result:
    """Train as `cfg` says, and let the other ranks know where this one is. Raises as `run`, of which it is the body."""
    with ExitStack() as stack:
        world = stack.enter_context(connected(cfg.parallel, cfg.run.device.value, cfg.run.threads))
        watch = stack.enter_context(Watch(world, cfg.parallel.timeout))
        agree_on_config(cfg, world)
        stop = stack.enter_context(StopRequest())
        folder = open_folder(cfg, world)
        store = CheckpointStore(
            folder.checkpoints, keep=cfg.checkpoint.keep, verify=cfg.checkpoint.verify, group=world.control
        )
        store.check_writable()
        checkpoint = find_checkpoint(cfg, store)
        watch.phase = "reading data, building the model"
        built = build(cfg, world)
        stack.callback(built.engine.close)
        remarks = [*built.remarks, *check_tiers(built)]
        if world.leads:
            save_config(cfg, folder.config)
            folder.write_json("environment.json", environment())
            built.corpus.tokenizer.save_pretrained(folder.tokenizer)
        recorder = stack.enter_context(
            Recorder(
                cfg, world, folder.path, run_info(built, folder), plain(cfg), start=checkpoint.step if checkpoint else 0
            )
        )
        watch.phase = "loading a checkpoint"
        laid_out = spread_text(world, cfg.parallel) if cfg.parallel.engine is EngineName.torch else None
        if laid_out:
            recorder.notice(laid_out)
        if positions := rope_text(built.model_config, cfg.model.rope, cfg.data.sequence_length):
            recorder.notice(positions)
        if built.strategy is not None:
            recorder.notice(sequence_text(cfg, world, built.model_config, built.strategy))
        training = begin(built, store, recorder, stop, checkpoint)
        watch.where = training.place
        for remark in remarks:
            recorder.notice(remark)
        tell_uncoded(built, recorder)
        try:
            train(training)
        except (Interrupted, TrainingStopped) as ended:
            if world.leads:
                draw(training, folder, recorder.warn)
            if isinstance(ended, Interrupted):
                recorder.notice(f"go on with: {resume_command(cfg, folder)}")
            raise
        except TierError as error:
            raise TrainingStopped(tier_message(training, error)) from error
        except torch.OutOfMemoryError as error:
            raise TrainingStopped(out_of_memory(training, error)) from error
        save(training, last=True)
        summary = figures(training)
    # Once the ranks have parted: a prediction pretends them, which torch allows beside no real group.
    finish(training, folder, summary)
    return Result(folder.path, summary)


def tell_uncoded(built: Built, recorder: Recorder) -> None:
    """Say once how many parameters a low-bit optimizer keeps in full precision, and what that takes."""
    held: dict[str, int] = {}
    for each in gather_objects(built.world, uncoded(built.optimizer)):
        held |= each
    count = sum(size > 0 for size in held.values())
    if count:
        recorder.notice(
            f"{count} of {len(held)} parameters keep their states in full precision (vectors, small and odd shapes): "
            f"{format_bytes(sum(held.values()))}"
        )


def agree_on_config(cfg: Config, world: World) -> None:
    """Refuse to start ranks that were given different configurations: they would wait for each other for ever."""
    everyone = gather_objects(world, plain(cfg))
    for rank, other in enumerate(everyone):
        lead, own = flat(everyone[0]), flat(other)
        found = [
            f"{key}: {lead.get(key)} there, {own.get(key)} here" for key in lead | own if lead.get(key) != own.get(key)
        ]
        if found:
            raise UserError(
                f"rank {rank} was started with another configuration than rank 0 ({'; '.join(found)}). "
                "Give every rank the same command line."
            )


def flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested dictionaries to dotted keys."""
    out: dict[str, Any] = {}
    for key, value in values.items():
        out.update(flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return out


def find_checkpoint(cfg: Config, store: CheckpointStore) -> Checkpoint | None:
    """Return the checkpoint to go on from, None to begin.

    Raises:
        UserError: `train.resume` names nothing usable, or the checkpoint is of another model, optimizer or data.
    """
    if cfg.train.resume == "auto":
        checkpoint = store.newest()
    elif cfg.train.resume == "never":
        checkpoint = store.newest()
        if checkpoint is not None:
            raise UserError(
                f"train.resume=never: {store.folder} already holds step {checkpoint.step}. "
                "Use another run.dir, or train.resume=auto to go on."
            )
    else:
        checkpoint = store.open(Path(cfg.train.resume))
    if checkpoint is None:
        damaged = sorted(path.name for path in store.folder.glob("step_*"))
        if damaged:
            raise UserError(
                f"train.resume=auto: {store.folder} holds {', '.join(damaged)}, and none can be used. Restore one, "
                "or begin anew with another run.dir."
            )
        return None
    saved, asked = checkpoint.meta["identity"], identity(cfg)
    found = differences(saved["state"], asked["state"])
    if found:
        raise UserError(
            f"{checkpoint.path} is of another run ({'; '.join(found)}). "
            "Give its own options, or train elsewhere with another run.dir."
        )
    found = differences(saved["order"], asked["order"])
    if found and cfg.train.resume == "auto":
        raise UserError(
            f"{checkpoint.path} was trained on other data ({'; '.join(found)}). Give its own options, or "
            f"start a run of its own from it with another run.dir and train.resume={checkpoint.path}."
        )
    found = differences(saved.get("positions", {}), asked["positions"])  # absent: from before there were any
    if found and cfg.train.resume == "auto":
        raise UserError(
            f"{checkpoint.path} was trained with other rotary positions ({'; '.join(found)}). Give its own options, or "
            f"extend it in a run of its own with another run.dir and train.resume={checkpoint.path}."
        )
    return checkpoint


def begin(
    built: Built, store: CheckpointStore, recorder: Recorder, stop: StopRequest, checkpoint: Checkpoint | None
) -> Run:
    """Return the run at its first step, or as `checkpoint` left it."""
    cfg, world = built.cfg, built.world
    stream = open_stream(built)
    where: dict[str, Any] = {}
    if checkpoint is not None:
        restore(checkpoint, built.engine, seed=cfg.seed, rank=world.process_rank, device=world.device)
        where = dict(checkpoint.meta)
        same_options = not differences(where["identity"]["order"], identity(cfg)["order"])
        same_data = same_options and where["data_fingerprint"] == built.corpus.fingerprint
        if same_options and not same_data and cfg.train.resume == "auto":
            raise UserError(
                f"{checkpoint.path}: the text behind data.path={cfg.data.path} has changed since; going on would "
                "repeat and leave out samples. Restore it, or start a run of its own with another run.dir "
                f"and train.resume={checkpoint.path}."
            )
        if same_data:
            stream.restore(where["data"])
            recorder.notice(f"going on from {checkpoint.path}")
        else:
            recorder.notice(f"going on from {checkpoint.path}, at the beginning of other data")
    size = sum(tensor.nbytes for tensor in built.engine.tensors().values())
    store.agree(partial(check_room, store.folder, size, cfg.checkpoint.keep, recorder.warn))
    if built.in_backward is not None:
        built.in_backward.previous = where.get("previous_norm")
    for note in kept_notes(built):
        recorder.notice(note)
    throughput = Throughput(
        total_steps=cfg.train.steps,
        step=where.get("step", 0),
        tokens=where.get("tokens", 0),
        seconds=where.get("seconds", 0.0),
        every={"eval": cfg.train.eval_every, "save": cfg.checkpoint.every},
    )
    saver = Saver(
        cfg.checkpoint, world, store, recorder, built.gate, timeout=cfg.parallel.timeout, saved_step=where.get("step")
    )
    return Run(
        built=built,
        stream=stream,
        store=store,
        saver=saver,
        recorder=recorder,
        throughput=throughput,
        stop=stop,
        step=where.get("step", 0),
        tokens=where.get("tokens", 0),
        skipped=where.get("skipped", 0),
        skipped_in_a_row=where.get("skipped_in_a_row", 0),
        first_evaluation=where.get("first_evaluation"),
        first_by_position=where.get("first_by_position", {}),
    )


def open_stream(built: Built) -> TrainStream | SharedStream:
    """Return this rank's steps, from the first one on."""
    cfg, world, rows = built.cfg, built.world, built.corpus.train
    make = partial(
        TrainStream, rows, seed=cfg.seed, global_batch=cfg.train.global_batch, micro_batch=cfg.train.micro_batch,
        process_rank=world.data_rank, process_count=world.data_count,
    )  # fmt: skip
    group = sequence_group(world, cfg.parallel.timeout) if isinstance(rows, StreamedRows) else None
    return make() if group is None else SharedStream(group, make)


def tier_message(training: Run, error: TierError) -> str:
    """Say which tier failed in which step, and from where the run goes on."""
    kept = f"step {training.saved_step} is saved" if training.saved_step else "nothing was saved yet"
    return f"step {training.step + 1}: {error}. {error.remedy}; {kept}, and the same command goes on from there."


def out_of_memory(training: Run, error: BaseException) -> str:
    """Say what the memory went to, and what would need less."""
    peaks = [timeline.peak for timeline in training.timelines.values()]
    held = training.built.meter.held()
    where = by_kind_line(max(peaks, key=lambda peak: peak.total).by_kind) if peaks else by_kind_line(held)
    cfg = training.built.cfg
    smaller = max(1, cfg.train.micro_batch // 2)
    advice = [f"train.micro_batch={smaller}"] if smaller < cfg.train.micro_batch else []
    advice += ["activations=recompute"] if cfg.activations.fate is Fate.keep else []
    advice += ["precision=bf16"] if cfg.precision.compute is Dtype.fp32 else []
    advice += ["optim=galore"] if cfg.optim.name == "adamw" else []
    advice += [] if cfg.offload.moves_states else ["offload=host"]
    return (
        f"out of memory at step {training.step + 1} ({first_line(error)}). Counted before: {where}. "
        f"Needs less: {', '.join(advice) or 'a smaller model or data.sequence_length'}."
    )
