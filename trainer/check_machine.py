"""What a machine lacks for a configuration: packages, and devices of its kind.

Part of `trainer.check`; but for `check_hardware`, which asks torch about devices, imports no torch either.
"""

import importlib.metadata
import importlib.util
import os
from pathlib import Path

from trainer.errors import UserError
from trainer.loss.config import LossConfig, LossKind
from trainer.schema import Attention, Config, Device, Dtype

LOSS_PACKAGES = {
    LossKind.cce: ("cut_cross_entropy", "cut-cross-entropy"),
    LossKind.liger: ("liger_kernel", "liger-kernel"),
}
"""Module and distribution that a kind of loss needs."""


def package_problems(cfg: LossConfig) -> list[str]:
    """Some kinds of loss are packages of their own."""
    if cfg.kind is LossKind.torch and not torch_has_the_loss():
        found = importlib.metadata.version("torch")
        return [
            f"loss=torch: torch {found} has no linear_cross_entropy yet; use loss=chunked, which does the same, or a "
            "newer torch (2.13 has it)"
        ]
    module, name = LOSS_PACKAGES.get(cfg.kind, ("", ""))
    if not module or importlib.util.find_spec(module) is not None:
        return []
    return [f"loss={cfg.kind.value}: the package {name} isn't installed; install it, or use loss=chunked"]


def torch_has_the_loss() -> bool:
    """Whether torch's functions have linear_cross_entropy, by their text: importing torch takes seconds."""
    spec = importlib.util.find_spec("torch")
    assert spec is not None and spec.origin is not None, "torch is installed"
    return "def linear_cross_entropy" in (Path(spec.origin).parent / "nn" / "functional.py").read_text()


def float8_problems(compute: Dtype) -> list[str]:
    """Products in FP8 are torchao's."""
    if compute is not Dtype.fp8 or importlib.util.find_spec("torchao") is not None:
        return []
    return [
        "precision.compute=fp8: the package torchao isn't installed; install it with `pip install torchao`, or use "
        "precision.compute=bf16"
    ]


def check_hardware(cfg: Config) -> None:
    """Hold the configuration against the machine. Imports torch, so it comes after everything else.

    Raises:
        UserError: names everything that this machine lacks.
    """
    import torch

    devices = torch.cuda.device_count() if torch.cuda.is_available() else 0
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("WORLD_SIZE", "1")))
    on_cuda = cfg.run.device is Device.cuda or (cfg.run.device is Device.auto and devices > 0)
    found = []
    if cfg.run.device is Device.cuda and not devices:
        found.append("run.device=cuda: torch finds no CUDA device here; use run.device=auto, or a torch built for CUDA")
    elif on_cuda and local_ranks > devices:
        found.append(
            f"{local_ranks} ranks on this machine: it has {devices} CUDA devices; "
            f"start {devices} ranks, or use run.device=cpu"
        )
    bf16 = {Dtype.bf16, Dtype.fp8} & {cfg.precision.weights, cfg.precision.compute}
    if devices and on_cuda and cfg.precision.compute is Dtype.fp8 and torch.cuda.get_device_capability() < (8, 9):
        found.append(
            f"precision.compute=fp8: {torch.cuda.get_device_name()} has no tensor cores for FP8 (capability 8.9); "
            "use precision.compute=bf16"
        )
    if devices and on_cuda and bf16 and not torch.cuda.is_bf16_supported():
        found.append(f"precision.compute=bf16: {torch.cuda.get_device_name()} has no bf16; use precision=fp32")
    if cfg.optim.name.startswith("bnb_paged_") and not on_cuda:
        plain = "adamw" if cfg.optim.name == "bnb_paged_adamw" else cfg.optim.name.replace("paged_", "")
        found.append(f"optim={cfg.optim.name}: pages between CUDA's memory and the host; on a CPU use optim={plain}")
    if cfg.loss.kind is LossKind.liger and not on_cuda:
        found.append("loss=liger: its kernels run on CUDA alone; use loss=chunked")
    if cfg.model.attention is Attention.flash_attention_2 and not on_cuda:
        found.append("model.attention=flash_attention_2: runs on CUDA alone; use model.attention=sdpa")
    if found:
        raise UserError("\n".join(found))
