"""The one command for a machine with a GPU: tests and benchmarks that need one, most telling first.

    python -m benchmarks.gpu [--suite NAME] [--minutes N] [--out DIR]

Each suite writes one JSON with machine, versions, commit and date. What did not fit into the minutes is listed as
left out. Without CUDA it says so and exits 2.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.report import RESULTS, print_table, write_result

Job = Callable[[float], dict[str, Any]]
"""Takes the seconds left, returns what it found."""


def call(command: list[str], seconds: float) -> tuple[int, str]:
    """Run a command within `seconds`; return its exit status (124: out of time) and the end of its output."""
    try:
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=max(seconds, 1))
    except subprocess.TimeoutExpired as late:
        return 124, str(late.stdout or "")[-2000:]
    return done.returncode, (done.stdout + done.stderr)[-4000:]


def train_job(overrides: list[str]) -> Job:
    """A training run through the command line; returns its summary and memory.json."""

    def job(seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            status, output = call(["-m", "trainer", *overrides, f"run.dir={folder}/run"], seconds)
            if status:
                return {"exit": status, "output": output}
            found = {
                name: json.loads((Path(folder) / "run" / f"{name}.json").read_text()) for name in ("summary", "memory")
            }
            return {"exit": 0, "command": "python -m trainer " + " ".join(overrides), **found}

    return job


def gpu_tests(seconds: float) -> dict[str, Any]:
    """The tests marked `gpu`."""
    status, output = call(["-m", "pytest", "-q", "-m", "gpu"], seconds)
    return {"exit": status, "output": output}


LLAMA_130M = [
    "model=llama_130m",
    "precision=bf16",
    "data.sequence_length=256",
    "train.global_batch=64",
    "train.micro_batch=64",
]


def counter_on_cpu(seconds: float) -> dict[str, Any]:
    """The same two steps counted on the CPU: by kind it should tell what the GPU's count tells."""
    return train_job(
        [
            *LLAMA_130M,
            "train.micro_batch=8",
            "train.global_batch=8",
            "train.steps=2",
            "run.device=cpu",
            "data.eval_rows=1",
            "checkpoint.every=0",
        ]
    )(seconds)


def counter_on_gpu(seconds: float) -> dict[str, Any]:
    """As `counter_on_cpu`, on the GPU, where the allocator's figures are the truth."""
    return train_job(
        [
            *LLAMA_130M,
            "train.micro_batch=8",
            "train.global_batch=8",
            "train.steps=2",
            "run.device=cuda",
            "data.eval_rows=1",
            "checkpoint.every=0",
        ]
    )(seconds)


def loop_overhead(seconds: float) -> dict[str, Any]:
    """Tokens per second beside the bare loop, llama_130m in bf16."""
    with tempfile.TemporaryDirectory() as folder:
        status, output = call(
            ["-m", "benchmarks.loop_overhead", "--pairs", "3", "--steps", "60", "--out", folder, *LLAMA_130M], seconds
        )
        result = Path(folder) / "loop_overhead.json"
        return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}


def optimizer_steps(sizes: str, arms: str = "", weights: str = "fp32", most: float = 90.0) -> Job:
    """Steady steps and refreshes of the optimizers, in a process of its own, for at most so many seconds."""

    def job(seconds: float) -> dict[str, Any]:
        minutes = 0.6 * min(seconds, most) / 60
        command = ["-m", "benchmarks.optimizer_step", "--sizes", sizes, "--minutes", f"{minutes:.2f}"]
        command += ["--weights", weights]
        with tempfile.TemporaryDirectory() as folder:
            status, output = call([*command, *(["--arms", arms] if arms else []), "--out", folder], seconds)
            result = Path(folder) / "optimizer_step.json"
            return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}

    return job


def offloaded_states(size: str, blocks: int, optim: str) -> Job:
    """Step time and device bytes with states on the host and on disk, beside states that stay."""

    def job(seconds: float) -> dict[str, Any]:
        command = ["-m", "benchmarks.optimizer_offload", "--size", size, "--blocks", str(blocks), "--optim", optim]
        with tempfile.TemporaryDirectory() as folder:
            status, output = call([*command, "--out", folder], seconds)
            result = Path(folder) / "optimizer_offload.json"
            return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}

    return job


WAYS = (
    "torch adamw fused,adamw,galore products bf16,galore,galore tf32,galore bf16,galore bf16 eager,galore_8bit bf16,"
    "apollo,apollo tf32,apollo bf16,apollo bf16 eager,apollo_mini,fira,"
    "adamw_8bit,adamw_8bit eager,bitsandbytes 8bit,adamw_4bit,adamw_fp8,adamw_fp8 eager"
)
"""Every way in which a step can run on CUDA, beside AdamW."""


def amortised(
    size: str, weights: str = "fp32", arms: str = WAYS, gap: int = 200,
    bars: tuple[tuple[str, float], ...] = (("galore bf16", 1.3), ("apollo bf16", 1.1)),
) -> Job:  # fmt: skip
    """Time of a step with its share of a refresh every `gap` steps (nine of ten warm, the tenth a search), over
    AdamW's, on one layer of the shapes of APOLLO's table.

    The authors' (one A100, T=200, length 1024): 1B AdamW 0.036 s, APOLLO 0.051, GaLore 0.371; 7B 0.173, 0.159, 2.874.
    """

    def job(seconds: float) -> dict[str, Any]:
        found = optimizer_steps(size, arms, weights)(seconds)
        if "sizes" not in found:
            return found
        sizes = found["sizes"][size]
        steady = {name: times["median"] for name, times in sizes["steady_seconds"].items()}
        warm, search = ({name: max(value, 0.0) for name, value in sizes[key].items()}
                        for key in ("refresh_extra_seconds", "search_extra_seconds"))  # fmt: skip
        refresh = {name: 0.9 * value + 0.1 * search.get(name, value) for name, value in warm.items()}
        each = {name: seconds + refresh.get(name, 0.0) / gap for name, seconds in steady.items()}
        ratios = {name: seconds / each["torch adamw fused"] for name, seconds in each.items()}
        judged = {
            name: {"found": ratios[name], "at_most": most, "met": ratios[name] <= most}
            for name, most in bars
            if name in ratios
        }
        return {**found, "gap": gap, "amortised_seconds": each, "amortised_over_adamw": ratios, "bars": judged}

    return job


def attention_in_blocks(*lengths: int) -> Job:
    """What attention in a ring's blocks costs over one flash call."""

    def job(seconds: float) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as folder:
            command = ["-m", "benchmarks.sequence", "--blocks", *map(str, lengths), "--out", folder]
            status, output = call(command, seconds)
            result = Path(folder) / "sequence_blocks.json"
            return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}

    return job


BLOCKS_8B = [
    "run.device=cuda",
    "precision=bf16_pure",
    "optim=sgd",
    "model.hidden_size=4096",
    "model.intermediate_size=14336",
    "model.layers=4",
    "model.heads=32",
    "model.kv_heads=8",
    "model.max_length=8192",
    "data.sequence_length=8192",
    "data.eval_rows=1",
    "train.global_batch=1",
    "train.micro_batch=1",
    "train.steps=12",
    "train.log_every=4",
    "train.eval_every=0",
    "checkpoint.every=0",
]
"""Four blocks of LLaMA 8B's shape on one long row: what is saved for backward is most of what is held."""


def blocks_of_8b(*overrides: str) -> Job:
    """Step time and bytes by kind: against `keep`, the first tells how well copies hide, the second what they free."""
    return train_job([*BLOCKS_8B, *overrides])


def rows_of_8b(seconds: float) -> dict[str, Any]:
    """Bytes a token, step time and longest row of every fate that a disk does not slow, in one process."""
    from benchmarks.longest_row import ARMS

    arms = ",".join(arm for arm in ARMS if arm != "disk")
    command = [
        "-m",
        "benchmarks.longest_row",
        "--shape",
        "8b",
        "--rounds",
        "3",
        "--arms",
        arms,
        "--confirm",
        "fp8,host",
    ]
    with tempfile.TemporaryDirectory() as folder:
        status, output = call([*command, "--out", folder], seconds)
        result = Path(folder) / "longest_row.json"
        return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}


def losses(seconds: float) -> dict[str, Any]:
    """Losses through a head of LLaMA 3's size: bytes, time and what is reported, in fp32 and bf16."""
    command = ["-m", "benchmarks.loss", "--rows", "8192", "--hidden", "4096", "--vocabulary", "128256"]
    with tempfile.TemporaryDirectory() as folder:
        status, output = call([*command, "--out", folder], seconds)
        result = Path(folder) / "loss.json"
        return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}


def checkpoints(seconds: float) -> dict[str, Any]:
    """What saves cost the training thread: ours in three modes, torch.save and torch's checkpoints; about 5 GiB."""
    command = ["-m", "benchmarks.checkpoint", "--hidden", "2048", "--layers", "8", "--rounds", "3", "--steps", "8"]
    with tempfile.TemporaryDirectory() as folder:
        status, output = call([*command, "--out", folder], seconds)
        result = Path(folder) / "checkpoint.json"
        return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}


def sharded_on_one_rank(seconds: float) -> dict[str, Any]:
    """Bytes of FSDP2 under zero=3 against the formula, states on the device and on the host; 0.4B weights."""
    with tempfile.TemporaryDirectory() as folder:
        status, output = call(["-m", "benchmarks.one_rank", "--out", folder], seconds)
        result = Path(folder) / "one_rank.json"
        return json.loads(result.read_text()) if result.exists() else {"exit": status, "output": output}


SUITES: dict[str, dict[str, Job]] = {
    "foundation": {
        "main_job": train_job(["run.device=cuda"]),
        "llama_130m_50_steps": train_job(
            [*LLAMA_130M, "optim.rank=256", "train.steps=50", "train.eval_every=0", "checkpoint.every=0"]
        ),
        "gpu_tests": gpu_tests,
        "loop_overhead": loop_overhead,
        "counter_on_gpu": counter_on_gpu,
        "counter_on_cpu": counter_on_cpu,
    },
    "activations": {
        "longest_rows": rows_of_8b,
        "keep": blocks_of_8b(),
        "lean": blocks_of_8b("activations=lean"),
        "host": blocks_of_8b("activations=host"),
        "fp8_storage": blocks_of_8b("activations=fp8"),
        "fp8_products": blocks_of_8b("precision.compute=fp8", "activations=lean"),
        "fp8_both": blocks_of_8b("precision.compute=fp8", "activations=fp8"),
        "recompute": blocks_of_8b("activations=recompute"),
        "recompute_host": blocks_of_8b("activations=recompute_host"),
        "selective": blocks_of_8b("activations=selective"),
        "disk": blocks_of_8b("activations=disk"),
        "int8": blocks_of_8b("activations=int8"),
        "fp8_products_by_rows": blocks_of_8b(
            "precision.compute=fp8", "precision.fp8_recipe=rowwise", "activations=lean"
        ),
    },
    "offload_states": {
        "adamw_8_blocks_of_7b": offloaded_states("7B", 8, "adamw,galore,adamw_8bit"),
        "host": train_job(
            [*LLAMA_130M, "optim=adamw", "offload=host", "train.steps=12", "train.eval_every=0", "checkpoint.every=0"]
        ),
        "resident": train_job(
            [*LLAMA_130M, "optim=adamw", "train.steps=12", "train.eval_every=0", "checkpoint.every=0"]
        ),
        "disk": train_job(
            [*LLAMA_130M, "optim=adamw", "offload=disk", "train.steps=12", "train.eval_every=0", "checkpoint.every=0"]
        ),
    },
    "loss": {"head_of_128256": losses},
    "checkpoints": {"lazy_beside_sync": checkpoints},
    "optimizers": {
        "amortised_7b_layer": amortised("7B"),
        "amortised_7b_layer_bf16_weights": amortised("7B", "bf16"),
        "amortised_1b_layer": amortised("1B"),
        "beside_other_packages_60m_350m": optimizer_steps("60M,350M"),
        "authors_svd_1b_layer": optimizer_steps("1B", "galore products,galore,galore-torch,apollo,apollo-torch"),
        "other_8_bits_7b_layer": optimizer_steps(
            "7B", "adamw_8bit,bitsandbytes 8bit,torchao 8bit,adamw_fp8,torchao fp8"
        ),
    },
    "sharding": {"one_rank_of_fsdp2": sharded_on_one_rank},
    "sequence": {"blocks_32k_to_256k": attention_in_blocks(32768, 65536, 131072, 262144)},
}
"""Each capability adds its own suite here, most telling job first."""


def run_suite(name: str, until: float) -> dict[str, Any]:
    """Run a suite's jobs in order until the time is up; a job that fails is written down and the next one runs."""
    found: dict[str, Any] = {"left_out": []}
    for job_name, job in SUITES[name].items():
        left = until - time.monotonic()
        if left < 10:
            found["left_out"].append(job_name)
            continue
        print(f"{name}: {job_name} ...", flush=True)
        began = time.monotonic()
        found[job_name] = {**job(left), "wall_seconds": round(time.monotonic() - began, 1)}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--suite", choices=sorted(SUITES), help="run only this one")
    parser.add_argument("--minutes", type=float, default=20.0, help="time for everything (default 20)")
    parser.add_argument(
        "--out", type=Path, default=RESULTS, help="folder for the JSON files (default benchmarks/results)"
    )
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print(
            "benchmarks.gpu needs a CUDA device and found none. The CPU benchmarks are the other files of benchmarks/; "
            "`make test` runs what needs no GPU.",
            file=sys.stderr,
        )
        sys.exit(2)
    until = time.monotonic() + 60 * args.minutes
    failed = []
    for name in [args.suite] if args.suite else list(SUITES):
        found = run_suite(name, until)
        path = write_result(f"gpu_{name}", found, args.out)
        jobs = {job: result for job, result in found.items() if isinstance(result, dict)}
        print_table(
            ["job", "exit", "seconds"],
            [[job, str(result.get("exit", 0)), str(result["wall_seconds"])] for job, result in jobs.items()],
        )
        print("written to", path)
        failed += [job for job, result in jobs.items() if result.get("exit", 0)]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
