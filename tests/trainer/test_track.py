"""Trackers: TensorBoard for real, the rest by what they are told and how they fail."""

import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from accelerate import PartialState
from accelerate.tracking import LOGGER_TYPE_TO_CLASS

from trainer.errors import UserError
from trainer.schema import TrackConfig
from trainer.track import PACKAGES, Tracker, flatten, open_trackers, track_problems

needs_tensorboard = pytest.mark.skipif(
    importlib.util.find_spec("tensorboard") is None, reason="needs the package tensorboard"
)
CONFIG = {"optim": {"lr": 0.01, "betas": [0.9, 0.99]}, "recipe": None}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    yield
    PartialState._reset_state()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@needs_tensorboard
def test_tensorboard_holds_what_was_logged_and_a_resume_supersedes_what_came_after_it(tmp_path: Path) -> None:
    cfg = TrackConfig(to="tensorboard")
    tracker = open_trackers(cfg, tmp_path, CONFIG)
    for step in (10, 20, 30):
        tracker.log({"step": step, "loss": 1 / step, "memory": {"weights": 8, "states": step}, "eval_loss": None}, step)
    tracker.close()
    tracker = open_trackers(cfg, tmp_path, CONFIG, step=20)
    tracker.log({"step": 30, "loss": 7.0, "memory": {"weights": 8, "states": 30}}, 30)
    tracker.close()
    found = scalars(tmp_path / "tensorboard")
    assert set(found) == {"loss", "memory/weights", "memory/states"}
    assert found["memory/states"] == [(10, 10.0), (20, 20.0), (30, 30.0)]
    assert found["loss"] == [(10, pytest.approx(0.1)), (20, pytest.approx(0.05)), (30, 7.0)]
    assert [p for p in (tmp_path / "tensorboard").iterdir() if p.is_dir()] == [], "one run, not one a start"


@needs_tensorboard
def test_tensorboard_shows_the_configuration(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    open_trackers(TrackConfig(to="tensorboard"), tmp_path, CONFIG).close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert text.splitlines() == ["    optim.lr: 0.01", "    optim.betas: [0.9, 0.99]"]


def test_none_and_other_processes_track_nothing(tmp_path: Path) -> None:
    for tracker in (
        open_trackers(TrackConfig(to="none"), tmp_path, CONFIG),
        open_trackers(TrackConfig(to=installed()), tmp_path, CONFIG, process_rank=1),
    ):
        tracker.log({"loss": 1.0}, 1)
        tracker.close()
    assert list(tmp_path.iterdir()) == []


def installed() -> str:
    found = [name for name in PACKAGES if not track_problems(TrackConfig(to=name))]
    return found[0] if found else pytest.skip("needs one of the trackers' packages")


@pytest.mark.parametrize("name", [name for name in PACKAGES if importlib.util.find_spec(name) is None])
def test_a_missing_package_is_named_with_its_installation(name: str, tmp_path: Path) -> None:
    if name == "tensorboard" and importlib.util.find_spec("tensorboardX"):
        pytest.skip("tensorboardX takes the place of tensorboard")
    with pytest.raises(UserError, match=rf"track\.to={name}: .*pip install '{PACKAGES[name]}'.*track=none"):
        open_trackers(TrackConfig(to=name), tmp_path, CONFIG)


def test_an_unknown_tracker_is_refused_with_the_nearest_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"track\.to=tensorbord: no such tracker; did you mean tensorboard\?"):
        open_trackers(TrackConfig(to="tensorbord"), tmp_path, CONFIG)


def test_every_tracker_of_accelerate_is_known() -> None:
    assert set(PACKAGES) == set(LOGGER_TYPE_TO_CLASS)


class Recorded:
    """Stands in for accelerate's wandb tracker: same calls, nothing sent."""

    name = "wandb"
    made: list["Recorded"] = []

    def __init__(self, run_name: str, **arguments: Any) -> None:
        self.arguments = {"run_name": run_name, **arguments}
        self.calls: list[Any] = []
        Recorded.made.append(self)

    def start(self) -> None:
        self.calls.append("start")

    def store_init_configuration(self, values: dict[str, Any]) -> None:
        self.calls.append(values)

    def log(self, values: dict[str, Any], step: int) -> None:
        self.calls.append((values, step))

    def finish(self) -> None:
        self.calls.append("finish")


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> type[Recorded]:
    Recorded.made = []
    monkeypatch.setitem(LOGGER_TYPE_TO_CLASS, "wandb", Recorded)
    monkeypatch.setattr("trainer.track.track_problems", lambda cfg: [])
    return Recorded


def test_a_resumed_run_goes_on_under_the_same_id(tmp_path: Path, wandb: type[Recorded]) -> None:
    cfg = TrackConfig(to="wandb", project="papers")
    for _ in range(2):
        open_trackers(cfg, tmp_path, CONFIG).close()
    first, second = wandb.made
    assert first.arguments == second.arguments
    assert (first.arguments["run_name"], first.arguments["resume"]) == ("papers", "allow")
    assert json.loads((tmp_path / "tracker.json").read_text()) == {"wandb": first.arguments["id"]}
    (tmp_path / "other").mkdir()
    open_trackers(cfg, tmp_path / "other", CONFIG).close()
    assert wandb.made[2].arguments["id"] != first.arguments["id"], "another run has its own"
    assert first.calls == ["start", {"optim.lr": 0.01, "optim.betas": "[0.9, 0.99]"}, "finish"]


def test_a_tracker_that_does_not_start_is_the_users_to_mend(
    tmp_path: Path, wandb: type[Recorded], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(self: Recorded) -> None:
        raise RuntimeError("api_key not configured")

    monkeypatch.setattr(wandb, "start", refuse)
    with pytest.raises(UserError, match=r"(?s)track\.to=wandb doesn't start: .*api_key not configured.*track=none"):
        open_trackers(TrackConfig(to="wandb"), tmp_path, CONFIG)


def test_a_tracker_that_fails_later_is_left_alone_after_one_warning() -> None:
    class Failing(Recorded):
        def log(self, values: dict[str, Any], step: int) -> None:
            super().log(values, step)
            raise ConnectionError("no route to host")

    warnings: list[str] = []
    target = Failing("x")
    tracker = Tracker(target, warnings.append)
    tracker.log({"loss": 1.0}, 1)
    tracker.log({"loss": 1.0}, 2)
    tracker.close()
    assert target.calls == [({"loss": 1.0}, 1)]
    assert len(warnings) == 1 and "no route to host" in warnings[0] and "training goes on" in warnings[0]


def test_nested_fields_become_paths() -> None:
    assert flatten({"a": {"b": {"c": 1}, "d": None}, "e": 2.0}) == {"a/b/c": 1, "e": 2.0}
