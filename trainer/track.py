"""Experiment trackers: accelerate's tracker classes, used without its Accelerator.

Each is opened on the first process alone, goes on where it left off when a run is resumed, and can fail (a lost
connection, a full disk) without ending the run.
"""

import importlib.util
import json
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from trainer.errors import UserError
from trainer.nearest import hint
from trainer.schema import TrackConfig

PACKAGES = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "comet_ml": "comet_ml",
    "aim": "aim<4",  # what accelerate's tracker accepts
    "clearml": "clearml",
    "dvclive": "dvclive",
    "swanlab": "swanlab",
    "trackio": "trackio",
}
"""Names of accelerate's trackers, which are also their modules, and what pip installs for each."""


class Tracker:
    """Passes records on to one tracker of accelerate; without one it does nothing.

    Args:
        target: a started `accelerate.tracking.GeneralTracker`.
        warn: told once, when the tracker fails; nothing is sent from then on.
    """

    def __init__(self, target: Any = None, warn: Callable[[str], None] = lambda text: None) -> None:
        self._target = target
        self._warn = warn

    def log(self, record: Mapping[str, Any], step: int) -> None:
        """Send one record; nested fields become `memory/weights`."""
        values = {name: value for name, value in flatten(record).items() if name != "step"}
        self._try(lambda target: target.log(values, step=step))

    def close(self) -> None:
        self._try(lambda target: target.finish())
        self._target = None

    def _try(self, action: Callable[[Any], None]) -> None:
        if self._target is None:
            return
        try:
            action(self._target)
        except Exception as error:  # whatever a tracker raises, training goes on
            name, self._target = self._target.name, None
            self._warn(f"{name} stopped tracking, training goes on: {type(error).__name__}: {error}")


def open_trackers(
    cfg: TrackConfig,
    run_dir: Path,
    config: Mapping[str, Any],
    *,
    step: int = 0,
    process_rank: int = 0,
    warn: Callable[[str], None] = lambda text: None,
) -> Tracker:
    """Start the tracker of `track.to` for the run in `run_dir`, or go on with the one that run had.

    Call it after the process group is up. What the run is called by its tracker is kept in `tracker.json`.

    Args:
        config: the resolved configuration, sent as the run's parameters.
        step: where the run stands; what tensorboard holds after that step no longer shows.
        process_rank: only process 0 tracks.
        warn: told if the tracker fails later.

    Raises:
        UserError: the tracker is unknown, isn't installed or doesn't start.
    """
    if problems := track_problems(cfg):
        raise UserError(problems[0])
    if cfg.to == "none" or process_rank != 0:
        return Tracker()
    from accelerate import PartialState
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS

    PartialState()  # accelerate's log lines refuse to work before it; it takes the process group that is up
    known = _known_run(run_dir, cfg.to)
    run_id = known or uuid.uuid4().hex
    try:
        target = LOGGER_TYPE_TO_CLASS[cfg.to](**_arguments(cfg, run_dir, run_id, known is not None, step))
        # The decorators would ask accelerate which process this is, and on CPU it knows nothing of our ranks.
        target.main_process_only = False
        target.start()
        _remember_run(run_dir, cfg.to, ASSIGNED.get(cfg.to, lambda _: run_id)(target))
        if not (known and cfg.to == "mlflow"):  # whose parameters are written once
            _send_config(target, config, step)
    except Exception as error:
        raise UserError(
            f"track.to={cfg.to} doesn't start: {type(error).__name__}: {error}\n"
            f"Set {cfg.to} up as its own documentation says (login, server), or use track=none."
        ) from error
    return Tracker(target, warn)


ASSIGNED: dict[str, Callable[[Any], str]] = {
    "mlflow": lambda target: str(target.active_run.info.run_id),
    "aim": lambda target: str(target.writer.hash),
    "clearml": lambda target: str(target.task.id),
}
"""Trackers that name a run themselves: where its name is found once it has begun."""


def _arguments(cfg: TrackConfig, run_dir: Path, run_id: str, known: bool, step: int) -> dict[str, Any]:
    """Return what each tracker's class needs to begin the run, or to go on with it where it is known."""
    label = f"{run_dir.resolve().parent.name}/{run_dir.resolve().name}"
    begin: dict[str, Any]
    match cfg.to:
        case "tensorboard":
            return {"run_name": "tensorboard", "logging_dir": run_dir, "purge_step": step + 1 if step else None}
        case "wandb":
            return {"run_name": cfg.project, "dir": run_dir, "name": label, "id": run_id, "resume": "allow"}
        case "mlflow":
            return {"experiment_name": cfg.project, "run_name": label, "run_id": run_id if known else None}
        case "comet_ml":
            return {"run_name": cfg.project, "experiment_key": run_id, "mode": "get_or_create"}
        case "aim":
            begin = {"run_name": label, "logging_dir": run_dir, "experiment": cfg.project}
            return begin | ({"run_hash": run_id} if known else {})
        case "clearml":
            begin = {"run_name": cfg.project, "task_name": label, "reuse_last_task_id": False}
            return begin | ({"continue_last_task": run_id} if known else {})
        case "dvclive":
            return {"run_name": label, "dir": str(run_dir / "dvclive"), "resume": known}
        case "swanlab":
            return {"run_name": cfg.project, "name": label, "id": run_id[:21], "resume": "allow"}  # 21: its rule
        case "trackio":
            return {"run_name": cfg.project, "name": label, "resume": "allow"}
    raise AssertionError(f"no arguments for tracker {cfg.to}")


def _send_config(target: Any, config: Mapping[str, Any], step: int) -> None:
    values = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flatten(config, ".").items()}
    if target.name == "tensorboard":  # its hparams would make one more run, named by the time, at every start
        target.log({"config": "\n".join(f"    {name}: {value}" for name, value in values.items())}, step=step)
    else:
        target.store_init_configuration(values)


def _known_run(run_dir: Path, tracker: str) -> str | None:
    try:
        held = json.loads((run_dir / "tracker.json").read_text())
    except (OSError, ValueError):  # none yet, or cut off by a crash: the tracker begins a new run
        return None
    return held.get(tracker) if isinstance(held, dict) else None


def _remember_run(run_dir: Path, tracker: str, run_id: str) -> None:
    (run_dir / "tracker.json").write_text(json.dumps({tracker: run_id}) + "\n")


def track_problems(cfg: TrackConfig) -> list[str]:
    """Say what is wrong with the tracker asked for: its name, or its package. Imports nothing."""
    if cfg.to == "none":
        return []
    if cfg.to not in PACKAGES:
        known = ["none", *PACKAGES]
        return [f"track.to={cfg.to}: no such tracker; {hint(cfg.to, known)}Use one of: {', '.join(known)}."]
    modules = [cfg.to] + ["tensorboardX"] * (cfg.to == "tensorboard")  # accelerate takes either
    if any(importlib.util.find_spec(module) for module in modules):
        return []
    return [
        f"track.to={cfg.to}: the package {cfg.to} isn't installed. "
        f"Install it with `pip install '{PACKAGES[cfg.to]}'`, or use track=none."
    ]


def flatten(values: Mapping[str, Any], separator: str = "/", prefix: str = "") -> dict[str, Any]:
    """Turn nested mappings into one level: {"memory": {"states": 8}} into {"memory/states": 8}. None is left out."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flatten(value, separator, f"{prefix}{key}{separator}")
        elif value is not None:
            flat[prefix + str(key)] = value
    return flat
