"""What a finished run leaves behind: summary.json, memory.json, the plots, and the table at the end."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from optim import registry
from optim.config import AdamWConfig
from parallel.config import EngineName
from parallel.dtensor import local
from trainer.build import Built
from trainer.display.plots import plot_loss, plot_memory
from trainer.display.position_plot import plot_by_position
from trainer.display.progress import RunInfo
from trainer.display.report import Memory, Outcome, print_report
from trainer.errors import first_line
from trainer.folder import RunFolder
from trainer.loop import Run, beside_now, subspaces_of
from trainer.memory import Peak, beside_text
from trainer.metrics import read_metrics
from trainer.model import global_shape, parameter_count
from trainer.plan import predict
from trainer.plan_report import host_workspace
from trainer.precision import precision_text, torch_dtype
from trainer.schema import Config

BY_POSITION = "loss_by_position.png"


def run_info(built: Built, folder: RunFolder) -> RunInfo:
    """What the display says about the run as a whole."""
    cfg, device = built.cfg, built.world.device
    return RunInfo(
        name=cfg.recipe or cfg.run.name,
        model=cfg.model.name if cfg.model.path is None else Path(cfg.model.path).name,
        parameters=parameter_count(built.model),
        optimizer=cfg.optim.name,
        device=device.type,
        ranks=built.world.process_count,
        precision=precision_text(cfg.precision),
        run_dir=folder.path,
    )


def resume_command(cfg: Config, folder: RunFolder) -> str:
    """The command that goes on with this run: what was typed, and the folder."""
    typed = [a for a in sys.argv[1:] if a != "train" and not a.startswith("run.dir=")]
    return " ".join(["stowage train", *typed, f"run.dir={folder.path}"])


def state_sizes(run: Run) -> tuple[int, int]:
    """Bytes of this run's optimizer states and of plain AdamW's on the same model, both from the methods' formulas."""
    cfg, model = run.built.cfg, run.built.model
    shapes = [(name, global_shape(p)) for name, p in model.named_parameters() if p.requires_grad]
    dtype = torch_dtype(cfg.precision.weights)
    return registry.state_bytes(cfg.optim, shapes, dtype), registry.state_bytes(AdamWConfig(), shapes, dtype)


def adamw_share(run: Run) -> int:
    """Bytes of plain AdamW's states that this rank would hold under the run's own sharding."""
    world, whole = run.built.world, state_sizes(run)[1]
    if run.built.cfg.parallel.engine is EngineName.deepspeed:
        return -(-whole // world.process_count)
    parameters = [p for group in run.built.optimizer.param_groups for p in group["params"]]
    shapes = [(str(place), local(p).shape) for place, p in enumerate(parameters)]
    return registry.state_bytes(AdamWConfig(), shapes, torch_dtype(run.built.cfg.precision.weights))


def finish(run: Run, folder: RunFolder, summary: dict[str, Any]) -> None:
    """Write summary.json, memory.json and the plots, and print the final table, after the recorder's last line. Rank 0
    does, and needs no other."""
    if run.built.world.leads:
        folder.write_json("summary.json", summary)
        draw(run, folder, tell, prediction(run, tell))
        if run.timelines:
            print_report(outcome(run, folder, summary))


def figures(run: Run) -> dict[str, Any]:
    """The figures of summary.json, the same on every rank."""
    own_states, adamw_states = state_sizes(run)
    found: dict[str, Any] = {
        "steps": run.step,
        "tokens": run.tokens,
        "seconds": run.throughput.seconds,
        "tokens_per_second": run.throughput.average,
        "parameters": parameter_count(run.built.model),
        "optimizer": run.built.cfg.optim.name,
        "state_bytes": own_states,
        "adamw_state_bytes": adamw_states,
        "skipped": run.skipped,
        "checkpoint_wait_seconds": run.saver.waited,
        "eval_loss_first": run.first_evaluation,
    }
    if run.first_by_position:
        found["eval_by_position_first"] = run.first_by_position
    if run.evaluation is not None:
        found |= run.evaluation.to_json()
    if fit := subspaces_of(run.built):
        found["subspace"] = fit
    if run.timelines:
        peak = highest_peak(run)
        if beside := beside_now(run):
            found["beside"] = beside
        found |= {"memory": peak.by_kind, "memory_peak": peak.total, "memory_peak_phase": peak.phase}
    if run.sent:
        found["sent_bytes_per_step"] = run.sent
    return found


def highest_peak(run: Run) -> Peak:
    """The most bytes held at once in any counted step."""
    return max((timeline.peak for timeline in run.timelines.values()), key=lambda peak: peak.total)


def outcome(run: Run, folder: RunFolder, summary: dict[str, Any]) -> Outcome:
    """What the final table says: this run beside plain AdamW, whose steady step differs in the states alone."""
    cfg, peak = run.built.cfg, highest_peak(run)
    steady = run.timelines["steady"].peak if "steady" in run.timelines else peak
    moved = cfg.offload.moves_states
    adamw = Memory(label="adamw", by_kind={**steady.by_kind, "states": adamw_share(run)})
    return Outcome(
        name=cfg.recipe or cfg.run.name,
        steps=run.step,
        tokens=run.tokens,
        seconds=summary["seconds"],
        tokens_per_second=summary["tokens_per_second"],
        memory=Memory(label=cfg.optim.name + f" ({cfg.offload.states.value})" * moved, by_kind=peak.by_kind),
        baseline=None if cfg.optim.name == "adamw" and not moved else adamw,
        phase=peak.phase,
        beside=beside_text(beside_now(run)),
        first_loss=run.first_evaluation,
        last_loss=summary.get("eval_loss"),
        perplexity=summary.get("eval_perplexity"),
        authors_perplexity=summary.get("eval_perplexity_authors"),
        skipped=run.skipped,
        subspace=summary.get("subspace"),
        sent=run.sent,
        written={
            "run folder": folder.path,
            "loss plot": folder.plots / "loss.png",
            **({"by position": folder.plots / BY_POSITION} if run.first_by_position else {}),
            "memory plot": folder.plots / "memory.png",
            "figures": folder.metrics,
            "checkpoint": run.store.folder,
        },
    )


def tell(warning: str) -> None:
    """Say what the recorder, closed by now, would have said."""
    print(f"! {warning}", flush=True)


def prediction(run: Run, warn: Callable[[str], None]) -> dict[str, Any]:
    """Return what `stowage plan` says of this run, for memory.json: about a second for a small model, at the end.

    `predicted` bytes by step, and those in `host` memory beside; empty where no plan can be made.
    """
    built = run.built
    try:
        plan = predict(built.cfg, built.model_config, ranks=built.world.process_count, device=built.world.device)
        return {"predicted": plan.to_json(), "host": host_workspace(plan.staging)}
    except Exception as error:
        warn(f"no predicted memory: {type(error).__name__}: {first_line(error)}")
        return {}


def draw(run: Run, folder: RunFolder, warn: Callable[[str], None], predicted: dict[str, Any] | None = None) -> None:
    """Write memory.json and both plots. A plot that cannot be drawn is said, and loses nothing else."""
    if run.timelines:
        measured = {name: timeline.to_json() for name, timeline in run.timelines.items()}
        expected = predicted or {"predicted": {}, "host": {}}
        host = {"predicted": expected["host"], "measured": host_workspace(run.saver.staged_bytes())}
        folder.write_json("memory.json", {"predicted": expected["predicted"], "measured": measured, "host": host})
    records = read_metrics(folder.metrics)
    try:
        name = run.built.cfg.run.name
        plot_loss(records, folder.plots / "loss.png", title=f"Loss: {name}")
        plot_by_position(records, folder.plots / BY_POSITION, title=f"Loss by position: {name}")
        if run.timelines:
            step, timeline = list(run.timelines.items())[-1]
            plot_memory(timeline, folder.plots / "memory.png", title=f"Memory over one step ({step})")
    except Exception as error:
        warn(f"no plots: {type(error).__name__}: {error}")
