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
from parallel.config import Matrices, SequenceKind
from trainer.check_model import is_read, length_before, longest_sequence, model_problems, smallest_side
from trainer.check_offload import gradients_problems, host_problems, states_problems, tier_problems
from trainer.engines import deepspeed_config
from trainer.errors import UserError
from trainer.loss.config import LossConfig, LossKind
from trainer.rope.check import rope_problems
from trainer.rope.config import SCALED, RopeType
from trainer.schema import Attention, Config, Device, Dtype, LinearKind
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


def rank_count_problems(cfg: Config, ranks: int) -> list[str]:
    """Check what depends on the number of ranks."""
    found = gradients_problems(cfg, ranks) + shard_problems(cfg, ranks) + sequence_problems(cfg, ranks)
    shares = max(1, ranks // cfg.parallel.degree(ranks))
    return found + (batch_problems(cfg, shares) or two_pass_problems(cfg, shares))


def sequence_problems(cfg: Config, ranks: int) -> list[str]:
    """Groups that share rows must split the ranks."""
    parallel = cfg.parallel
    degree, inner = parallel.sequence_degree or ranks, parallel.ulysses_degree
    if parallel.sequence is SequenceKind.none:
        return []
    if ranks == 1:
        return [
            f"parallel.sequence={parallel.sequence.value}: one process has nobody to share a row with; start several "
            "(torchrun --nproc-per-node N -m trainer), or use parallel.sequence=none"
        ]
    if ranks % degree:
        fitting = [count for count in range(2, ranks + 1) if ranks % count == 0]
        return [
            f"parallel.sequence_degree={degree}: does not divide {ranks} ranks; use parallel.sequence_degree="
            f"{' or '.join(map(str, fitting))}"
        ]
    least = 2 * degree if parallel.sequence is SequenceKind.ring else degree
    if cfg.data.sequence_length < least:
        return [
            f"data.sequence_length={cfg.data.sequence_length}: too short to be shared by {degree} ranks; use "
            f"data.sequence_length={least} or more, or a smaller parallel.sequence_degree"
        ]
    if inner is not None and degree % inner:
        return [f"parallel.ulysses_degree={inner}: does not divide the {degree} ranks that share a row; leave it out"]
    if parallel.sequence is SequenceKind.lasp2 and not is_read(cfg.model) and cfg.model.linear is LinearKind.none:
        return [no_states(f"model={cfg.model.name}")]
    return []


def no_states(model: str) -> str:
    """What to say of LASP-2 where there is nothing for it to do."""
    return (
        f"parallel.sequence=lasp2: hands on the states of linear attention, and {model} has none; use "
        "parallel.sequence=ring, which sends as much for softmax attention and computes meanwhile, or a model with "
        "linear layers (model=llama_linear_tiny)"
    )


def shard_problems(cfg: Config, ranks: int) -> list[str]:
    """Replicas must split the ranks, with something left to cut."""
    parallel, found = cfg.parallel, []
    if parallel.replicas > 1 and (ranks % parallel.replicas or ranks == parallel.replicas):
        fitting = [count for count in range(1, ranks // 2 + 1) if ranks % count == 0]
        found.append(
            f"parallel.replicas={parallel.replicas}: does not split {ranks} ranks into groups of two or more; use "
            + (f"parallel.replicas={' or '.join(map(str, fitting))}" if ranks > 1 else "torchrun to start several")
        )
    if getattr(cfg.optim, "basis_copies", False) and not parallel.zero:
        found.append(
            "optim.basis_copies=true: has no effect with parallel.zero=0, where every rank has every basis; leave it "
            "out, or use parallel.zero=1, 2 or 3"
        )
    if getattr(cfg.optim, "basis_copies", False) and parallel.matrices is Matrices.owners:
        found.append(
            "optim.basis_copies=true: has no effect with parallel.matrices=owners, where a basis is its owner's alone; "
            "use one of the two"
        )
    package = getattr(cfg.optim, "package", None)
    if package is not None and parallel.engine.value == "torch" and ranks > 1:
        cut = f"parallel.zero={parallel.zero}" if parallel.zero > 1 else "parallel.matrices=rows"
        if parallel.zero > 1 or parallel.matrices is Matrices.rows:
            found.append(
                f"optim={cfg.optim.name}: {package} lays its blocks over whole parameters, which {cut} cuts into rows; "
                "use parallel.zero=1 or 0, or an optimizer of ours, such as optim=adamw_8bit"
            )
    if cfg.optim.in_backward and parallel.zero == 1:
        found.append(
            "optim.in_backward=true: with parallel.zero=1 gradients are summed in DDP's buckets, which free none in "
            "backward; use parallel.zero=0, 2 or 3"
        )
    return found


def batch_problems(cfg: Config, ranks: int) -> list[str]:
    """The global batch must split evenly into micro-batches over ranks."""
    batch, micro = cfg.train.global_batch, cfg.train.micro_batch
    if batch < 1 or micro < 1 or batch % (micro * ranks) == 0:
        return []
    unit = micro * ranks
    nearest = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
    fitting = [] if batch % ranks else [n for n in range(1, batch // ranks + 1) if batch // ranks % n == 0]
    near = sorted(sorted(fitting, key=lambda n: abs(n - micro))[:3])
    over = f" x {ranks} ranks" if ranks > 1 else ""
    return [
        f"train.global_batch={batch}: does not split into train.micro_batch={micro}{over} = {unit} sequences; "
        f"use train.global_batch={' or '.join(map(str, nearest))}"
        + (f", or train.micro_batch={' or '.join(map(str, near))}" if near else "")
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


def two_pass_problems(cfg: Config, ranks: int) -> list[str]:
    """The norm of gradients that add up needs them all at once."""
    micro_steps = cfg.train.global_batch // (cfg.train.micro_batch * ranks)
    if cfg.train.clip_by.value != "two_pass" or micro_steps == 1:
        return []
    return [
        f"train.clip_by=two_pass: with {micro_steps} micro-steps the norm is that of sums that all have to be kept, so "
        f"nothing is saved; use train.micro_batch={cfg.train.micro_batch * micro_steps}, train.clip_by=parameter or "
        "previous, or the same result from optim.in_backward=false train.clip_by=global"
    ]


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
