"""What a configuration gets wrong, found before torch is imported, a model is built or a file is written.

`problems` concerns any use of a configuration, `start_problems` the start of a training run. Each returns texts,
`key=asked: what was found; what to do`, and an empty list when all is well.
"""

import importlib.metadata
import importlib.util
import math
import os
import tempfile
from dataclasses import fields, is_dataclass
from pathlib import Path

from offload.config import Fate
from trainer.check_machine import float8_problems, package_problems
from trainer.check_model import is_read, length_before, longest_sequence, model_problems, smallest_side
from trainer.check_offload import host_problems, states_problems, tier_problems
from trainer.check_ranks import rank_count_problems
from trainer.engines import deepspeed_config
from trainer.rope.check import rope_problems
from trainer.rope.config import SCALED, RopeType
from trainer.schema import Attention, Config, Dtype, LinearKind
from trainer.track import track_problems


def problems(cfg: Config) -> list[str]:
    """Check every section by itself, then the sections against each other and against the files they name."""
    found = section_problems("", cfg)
    found += model_problems(cfg.model) + rope_problems(cfg.model, cfg.data.sequence_length) + length_problems(cfg)
    found += rank_problems(cfg) + position_problems(cfg)
    found += attention_problems(cfg) + clip_problems(cfg) + library_problems(cfg)
    return found + int8_problems(cfg) + states_problems(cfg) + host_problems(cfg)


def section_problems(prefix: str, section: object) -> list[str]:
    """Refuse NaN and infinity in any option; where there is none, ask the section itself; then the sections in it."""
    found, inner = [], []
    for entry in fields(section):  # type: ignore[arg-type]
        value = getattr(section, entry.name)
        if is_dataclass(value):
            inner += section_problems(f"{prefix}{entry.name}.", value)
        numbers = value if isinstance(value, list) else [value]
        if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
            found.append(f"{prefix}{entry.name}={value}: must be a finite number")
    own = getattr(section, "problems", None)
    return (found or (own() if own is not None else [])) + inner


def length_problems(cfg: Config) -> list[str]:
    model, asked = cfg.model, cfg.data.sequence_length
    longest, before = longest_sequence(model), length_before(model)
    if longest is None or asked <= longest or (model.rope.type in SCALED and model.rope.factor is None):
        return []
    where = f"{model.path}/config.json" if is_read(model) else f"model.max_length={before}"
    remedy = "" if is_read(model) else f", model.max_length={asked}"
    factor = math.ceil(asked * model.rope.times / longest)
    if model.rope.type is RopeType.keep:
        remedy += f", or extend it, as with model.rope.type=yarn model.rope.factor={factor}"
    else:
        where += f", model.rope.factor={model.rope.times:g}"
        remedy += f", or model.rope.factor={factor}"
    return [
        f"data.sequence_length={asked}: the model takes at most {longest} tokens ({where}); "
        f"use data.sequence_length={longest} or less{remedy}"
    ]


def position_problems(cfg: Config) -> list[str]:
    """One bucket tells what the loss tells."""
    first, length = cfg.train.eval_by_position, cfg.data.sequence_length
    if not first or first < length:
        return []
    return [
        f"train.eval_by_position={first}: puts all of data.sequence_length={length} positions into one bucket; use "
        f"train.eval_by_position={max(1, length // 16)}, or leave it out"
    ]


def rank_problems(cfg: Config) -> list[str]:
    """A projection onto more directions than a matrix has saves nothing."""
    rank, side = getattr(cfg.optim, "rank", None), smallest_side(cfg.model)
    if not isinstance(rank, int) or side is None or rank <= side:
        return []
    source = "" if is_read(cfg.model) else f" (model.hidden_size={cfg.model.hidden_size})"
    return [
        f"optim.rank={rank}: the model's matrices have at most {side} directions{source}; "
        f"use optim.rank={side} or less, a quarter of it ({max(1, side // 4)}) is usual"
    ]


def int8_problems(cfg: Config) -> list[str]:
    """Some methods are named for weights in int8."""
    if not cfg.optim.int8_weights or cfg.precision.weights is Dtype.int8_sr:
        return []
    return [f"optim={cfg.optim.name}: is a method for weights in int8, which precision=int8_sr keeps; add it"]


def attention_problems(cfg: Config) -> list[str]:
    """The flash kernels are a package of their own, and take 16-bit numbers alone; torch's results alone are kept."""
    found = []
    if cfg.activations.attention is Fate.keep and cfg.model.attention is not Attention.sdpa:
        found.append(
            f"activations.attention=keep: has no effect with model.attention={cfg.model.attention.value}, whose "
            "results are not known; use model.attention=sdpa"
        )
    linear_only = cfg.model.path is None and cfg.model.linear is not LinearKind.none and not cfg.model.softmax_every
    if cfg.activations.attention is Fate.keep and linear_only:
        found.append(
            f"activations.attention=keep: has no effect with model.linear={cfg.model.linear.value}, whose layers "
            "do not attend by softmax; leave it out, or use model.softmax_every=N"
        )
    if cfg.model.attention is not Attention.flash_attention_2:
        return found
    asked, remedy = "model.attention=flash_attention_2", "model.attention=sdpa has flash kernels built in"
    if importlib.util.find_spec("flash_attn") is None:
        found.append(f"{asked}: the package flash-attn isn't installed; install it, or note that {remedy}")
    if cfg.precision.compute not in (Dtype.bf16, Dtype.fp8):
        found.append(f"{asked}: cannot run precision.compute={cfg.precision.compute.value}; use bf16, or {remedy}")
    return found


def library_problems(cfg: Config) -> list[str]:
    """Other packages' optimizers compute in fp32."""
    package = getattr(cfg.optim, "package", None)
    if package is None or cfg.precision.weights is not Dtype.fp64:
        return []
    return [
        f"precision.weights=fp64: optim={cfg.optim.name} is of {package}, which computes in fp32; use precision=fp32, "
        "or an optimizer of ours, such as optim=adamw"
    ]


def start_problems(cfg: Config) -> list[str]:
    """Check what concerns the start of a run: batches over ranks, the run folder, resuming, schedule, tracker."""
    return [
        *rank_count_problems(cfg, int(os.environ.get("WORLD_SIZE", "1"))),
        *deepspeed_config.problems(cfg, int(os.environ.get("WORLD_SIZE", "1"))),
        *schedule_problems(cfg),
        *folder_problems(cfg),
        *resume_problems(cfg),
        *track_problems(cfg.track),
        *tier_problems(cfg),
        *package_problems(cfg.loss),
        *float8_problems(cfg.precision.compute),
    ]


def clip_problems(cfg: Config) -> list[str]:
    """Each way of clipping fits one moment of update, `parameter` both."""
    asked, in_backward = cfg.train.clip_by.value, cfg.optim.in_backward
    if cfg.train.clip_norm > 0 and in_backward and asked == "global":
        return [
            f"optim.in_backward=true: steps before the norm of all gradients is known, which train.clip_by=global with "
            f"train.clip_norm={cfg.train.clip_norm:g} needs; use train.clip_by=parameter, previous or two_pass (the "
            "same result at twice the work), or train.clip_norm=0"
        ]
    if not in_backward and asked in ("previous", "two_pass"):
        return [
            f"train.clip_by={asked}: is for optim.in_backward=true; the ordinary update knows the norm in time: use "
            "train.clip_by=global"
        ]
    return []


def schedule_problems(cfg: Config) -> list[str]:
    """Warmup and final decay, given in steps from 1 on, must fit into the run."""
    steps, schedule = cfg.train.steps, cfg.schedule
    if steps < 1:
        return []
    lengths = {"warmup": schedule.warmup} | ({"decay": schedule.decay} if schedule.name.value == "wsd" else {})
    in_steps = {name: value if value >= 1 else value * steps for name, value in lengths.items() if math.isfinite(value)}
    if sum(in_steps.values()) <= steps:
        return []
    asked = " and ".join(f"schedule.{name}={lengths[name]:g}" for name in in_steps)
    return [
        f"{asked}: longer together than train.steps={steps}; raise train.steps, or give fractions below 1, "
        "such as schedule.warmup=0.1"
    ]


def folder_problems(cfg: Config) -> list[str]:
    """The run folder, or the folder it will be made in, must take new files; a trial file shows it, even to root."""
    asked = "runs/" if cfg.run.dir is None else f"run.dir={cfg.run.dir}"
    path = Path("runs") if cfg.run.dir is None else Path(cfg.run.dir)
    remedy = "give another folder with run.dir=PATH"
    existing = next(parent for parent in (path.absolute(), *path.absolute().parents) if os.path.lexists(parent))
    if not existing.is_dir():
        return [f"{asked}: {existing} is not a folder; {remedy}"]
    try:
        with tempfile.TemporaryDirectory(dir=existing, prefix=".stowage-"):
            return []
    except OSError as error:
        return [f"{asked}: cannot write in {existing} ({error.strerror}); {remedy}"]


def resume_problems(cfg: Config) -> list[str]:
    """`never` refuses a folder with checkpoints, a path must be a checkpoint."""
    resume = cfg.train.resume
    if resume in ("auto", ""):
        return []
    if resume == "never":
        folder = Path(cfg.run.dir or "") / "checkpoints"
        held = sorted(path.name for path in folder.glob("step_*")) if cfg.run.dir else []
        if not held:
            return []
        return [
            f"train.resume=never: {folder} holds {len(held)} checkpoints, newest {held[-1]}; "
            "use train.resume=auto to go on, or another run.dir"
        ]
    path = Path(resume)
    if not path.exists():
        return [f"train.resume={resume}: no such checkpoint; give runs/NAME/TIME/checkpoints/step_N, or auto, or never"]
    if not (path / "manifest.json").is_file():
        inside = sorted((path / "checkpoints").glob("step_*"))
        remedy = f"use train.resume={inside[-1]}" if inside else "give a folder step_N in a run's checkpoints/"
        return [f"train.resume={resume}: is not a checkpoint (it has no manifest.json); {remedy}"]
    return []
