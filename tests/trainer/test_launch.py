"""The same run through every launcher: alone, torchrun, accelerate launch."""

import functools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.ranks import free_port, on_ranks
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.metrics import read_metrics
from trainer.run import run

REPO = Path(__file__).parents[2]
LAUNCHERS = {
    "alone": [],
    "torchrun": ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "PORT"],
    # --multi_gpu makes accelerate start several processes; with --cpu it starts one, whatever --num_processes says
    "accelerate": [
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "PORT",
    ],
}


Launched = Callable[[str], tuple[Path, str]]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"row {i} " + "learn this " * (1 + i % 4)}) + "\n" for i in range(60)))
    return path


def overrides(text: Path, folder: Path, *more: str) -> list[str]:
    return [
        "data=jsonl",
        f"data.path={text}",
        f"data.cache_dir={text.parent / 'cache'}",
        "data.sequence_length=32",
        "data.eval_fraction=0.2",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.layers=1",
        "model.heads=2",
        "optim=adamw",
        "precision=fp64",
        "train.steps=4",
        "train.global_batch=4",
        "train.micro_batch=1",
        "train.log_every=1",
        "run.device=cpu",
        f"run.dir={folder}",
        *more,
    ]


@pytest.fixture(scope="module")
def launched(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Launched:
    """Folder and output of the run through a launcher and the command line, run once."""

    @functools.cache
    def result(name: str) -> tuple[Path, str]:
        folder = tmp_path_factory.mktemp(name) / "run"
        command = [sys.executable, *(str(free_port()) if part == "PORT" else part for part in LAUNCHERS[name])]
        done = subprocess.run(
            [*command, "-m", "trainer", *overrides(text, folder)],
            cwd=REPO,
            capture_output=True,
            text=True,
            timeout=400,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return folder, done.stdout

    return result


def losses(folder: Path) -> list[float]:
    return [r["loss"] for r in read_metrics(folder / "metrics.jsonl") if "loss" in r]


# the quick suite has another start by accelerate: a user's own file, in test_engine_accelerate.py
ACCELERATE = pytest.param("accelerate", marks=pytest.mark.slow)


@pytest.mark.parametrize("launcher", ["torchrun", ACCELERATE])
def test_two_processes_train_what_one_trains(launched: Launched, launcher: str) -> None:
    assert losses(launched(launcher)[0]) == pytest.approx(losses(launched("alone")[0]), abs=1e-12)
    assert "2 processes" in launched(launcher)[1]


@pytest.mark.parametrize("launcher", ["alone", "torchrun", ACCELERATE])
def test_one_process_prints_and_everything_lies_in_the_run_folder(launched: Launched, launcher: str) -> None:
    folder, output = launched(launcher)
    assert output.count("held-out loss") == 1
    wanted = {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "memory.json",
        "summary.json",
        "plots/loss.png",
        "plots/memory.png",
        "checkpoints/step_00000004/manifest.json",
        "tokenizer/tokenizer_config.json",
    }
    assert {name for name in wanted if not (folder / name).is_file()} == set()
    memory = json.loads((folder / "memory.json").read_text())
    assert set(memory["measured"]) == {"first", "steady"}
    record = read_metrics(folder / "metrics.jsonl")[1]
    assert {"step", "tokens", "loss", "lr", "grad_norm", "tokens_per_second", "seconds", "memory"} <= record.keys()
    assert list(record["memory"]) == ["weights", "gradients", "states", "activations", "workspace"]


def test_a_run_folders_config_runs_again(launched: Launched) -> None:
    from trainer.cli.compose import load_saved

    cfg = load_saved(launched("alone")[0] / "config.yaml")
    assert (cfg.train.steps, cfg.optim.name, cfg.precision.weights.value) == (4, "adamw", "fp64")


def with_own_seed(asked: list[str]) -> str:
    """On each rank: the rank's number as the seed, as if the ranks were started with different commands."""
    with pytest.raises(UserError) as refused:
        run(load([*asked, f"seed={os.environ['RANK']}"]))
    return str(refused.value)


def test_ranks_with_different_configurations_are_refused_on_all(text: Path, tmp_path: Path) -> None:
    messages = on_ranks(2, with_own_seed, overrides(text, tmp_path / "run"))
    assert all(
        "rank 1 was started with another configuration than rank 0 (seed: 0 there, 1 here)" in m for m in messages
    )
    assert not (tmp_path / "run").exists()
