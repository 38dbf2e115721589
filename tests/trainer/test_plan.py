"""What `stowage plan` predicts is what a run then holds."""

import json
import random
import resource
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker

from parallel.launch import World, connected
from tests.ranks import on_ranks
from trainer import plan as planning
from trainer.build import Trainable, make_trainable
from trainer.cli import main as cli
from trainer.cli.compose import load
from trainer.cli.plan import main as plan_command
from trainer.data.batch import Batch, StepBatch
from trainer.data.hub import is_reachable
from trainer.errors import UserError
from trainer.memory import KINDS, MemoryMeter, Peak
from trainer.model import build_model
from trainer.plan import Plan, alternatives, counting_device, planned_config, predict
from trainer.plan_report import plan_text
from trainer.run import run
from trainer.schema import Config
from trainer.step import train_step

CPU = torch.device("cpu")
SMALL = ["model.layers=2", "data.sequence_length=32", "train.global_batch=4", "train.micro_batch=4", "run.device=cpu"]
NARROW = ["model.hidden_size=32", "model.intermediate_size=48", "model.heads=4"]

Peaks = list[dict[str, Peak]]


def peaks(plan: Plan) -> Peaks:
    return [timeline.peak_by_phase for timeline in plan.steps.values()]


def plan(*overrides: str, ranks: int = 1, config: Any = None) -> Plan:
    cfg = load([*SMALL, *overrides])
    return predict(cfg, config or planned_config(cfg), ranks=ranks, device=CPU)


def real_rows(cfg: Config, ranks: int) -> StepBatch:
    """One rank's share of a step, each row of several documents."""
    shape = (cfg.train.global_batch // ranks, cfg.data.sequence_length)
    positions = (torch.arange(shape[1]) % 11).expand(shape).contiguous()
    rows = Batch(torch.randint(0, 90, shape), torch.randint(0, 90, shape), positions)
    return StepBatch(rows.split(cfg.train.micro_batch), targets=100, first_sample=0)


def build_on(cfg: Config, world: World, config: Any = None) -> Trainable:
    config = config or planned_config(cfg)
    return make_trainable(cfg, world, build_model(cfg.model, config, weights=cfg.precision.weights, device=CPU, seed=0))


def real_peaks(overrides: list[str], config: Any = None) -> Peaks:
    """Peaks of two real steps of a process alone."""
    return real_peaks_on(World(), load([*SMALL, *overrides]), config)


def real_peaks_on(world: World, cfg: Config, config: Any = None) -> Peaks:
    """Peaks of two real steps on this process's rank."""
    found = []
    trainable = build_on(cfg, world, config)
    for step in (0, 1):
        batch = real_rows(cfg, world.process_count)
        with trainable.meter.count_step() as timeline:
            train_step(trainable, batch, step, stop=0)
        found.append(timeline.peak_by_phase)
    return found


def real_peaks_of_rank(runs: list[list[str]]) -> list[Peaks]:
    cfgs = [load([*SMALL, *overrides]) for overrides in runs]
    with connected(cfgs[0].parallel, "cpu", 1) as world:
        return [real_peaks_on(world, cfg) for cfg in cfgs]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("micro_batch", [4, 1], ids=["at-once", "in-4-micro-steps"])
@pytest.mark.parametrize("activations", ["keep", "recompute"])
@pytest.mark.parametrize("optim", ["adamw", "galore"])
def test_the_predicted_bytes_of_every_kind_and_phase_are_the_measured_ones(
    optim: str, activations: str, micro_batch: int, precision: str
) -> None:
    overrides = [
        f"optim={optim}", f"activations={activations}", f"train.micro_batch={micro_batch}", f"precision={precision}",
    ]  # fmt: skip
    assert peaks(plan(*overrides)) == real_peaks(overrides)


@pytest.mark.parametrize(
    "overrides",
    [
        ["precision=bf16_pure"],
        ["precision=fp64"],
        ["model.dropout=0.1", "activations=recompute"],
        ["model.attention=eager"],
        *(
            [f"activations={fate}", "activations.min_bytes=0", "precision=bf16"]
            for fate in ("host", "disk", "fp8", "int8")
        ),
        ["activations=selective", "precision=bf16_pure"],
        ["activations=recompute_host", "activations.min_bytes=0", "train.micro_batch=2"],
        ["activations.rules=['mlp -> recompute','self_attn -> disk']", "activations.min_bytes=0"],
        ["activations.tile_mlp=3"],
        ["activations=lean", "model.kv_heads=2", "precision=bf16_pure"],
        ["optim=galore", "optim.refresh=svd", "optim.update_proj_gap=1"],
        ["train.clip_norm=0.0001", "model.tie_embeddings=true", "model.kv_heads=2"],
    ],
    ids=lambda overrides: " ".join(overrides),
)
def test_other_options_are_predicted_to_the_byte_as_well(overrides: list[str]) -> None:
    assert peaks(plan(*NARROW, *overrides)) == real_peaks([*NARROW, *overrides])


FAMILY: dict[str, Any] = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
FAMILIES = {
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=96, n_embd=32, n_layer=2, n_head=4, n_positions=64, bos_token_id=0, eos_token_id=0
    ),
    "qwen3": lambda: transformers.Qwen3Config(**FAMILY, num_key_value_heads=2, head_dim=8),
    "gemma3": lambda: transformers.Gemma3TextConfig(**FAMILY, num_key_value_heads=2, head_dim=8),
    "mistral": lambda: transformers.MistralConfig(**FAMILY, num_key_value_heads=2),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_other_families_are_predicted_to_the_byte(family: str) -> None:
    assert peaks(plan("optim.rank=4", config=FAMILIES[family]())) == real_peaks(["optim.rank=4"], FAMILIES[family]())


def test_a_step_whose_sizes_depend_on_values_is_refused_with_what_to_do_instead() -> None:
    config = transformers.MixtralConfig(
        **FAMILY, num_key_value_heads=2, num_local_experts=4, experts_implementation="eager"
    )
    with pytest.raises(UserError, match=r"(?s)MixtralForCausalLM cannot be predicted.*Train a few steps"):
        plan(config=config)


def test_a_rank_of_two_is_predicted_with_the_buckets_of_ddp() -> None:
    plain = [*NARROW, "loss=plain"]  # a chunked one holds the head's gradient beside its bucket
    at_once = [*plain, "optim=galore", "train.micro_batch=2", "parallel.bucket_mib=1"]
    accumulated = [*plain, "optim=adamw", "train.micro_batch=1", "activations=recompute", "precision=bf16"]
    chunked = [*NARROW, "optim=galore", "train.micro_batch=2", "parallel.bucket_mib=1"]
    first, second = on_ranks(2, real_peaks_of_rank, [at_once, accumulated, chunked])
    assert first == second
    assert peaks(plan(*chunked, ranks=2)) == first.pop()
    for overrides, real, copies in zip((at_once, accumulated), first, (1, 2), strict=True):
        predicted = peaks(plan(*overrides, ranks=2))
        assert predicted == real
        # Accumulated gradients lie beside the buckets they are copied into: DDP's price for steps without exchange.
        held = predicted[1]["backward"].by_kind
        assert copies * (held["weights"] - 32) == held["gradients"]  # weights hold 32 bytes of rotary frequencies


def test_the_predicted_peak_is_within_5_percent_of_torchs_own_tracker() -> None:
    cfg = load([*SMALL, "optim=galore"])
    ours = predict(cfg, planned_config(cfg), ranks=1, device=CPU).steps["first"].peak.total
    with FakeTensorMode():
        trainable = build_on(cfg, World())
        batch = planning.made_up_batch(cfg, 1)
        tracker = MemTracker()
        tracker.track_external(trainable.model, trainable.optimizer, *vars(batch.micros[0]).values())
        with tracker:
            train_step(trainable, batch, 0, stop=0)
    theirs = tracker.get_tracker_snapshot("peak")[CPU]["Total"]
    assert ours == pytest.approx(theirs, rel=0.05)


def test_a_run_writes_the_prediction_beside_what_it_measured(tmp_path: Path) -> None:
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"document {n}"}) + "\n" for n in range(200)))  # several in every row
    cfg = load(
        [*SMALL, *NARROW, "data=jsonl", f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", "optim=galore",
         "train.steps=2", "train.micro_batch=2", f"run.dir={tmp_path / 'run'}", "run.threads=1"]
    )  # fmt: skip
    run(cfg)
    written = json.loads((tmp_path / "run" / "memory.json").read_text())
    assert list(written) == ["predicted", "measured", "host"]
    assert written["host"]["predicted"] == written["host"]["measured"]
    for step in ("first", "steady"):
        for part in ("peak", "peak_by_phase"):
            assert written["predicted"][step][part] == written["measured"][step][part]


def test_a_prediction_leaves_everything_as_it_was() -> None:
    cfg, fresh = load([*SMALL, "optim=galore"]), load([*SMALL, "optim=galore"])
    config = planned_config(cfg)
    described = config.to_dict()

    def state() -> list[Any]:
        threads, mode = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
        return [torch.get_rng_state().tolist(), str(np.random.get_state()), random.getstate(), threads, mode]

    before = state()
    predict(cfg, config, ranks=2, device=CPU)
    assert state() == before
    assert cfg == fresh and config.to_dict() == described and config._attn_implementation_internal is None
    assert not torch.distributed.is_initialized()
    assert type(torch.zeros(1)) is torch.Tensor


def test_a_count_on_fakes_leaves_the_allocators_statistics_to_a_run_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("memory_stats", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device: pytest.fail("asked the allocator"))
    device = torch.device("cuda", 0)
    with FakeTensorMode():  # without autograd, which a torch without CUDA cannot run on fake CUDA tensors
        model = torch.nn.Module()
        model.weight = torch.nn.Parameter(torch.empty(64, device=device), requires_grad=False)
        optimizer = torch.optim.SGD(model.parameters())
        with MemoryMeter(model, optimizer, device, allocator=False).count_step() as timeline:
            model.weight * 2
    assert timeline.peak.total == 2 * 256 and timeline.allocator == {}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_plan_for_cuda_is_within_10_percent_of_the_allocators_peak() -> None:
    cfg = load(["model=llama_60m", "optim=galore", "train.global_batch=8", "train.micro_batch=8", "precision=bf16"])
    device = counting_device(cfg)
    predicted = predict(cfg, planned_config(cfg), ranks=1, device=device)
    model = build_model(cfg.model, planned_config(cfg), weights=cfg.precision.weights, device=device, seed=0)
    trainable = make_trainable(cfg, World(device=device), model)
    for step in (0, 1):
        with trainable.meter.count_step() as timeline:
            train_step(trainable, real_rows(cfg, 1), step, stop=0)
    assert predicted.steps["steady"].peak.total == pytest.approx(timeline.peak.total, rel=0.1)


def test_a_7b_model_is_planned_without_the_memory_of_one() -> None:
    """Four of its 32 blocks, for speed; one block's weights alone are 400 MB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    planned = plan("model=llama_7b", "model.layers=4", "data.sequence_length=2048", "precision=bf16_pure")
    assert planned.peak.by_kind["weights"] > 2 * 1.0e9
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000, "KiB"


@pytest.mark.slow
def test_a_whole_7b_model_is_planned_within_a_minute() -> None:
    begin = time.monotonic()
    plan(
        "model=llama_7b", "model.layers=32", "optim=galore", "data.sequence_length=2048", "precision=bf16_pure",
        "train.micro_batch=1", "train.global_batch=1",
    )  # fmt: skip
    assert time.monotonic() - begin < 60


def test_many_micro_steps_take_no_longer_than_three(monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[int] = []
    genuine = planning.train_step

    def counted(trainable: Any, batch: StepBatch, *args: Any, **kwargs: Any) -> Any:
        taken.append(len(batch.micros))
        return genuine(trainable, batch, *args, **kwargs)

    monkeypatch.setattr(planning, "train_step", counted)
    planned = plan(*NARROW, "train.global_batch=512", "train.micro_batch=1")
    assert taken == [3, 3]
    at_rest = planned.steps["steady"].peak_by_phase["clip"]
    assert at_rest.by_kind["workspace"] > 3 * 8 * 512 * 32  # the rows of all 512 are there nonetheless


IN_BACKWARD = "optim.in_backward=true train.clip_by=parameter"


def test_other_choices_are_those_that_differ_most_promising_first() -> None:
    cfg = load(SMALL)
    peak = Peak(30, {"weights": 4, "gradients": 4, "states": 20, "activations": 1, "workspace": 1}, "step", 0)
    found = alternatives(cfg, peak)
    assert list(found) == [
        "optim=adamw", "optim=adamw_8bit", "optim=apollo_mini", "precision=bf16_pure", IN_BACKWARD,
        "train.micro_batch=2", "activations=recompute", "activations=host", "activations=fp8", "precision=bf16",
    ]  # fmt: skip
    assert found["train.micro_batch=2"] == replace(cfg, train=replace(cfg.train, micro_batch=2))
    done = load([*SMALL, "train.micro_batch=1", "precision=bf16_pure", "activations=recompute", "optim=adamw"])
    assert list(alternatives(done, peak)) == ["optim=galore", "optim=adamw_8bit", "optim=apollo_mini", IN_BACKWARD]
    for override, changed in alternatives(cfg, peak).items():
        chosen = load([*SMALL, *override.split()])
        assert changed == replace(chosen, optim=changed.optim)


Output = pytest.CaptureFixture[str]


@contextmanager
def no_network(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    tried: list[str] = []

    def refuse(*args: Any, **kwargs: Any) -> None:
        tried.append(str(args[-1]))
        raise OSError("no network in this test")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    is_reachable.cache_clear()
    yield
    assert not tried, "a plan asked the network"


def test_the_table_marks_the_peak_and_names_what_lowers_it_within_80_columns(capsys: Output) -> None:
    assert cli.main(["plan", *SMALL, "optim=adamw", "data.sequence_length=256"]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = next(line for line in lines if line.startswith("peak of"))
    assert heads.split()[2:] == [*KINDS, "total"]
    assert sum(line.startswith("> backward") for line in lines) == 1 and len(heads) <= 80
    assert any("% of that are activations." in line for line in lines)
    assert any(line == "precision=bf16_pure would lower it most." for line in lines)
    rows = {line.split()[0]: line.split()[-1] for line in lines if "=" in line and "%" in line}
    assert rows["activations=recompute"].startswith("-") and rows["precision=bf16_pure"].startswith("-")
    assert "Not included" in " ".join(lines)


def test_choices_there_is_no_time_for_are_named(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("trainer.cli.plan.SECONDS", 0.0)
    assert plan_command([*SMALL, *NARROW]) == 0
    out = capsys.readouterr().out
    assert "Not tried" in out and out.count("optim=apollo_mini") == 1
    assert plan_command([*SMALL, *NARROW, "--alone"]) == 0
    assert "optim=apollo_mini" not in capsys.readouterr().out


def test_json_holds_the_bytes_of_one_rank(capsys: Output) -> None:
    assert plan_command(["--json", "--ranks", "2", "--alone", *SMALL, *NARROW, "train.micro_batch=1"]) == 0
    found = json.loads(capsys.readouterr().out)
    planned = plan(*NARROW, "train.micro_batch=1", ranks=2)
    assert found["peak"]["total"] == planned.peak.total == sum(found["peak"]["by_kind"].values())
    assert found["predicted"] == planned.to_json()
    assert (found["ranks"], found["micro_steps"], found["counted_on"]) == (2, 2, "cpu")


def test_a_plan_for_cuda_says_that_it_was_counted_on_the_cpu() -> None:
    cfg = load([*SMALL, *NARROW, "run.device=cuda"])
    planned = plan(*NARROW)
    if counting_device(cfg) == CPU:
        text = " ".join(plan_text(cfg, planned, {}, []).split())
        assert "no CUDA here" in text and "CUDA context" in text
        assert "1 process on cuda" in text


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["--ranks", "0"], "--ranks 0: must be at least 1"),
        (["--ranks", "3"], "train.global_batch=4: does not split into train.micro_batch=4 x 3 ranks"),
        (["optim.typo=1"], "optim.typo"),
        (["--rank", "2"], "unrecognized arguments: --rank"),
        (["optim=galore", "optim.targets=nowhere"], "optim.targets"),
        (["data.tokenizer=nobody/nothing"], "A plan downloads nothing; give model.vocab_size=N"),
        (["model=hf", "model.path=nobody/nothing"], "model.path=nobody/nothing: no such folder"),
    ],
    ids=lambda value: str(value[-1]) if isinstance(value, list) else "",
)
def test_mistakes_are_told_with_exit_code_2(
    overrides: list[str], message: str, capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    with no_network(monkeypatch):
        small = [o for o in SMALL if not (o.startswith("model.") and "model=hf" in overrides)]
        assert cli.main(["plan", *small, *overrides]) == 2
    assert message in capsys.readouterr().err


def test_nothing_is_read_but_the_models_own_description(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Not even a tokenizer that is not here, where the vocabulary is known without it."""
    monkeypatch.chdir(tmp_path)
    with no_network(monkeypatch):
        assert cli.main(["plan", "--alone", *SMALL, *NARROW, "data.tokenizer=a/b", "model.vocab_size=96"]) == 0
    assert list(tmp_path.iterdir()) == []
