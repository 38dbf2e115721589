"""What a configuration gets wrong about other tiers: who may use them, and whether their folders can be written.

Part of `trainer.check`; imports no torch either.
"""

import os
import shutil
import tempfile
from pathlib import Path

from offload.config import ActivationsConfig, Fate, OffloadConfig, StatePlace, StepPlace, WhenFull
from parallel.config import EngineName
from trainer.schema import Config


def states_problems(cfg: Config) -> list[str]:
    """Some engines and optimizers move states by themselves."""
    asked = f"offload.states={cfg.offload.states.value}"
    if cfg.offload.states is StatePlace.none:
        return []
    found = []
    if cfg.parallel.engine is EngineName.deepspeed:
        found.append(
            f"{asked}: parallel.engine=deepspeed places states itself; use offload.states=none with "
            "deepspeed.zero_optimization.offload_optimizer.device=cpu, or parallel.engine=torch, which moves them at "
            "the same parallel.zero"
        )
    if cfg.offload.gradients and cfg.optim.in_backward:
        found.append(
            "offload.gradients=true: with optim.in_backward=true each gradient is stepped with and freed as soon as it "
            "is complete, so that none is left to leave; use one of the two"
        )
    if cfg.offload.step is StepPlace.host and cfg.optim.in_backward:
        found.append(
            "offload.step=host: with optim.in_backward=true backward would wait for the host at every parameter; use "
            "offload.step=device, or optim.in_backward=false with offload.gradients=true, which frees gradients in "
            "backward too"
        )
    if cfg.offload.step is StepPlace.host and cfg.offload.when_full is WhenFull.keep:
        found.append(
            "offload.when_full=keep: with offload.step=host parameters step where their states are, and ranks would "
            "step some here and some there; use offload.when_full=stop, or offload.step=device"
        )
    if "_paged_" in cfg.optim.name:
        other = "adamw" if cfg.optim.name == "bnb_paged_adamw" else cfg.optim.name.replace("paged_", "")
        found.append(
            f"{asked}: optim={cfg.optim.name} pages its states between device and host by itself; use "
            f"offload.states=none, or optim={other}"
        )
    return found


def gradients_problems(cfg: Config, ranks: int) -> list[str]:
    """DDP's buckets are what gradients are views of."""
    if not cfg.offload.gradients or ranks == 1 or cfg.parallel.zero > 1:
        return []
    return [
        f"offload.gradients=true: with parallel.zero={cfg.parallel.zero} on {ranks} ranks gradients lie in DDP's "
        "buckets, which nothing frees; use parallel.zero=2 or 3"
    ]


def host_problems(cfg: Config) -> list[str]:
    """No tier has more memory than the machine."""
    limits = {"activations": cfg.activations.host_gib, "offload": cfg.offload.host_gib}
    remedies = {"activations": "activations=disk", "offload": "offload.states=disk"}
    return [
        f"{section}.host_gib={limit:g}: this machine has {host_bytes() / 2**30:.1f} GiB of memory in all; use less, or "
        f"{remedies[section]}"
        for section, limit in limits.items()
        if limit is not None and limit * 2**30 > host_bytes()
    ]


def tier_problems(cfg: Config) -> list[str]:
    """Folders of tiers, at the start of a run."""
    return activations_disk_problems(cfg.activations) + states_disk_problems(cfg.offload)


def host_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def activations_disk_problems(cfg: ActivationsConfig) -> list[str]:
    try:
        used = Fate.disk in cfg.fates()
    except ValueError:  # a rule that is no rule, which is reported by itself
        return []
    return folder_problems("activations", cfg.folder(), cfg.disk_gib) if used else []


def states_disk_problems(cfg: OffloadConfig) -> list[str]:
    used = cfg.states is StatePlace.disk
    return folder_problems("offload", cfg.folder(), cfg.disk_gib) if used else []


def folder_problems(section: str, folder: Path, disk_gib: float | None) -> list[str]:
    """The folder must be there, take files, and have the room that is asked for."""
    asked, remedy = f"{section}.disk_dir={folder}", f"give a folder on a local disk with {section}.disk_dir=PATH"
    if not folder.is_dir():
        return [f"{asked}: is no folder; make it, or {remedy}"]
    try:
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        return [f"{asked}: cannot write there ({error.strerror}); {remedy}"]
    free = shutil.disk_usage(folder).free
    if disk_gib is not None and disk_gib * 2**30 > free:
        return [
            f"{section}.disk_gib={disk_gib:g}: {folder} has {free / 2**30:.1f} GiB free; "
            f"use {section}.disk_gib={max(free / 2**30 * 0.9, 0.1):.1f}, or {remedy}"
        ]
    return []
