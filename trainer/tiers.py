"""Whether host memory and disk can take what a step moves there, known before the first step from the plan."""

import os
import shutil
from dataclasses import replace

from offload.config import MOVED, Fate, WhenFull
from trainer.build import Built
from trainer.errors import UserError
from trainer.memory import format_bytes
from trainer.plan import predict

GIB = 2**30
PLACES = {Fate.host: "host memory", Fate.disk: "disk"}


def check_tiers(built: Built) -> list[str]:
    """Hold what a step moves to each tier against the tier's budget, and against what the disk has free.

    Costs a plan, so it is left out where there is no limit to hold it against. Every rank comes to the same end.

    Returns:
        what will stay on the device, for the user.

    Raises:
        UserError: it does not fit, and activations.when_full=stop would end the run in its first step.
    """
    cfg = built.cfg.activations
    limits = limits_of(built)
    if not limits:
        return []
    free = replace(built.cfg, activations=replace(cfg, host_gib=None, disk_gib=None))
    try:
        plan = predict(free, built.model_config, ranks=built.world.process_count, device=built.world.device)
    except (UserError, RuntimeError):  # another engine's step, say: the run will tell
        return []
    found = []
    for fate, (asked, limit, unit) in limits.items():
        needed = max(timeline.elsewhere.get(fate.value, 0) for timeline in plan.steps.values())
        if needed > limit:
            found.append(
                f"{asked}: a step moves {format_bytes(needed)} ({needed:,} bytes a rank) to {PLACES[fate]}, which has "
                f"room for {format_bytes(limit)}; give {unit.format(needed / GIB * 1.01)}"
            )
    if found and cfg.when_full is WhenFull.stop:
        raise UserError("\n".join(f"{text}, or use activations.when_full=keep" for text in found))
    return [f"{text}. What does not fit stays on the device" for text in found]


def limits_of(built: Built) -> dict[Fate, tuple[str, int, str]]:
    """Of each tier that something goes to and that has an end: the option, the bytes a rank has, and the remedy."""
    cfg, found = built.cfg.activations, dict[Fate, tuple[str, int, str]]()
    used = cfg.fates() & set(MOVED)
    if Fate.host in used and cfg.host_gib is not None:
        remedy = "activations.host_gib={:.3g}"
        found[Fate.host] = (f"activations.host_gib={cfg.host_gib:g}", int(cfg.host_gib * GIB), remedy)
    if Fate.disk in used:
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        room = shutil.disk_usage(cfg.folder()).free // ranks
        found[Fate.disk] = (f"activations.disk_dir={cfg.folder()}", room, "a disk with {:.3g} GiB a rank free")
        if cfg.disk_gib is not None and cfg.disk_gib * GIB <= room:
            remedy = "activations.disk_gib={:.3g}"
            found[Fate.disk] = (f"activations.disk_gib={cfg.disk_gib:g}", int(cfg.disk_gib * GIB), remedy)
    return found
