"""The committed documents are current, and the benchmarks run."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import authors, gpu, longest_row, memory_table, one_rank, optimizer_step, sharding
from benchmarks.optimizer_arms import ARMS, Size, gradients


def test_docs_memory_is_what_the_formulas_say() -> None:
    assert memory_table.DOCUMENT.read_text() == memory_table.document(), "run python -m benchmarks.memory_table"


OURS = ["galore products", "galore", "apollo", "apollo_mini", "fira", "cosmos", "adamw", "adamw_8bit", "adamw_fp8"]


@pytest.mark.filterwarnings("ignore:rank=")
def test_optimizer_step_measures_every_arm_and_judges_the_bars(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(optimizer_step.SIZES, "tiny", Size(16, 24, blocks=1, rank=8, svd=True))
    names = [*OURS, "torch adamw fused", "galore-torch", "apollo-torch", "apollo-torch mini"]
    names += ["fira (authors)", "bitsandbytes 8bit", "torchao 8bit"]
    found = optimizer_step.run(["tiny"], names, torch.device("cpu"), minutes=0.05, rounds=3)["sizes"]["tiny"]
    json.dumps(found)
    installed = set(names) - set(found["left_out"])
    assert set(OURS) <= installed and set(found["steady_seconds"]) == installed
    assert found["rounds"] == 3 and found["ratios"]["galore"]["galore products"] > 0
    assert found["captured_over_optimum"]["min"] > 0.9 and "captured / optimum" in found["bars"]
    assert "ms a step" in capsys.readouterr().out


@pytest.mark.parametrize("method", authors.METHODS)
def test_the_authors_mode_trains_a_model_to_the_perplexity_of_their_package(method: str) -> None:
    pytest.importorskip(authors.METHODS[method][2])
    tiny = [
        "data=stdlib",
        "data.path=null",
        "data.eval_path=null",
        "data.eval_rows=8",
        "data.sequence_length=64",
        "train.steps=12",
        "model.layers=1",
    ]
    tiny += ["model.hidden_size=32", "model.intermediate_size=48", "optim.rank=8", "optim.update_proj_gap=5"]
    packages, ours, default = (authors.trained(method, arm, 0, tiny) for arm in ("authors", authors.COMPAT, "default"))
    assert ours == pytest.approx(packages, rel=1e-5)
    assert default != pytest.approx(packages, rel=1e-5)


def test_the_longest_row_fits_and_a_longer_one_would_not(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2,
             "num_key_value_heads": 1, "vocab_size": 128}  # fmt: skip
    monkeypatch.setitem(longest_row.SHAPES, "tiny", sizes)
    monkeypatch.setitem(longest_row.LENGTHS, "tiny", (1024, 2048))
    capacity = 16 << 20
    found = longest_row.run(["keep", "recompute"], "tiny", capacity, 1, ["keep"], torch.device("cpu"))
    keep = found["keep"]
    assert keep["confirmed"]["peak"] == pytest.approx(keep["confirmed"]["expected"], rel=0.03)
    assert keep["peaks"][2048] < keep["confirmed"]["peak"] <= capacity
    assert capacity < keep["fixed_bytes"] + 1.01 * keep["bytes_a_token"] * keep["longest_row"]
    assert found["recompute"]["longest_row"] > 1.5 * keep["longest_row"]


def test_gradients_drift_from_one_another_and_fall_off_as_told() -> None:
    shapes = [(64, 48)]
    (first,), (second,) = (gradients(shapes, torch.device("cpu"), drift=d, seed=0) for d in (0.0, 0.15))
    values = torch.linalg.svdvals(first)
    assert values[0] / values[32] > 3
    assert 0.1 < (first - second).norm() / first.norm() < 0.2


def test_every_rival_and_bar_names_an_arm() -> None:
    named = {name for pair in optimizer_step.BARS for name in pair} | set(optimizer_step.RIVALS)
    named |= {rival for rivals in optimizer_step.RIVALS.values() for rival in rivals}
    assert named <= set(ARMS)


def test_a_steps_share_of_a_refresh_is_counted_and_judged(monkeypatch: pytest.MonkeyPatch) -> None:
    steady = {"torch adamw fused": 1.0, "galore bf16": 1.05, "apollo bf16": 1.2}
    sizes = {
        "steady_seconds": {name: {"median": seconds} for name, seconds in steady.items()},
        "refresh_extra_seconds": {"galore bf16": 40.0, "apollo bf16": -0.1},
        "search_extra_seconds": {"galore bf16": 140.0},
    }
    monkeypatch.setattr(gpu, "optimizer_steps", lambda *_: lambda _: {"sizes": {"7B": sizes}})
    found = gpu.amortised("7B")(60.0)
    assert found["amortised_over_adamw"] == pytest.approx(steady | {"galore bf16": 1.05 + (0.9 * 40 + 14) / 200})
    assert found["bars"]["galore bf16"]["met"] and not found["bars"]["apollo bf16"]["met"]


@pytest.mark.slow
def test_sharding_measures_every_arm_of_both_launches_and_judges_the_bars(capsys: pytest.CaptureFixture[str]) -> None:
    found = sharding.measure(sharding.Size(32, 2, 259, rows=1, length=16, stages=(1, 3)), minutes=0.0)
    json.dumps(found)
    ours = {f"{name} zero={zero}" for name in sharding.OPTIMIZERS for zero in (1, 3)}
    assert set(found["arms"]) == ours | {"FSDP2 by hand", "DeepSpeed ZeRO-1", "DeepSpeed ZeRO-3"}
    assert all(arm["rounds"] == 2 and arm["sent"] > 0 for arm in found["arms"].values())
    assert found["arms"]["adamw zero=3"]["weights"] < found["arms"]["adamw zero=1"]["weights"]
    assert set(found["bars"]) == set(sharding.LOW_RANK)
    sharding.show(found)
    assert "under zero=3 takes" in capsys.readouterr().out


def test_a_low_rank_step_is_compared_with_adamws_of_its_round_and_a_share_of_its_refresh_is_added() -> None:
    def arm(*seconds: float, refresh: tuple[float, ...] = ()) -> dict[str, object]:
        kept = dict.fromkeys(("peak", "weights", "states", "sent"), 1)
        return {**kept, "seconds": list(seconds), "refresh_seconds": list(refresh)}

    usual, low = arm(1.0, 2.0), arm(1.2, 2.4, refresh=(41.2, 82.4))
    arms = sharding.compared([{"adamw zero=3": usual, "galore zero=3": low, "apollo zero=3": arm(1.2, 2.4)}])
    bars = sharding.judged(arms)
    assert bars["galore"]["found"] == pytest.approx(1.4) and not bars["galore"]["met"]
    assert bars["apollo"]["found"] == pytest.approx(1.2) and bars["apollo"]["met"]


def test_fsdp2_on_one_rank_holds_what_the_formula_says_with_states_here_and_on_the_host() -> None:
    found = one_rank.measure(hidden=64, layers=2, length=16)["states"]
    assert [arm["met"] for arm in found.values()] == [True, True]
    assert found["on the host"]["found"]["host"] == found["on the device"]["found"]["states"] > 0
