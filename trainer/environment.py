"""What a run ran on, for `environment.json`: enough to explain a difference between two runs, and no secrets."""

import importlib.metadata
import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

LIBRARIES = (
    "torch",
    "transformers",
    "accelerate",
    "datasets",
    "hydra-core",
    "omegaconf",
    "tokenizers",
    "safetensors",
    "numpy",
    "matplotlib",
    "rich",
    "triton",
    "deepspeed",
    "bitsandbytes",
    "flash-attn",
    "tensorboard",
    "wandb",
)
"""Distributions whose version is noted where they are installed: our dependencies, then what runs may use."""

SECRET_KEY = re.compile(r"(?i)^(.*(?:^|[._\-])(?:token|secret|password|passwd|api_?key|credentials?))=.+$", re.DOTALL)
SECRET_IN_URL = re.compile(r"(?<=://)[^/@\s]+@")


def environment() -> dict[str, Any]:
    """Describe machine, software and call. Every value is JSON; what cannot be found out is None."""
    cuda = torch.cuda.is_available()
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _cudnn() if cuda else None,
        "driver": _driver() if cuda else None,
        "gpus": [_gpu(i) for i in range(torch.cuda.device_count())] if cuda else [],
        "cpu": _cpu_name(),
        "cores": os.cpu_count(),
        "usable_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "world_size": dist.get_world_size() if dist.is_initialized() else 1,
        "libraries": {name: version for name in LIBRARIES if (version := _version(name))},
        "git": git_state(Path.cwd()),
        "command": without_secrets(sys.argv),
    }


def without_secrets(arguments: Sequence[str]) -> list[str]:
    """Blank the values of arguments named like a secret (`hub.token=...`), and passwords inside addresses."""
    return [SECRET_IN_URL.sub("***@", SECRET_KEY.sub(r"\1=***", argument)) for argument in arguments]


def git_state(folder: Path) -> dict[str, Any] | None:
    """Return the commit `folder` is at and whether files that git tracks were changed; None outside git."""
    commit = _output("git", "-C", str(folder), "rev-parse", "--verify", "HEAD")
    if commit is None:
        return None
    changed = _output("git", "-C", str(folder), "--no-optional-locks", "status", "--porcelain", "-uno")
    return {"commit": commit, "changed": changed != ""}


def _driver() -> str | None:
    return _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")


def _cudnn() -> str | None:
    number: int | None = torch.backends.cudnn.version()  # type: ignore[no-untyped-call]
    return None if number is None else f"{number // 10000}.{number // 100 % 100}.{number % 100}"


def _gpu(index: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(index)
    return {"name": found.name, "memory": found.total_memory, "capability": f"{found.major}.{found.minor}"}


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or None
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    """Run a command and return what it printed, stripped; None where it fails or there is no such program."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
