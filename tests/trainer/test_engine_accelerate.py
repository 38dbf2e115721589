"""A file of `accelerate config` drives processes, precision and sharding, through the engines that do the work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.ranks import free_port
from tests.trainer import tiny
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.metrics import read_metrics
from trainer.schema import Config

REPO = Path(__file__).parents[2]
DDP = {"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}
FSDP = {**DDP, "ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_RESHARD_AFTER_FORWARD": "true"}
DEEPSPEED = {**DDP, "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}


def loaded(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch, *overrides: str) -> Config:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return load([*tiny.MODEL, "optim=adamw", "parallel.engine=accelerate", *overrides])


CHOICES: dict[str, tuple[dict[str, str], tuple[str, int, str]]] = {
    "ddp": (DDP, ("torch", 0, "fp32")),
    "bf16": ({**DDP, "ACCELERATE_MIXED_PRECISION": "bf16"}, ("torch", 0, "bf16")),
    "fsdp2": (FSDP, ("torch", 3, "fp32")),
    "fsdp2 kept": ({**FSDP, "FSDP_RESHARD_AFTER_FORWARD": "false"}, ("torch", 2, "fp32")),
    "deepspeed": ({**DEEPSPEED, "ACCELERATE_MIXED_PRECISION": "bf16"}, ("deepspeed", 3, "bf16")),
}


@pytest.mark.parametrize("choice", CHOICES)
def test_the_file_decides_engine_stage_and_precision(choice: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, wanted = CHOICES[choice]
    cfg = loaded(environment, monkeypatch)
    assert (cfg.parallel.engine.value, cfg.parallel.zero, cfg.precision.compute.value) == wanted


def test_a_deepspeed_configuration_of_its_own_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    values: dict[str, Any] = {
        "bf16": {"enabled": True},
        "train_batch_size": "auto",
        "optimizer": {"params": {"lr": "auto"}},
        "zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}, "reduce_bucket_size": "auto"},
    }
    path = tmp_path / "deepspeed.json"
    path.write_text(json.dumps(values))
    cfg = loaded({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(path)}, monkeypatch)
    assert (cfg.parallel.zero, cfg.precision.compute.value) == (2, "bf16")
    assert cfg.deepspeed == {"zero_optimization": {"offload_optimizer": {"device": "cpu"}}}
    path.write_text(json.dumps(values | {"optimizer": {"type": "Adam"}, "gradient_clipping": 0.25}))
    with pytest.raises(UserError) as refused:
        loaded({}, monkeypatch)
    assert "deepspeed.optimizer.type=Adam: is decided here by optim=NAME" in str(refused.value)
    assert "deepspeed.gradient_clipping=0.25: contradicts train.clip_norm, by which it is 0.5" in str(refused.value)


REFUSED: dict[str, tuple[dict[str, str], list[str], str]] = {
    "no launcher": ({}, [], "was not started by accelerate; start it with `accelerate launch"),
    "fp16": ({**DDP, "ACCELERATE_MIXED_PRECISION": "fp16"}, [], "write no or bf16 there"),
    "precision": (DDP, ["precision=bf16_pure"], "contradicts mixed_precision: no of accelerate's file"),
    "stage": (FSDP, ["parallel.zero=1"], "contradicts accelerate's file, which means parallel.zero=3"),
    "fsdp 1": ({**FSDP, "FSDP_VERSION": "1"}, [], "write fsdp_version: 2 in it"),
    "fsdp offload": ({**FSDP, "FSDP_OFFLOAD_PARAMS": "true"}, [], "asks for fsdp_offload_params"),
    "recompute": ({**FSDP, "FSDP_ACTIVATION_CHECKPOINTING": "true"}, [], "use activations=recompute"),
    "compile": ({**DDP, "ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, [], "asks for dynamo_backend inductor"),
    "no json": ({**DEEPSPEED, "ACCELERATE_DEEPSPEED_CONFIG_FILE": "/nowhere"}, [], "cannot be read"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_the_file_says_and_nothing_does_is_refused(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    environment, overrides, text = REFUSED[case]
    with pytest.raises(UserError) as refused:
        loaded(environment, monkeypatch, *overrides)
    assert text in str(refused.value)


def test_fsdp2_of_a_users_own_file_shards_on_a_cpu_too(tmp_path: Path) -> None:
    file = tmp_path / "accelerate.yaml"
    fsdp = {"fsdp_version": 2, "fsdp_reshard_after_forward": True, "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP"}
    content = {"compute_environment": "LOCAL_MACHINE", "distributed_type": "FSDP", "fsdp_config": fsdp}
    content |= {"mixed_precision": "no", "num_machines": 1, "num_processes": 2, "use_cpu": False, "machine_rank": 0}
    file.write_text(yaml.safe_dump(content))
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"text": f"row {i} " + "learn this " * (1 + i % 4)}) + "\n" for i in range(60)))
    overrides = [
        *("data=jsonl", f"data.path={text}", f"data.cache_dir={tmp_path / 'cache'}", "data.sequence_length=32"),
        *("data.eval_fraction=0.2", "model.hidden_size=32", "model.intermediate_size=48", "model.layers=1"),
        *("model.heads=2", "optim=adamw", "train.steps=2", "train.global_batch=4", "train.micro_batch=1"),
        *("train.log_every=1", "run.device=cpu", f"run.dir={tmp_path / 'run'}", "track=tensorboard"),
    ]
    launcher = ["-m", "accelerate.commands.launch", "--config_file", str(file), "--main_process_port", str(free_port())]
    done = subprocess.run(
        [sys.executable, *launcher, "-m", "trainer", "parallel.engine=accelerate", *overrides],
        cwd=REPO, capture_output=True, text=True, timeout=240, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    resolved = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert (resolved["parallel"]["engine"], resolved["parallel"]["zero"]) == ("torch", 3)
    assert "2 processes" in done.stdout
    assert [r["step"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "loss" in r] == [1, 2]
    assert list((tmp_path / "run").rglob("events.out.tfevents.*")), "the tracker goes through accelerate as always"
