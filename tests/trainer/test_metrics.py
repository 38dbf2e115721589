"""metrics.jsonl under crashes and resumes, and the clock behind tokens/s and the time to go."""

import json
import math
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer import metrics
from trainer.metrics import MetricsFile, Throughput, occasions, read_metrics


def write(path: Path, steps: list[int]) -> None:
    with MetricsFile(path) as file:
        for step in steps:
            file.append({"step": step, "loss": 10.0 - step})


def steps(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_a_record_comes_back_as_it_was_written(tmp_path: Path) -> None:
    record = {"step": 3, "tokens": 10, "loss": 1.25, "lr": 1e-3, "memory": {"weights": 8, "states": 2**40}}
    with MetricsFile(tmp_path / "metrics.jsonl") as file:
        file.append({**record, "eval_loss": None})
    assert read_metrics(tmp_path / "metrics.jsonl") == [record]


def test_a_line_can_be_read_as_soon_as_append_returns(tmp_path: Path) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.append({"step": 1})
    assert steps(file.path) == [1]
    file.close()


def test_what_is_not_finite_is_written_as_json_and_read_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    values = {"nan": math.nan, "up": math.inf, "down": torch.tensor(-math.inf), "norm": torch.tensor(2.5)}
    with MetricsFile(path) as file:
        file.append({"step": 1, **values, "memory": {"weights": math.nan}})

    def refuse(word: str) -> float:
        raise AssertionError(f"{word} is no JSON")

    json.loads(path.read_text(), parse_constant=refuse)
    (record,) = read_metrics(path)
    assert math.isnan(record["nan"]) and math.isnan(record["memory"]["weights"])
    assert (record["up"], record["down"], record["norm"]) == (math.inf, -math.inf, 2.5)


def test_rewind_takes_out_the_lines_after_the_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 10, 20, 30, 40])
    with MetricsFile(path) as file:
        assert file.rewind(20) == 2
        file.append({"step": 30, "loss": 1.0})
    assert [(r["step"], r["loss"]) for r in read_metrics(path)][-2:] == [(20, -10.0), (30, 1.0)]
    assert steps(path) == [0, 10, 20, 30]


def test_a_run_that_begins_again_begins_the_file_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [0, 10])
    with MetricsFile(path) as file:
        file.rewind(0)
        file.append({"step": 0})
    assert steps(path) == [0]


def test_a_rewind_that_is_interrupted_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20, 30])
    before = path.read_bytes()

    def power_failure(*_: object) -> None:
        raise OSError("power failure")

    file = MetricsFile(path)
    monkeypatch.setattr(metrics.os, "replace", power_failure)
    with pytest.raises(OSError, match="power failure"):
        file.rewind(10)
    assert path.read_bytes() == before


@pytest.mark.parametrize("cut", range(1, 25))
def test_a_half_written_last_line_is_repaired_wherever_it_was_cut(tmp_path: Path, cut: int) -> None:
    path = tmp_path / "metrics.jsonl"
    write(path, [10, 20])
    os.truncate(path, path.stat().st_size - cut)
    assert steps(path) == [10], "the reader leaves it out"
    with MetricsFile(path) as file:
        file.append({"step": 20, "loss": 0.0})
    assert steps(path) == [10, 20]
    assert all(json.loads(line) for line in path.read_text().splitlines())


@given(st.binary(max_size=80))
def test_no_rest_of_a_crash_stops_a_reader_or_a_resume(tmp_path_factory: pytest.TempPathFactory, rest: bytes) -> None:
    path = tmp_path_factory.mktemp("crash") / "metrics.jsonl"
    write(path, [10])
    with path.open("ab") as file:
        file.write(rest)
    assert steps(path) == [10]
    with MetricsFile(path) as again:
        again.append({"step": 20})
    assert steps(path) == [10, 20]


def test_an_absent_file_has_no_records(tmp_path: Path) -> None:
    assert read_metrics(tmp_path / "none.jsonl") == []


class Clock:
    """Seconds that a test moves on by hand."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_speed_leaves_out_evaluation_and_saving() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=100, clock=clock)
    assert (throughput.tokens_per_second, throughput.eta) == (0.0, None)
    clock.now += 10
    throughput.mark(10, 1000)
    with throughput.aside("eval"):
        clock.now += 50
    clock.now += 10
    throughput.mark(20, 2000)
    assert throughput.tokens_per_second == throughput.average == 100.0
    assert throughput.seconds == 70.0


def test_speed_is_that_of_the_window_not_of_the_whole_run() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=1000, window=30, clock=clock)
    for step in range(1, 41):
        clock.now += 10 if step <= 20 else 5
        throughput.mark(step, 100 * step)
    assert throughput.tokens_per_second == 20.0
    assert throughput.average == pytest.approx(4000 / 300)


def test_time_to_go_has_the_evaluations_and_saves_still_due_at_their_measured_cost() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=100, every={"eval": 25, "save": 0, "plots": 10}, clock=clock)
    with throughput.aside("eval"):
        clock.now += 4
    clock.now += 20
    throughput.mark(10, 10)
    assert throughput.eta == 90 * 2 + 4 * 4
    clock.now += 30
    throughput.mark(25, 25)
    with throughput.aside("eval"):
        clock.now += 8
    with throughput.aside("save"):
        clock.now += 1
    assert throughput.eta == 75 * 2 + 3 * 6 + 1


def test_steps_slowed_down_by_measuring_do_not_count_until_there_are_others() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=10, clock=clock)
    with throughput.aside("count", steps=1, tokens=100):
        clock.now += 5
    throughput.mark(1, 100)
    assert (throughput.tokens_per_second, throughput.eta) == (20.0, 45.0)
    clock.now += 1
    throughput.mark(2, 200)
    assert (throughput.tokens_per_second, throughput.average, throughput.eta) == (100.0, 100.0, 8.0)


def test_a_resumed_run_goes_on_counting_seconds_but_not_speed() -> None:
    clock = Clock()
    throughput = Throughput(total_steps=100, step=50, tokens=5000, seconds=600, clock=clock)
    clock.now += 10
    throughput.mark(60, 6000)
    assert (throughput.tokens_per_second, throughput.average) == (100.0, 100.0)
    assert (throughput.seconds, throughput.eta) == (610.0, 40.0)


@given(st.integers(0, 50), st.integers(0, 60), st.integers(0, 60))
def test_occasions_are_counted_as_the_loop_meets_them(every: int, step: int, total: int) -> None:
    met = [s for s in range(step + 1, total + 1) if s == total or (every > 0 and s % every == 0)]
    assert occasions(every, step, total) == len(met)
