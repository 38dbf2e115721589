"""The configuration of a run: every option, its type, its default and what it means.

The dataclasses of a group live with the code that obeys them; this file holds the rest and the root.
Nothing here imports torch: a mistake is reported before anything slow begins. `problems()` names what one section can
see by itself, in the form `key=asked: what is wrong; what to do`; `trainer.check` holds the sections against each other
and against the machine's files.
"""

import re
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from offload.config import ActivationsConfig, OffloadConfig
from optim.config import DEFAULT_TARGETS, OptimConfig, ScheduleConfig
from parallel.config import ParallelConfig
from trainer.data.config import DataConfig
from trainer.loss.config import LossConfig
from trainer.rope.config import RopeConfig


class Device(Enum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class Dtype(Enum):
    fp32 = "fp32"
    bf16 = "bf16"
    bf16_sr = "bf16_sr"
    int8_sr = "int8_sr"
    fp64 = "fp64"
    fp8 = "fp8"


class Fp8Recipe(Enum):
    """How the factors of a product in FP8 are scaled, by torchao's names."""

    tensorwise = "tensorwise"
    rowwise = "rowwise"
    rowwise_with_gw_hp = "rowwise_with_gw_hp"


class Attention(Enum):
    sdpa = "sdpa"
    eager = "eager"
    flash_attention_2 = "flash_attention_2"


class LinearKind(Enum):
    """How the state of a linear attention layer fades."""

    none = "none"
    basic = "basic"
    lightning = "lightning"
    retention = "retention"
    gated = "gated"


ClipBy = Enum("ClipBy", {"global": "global", "parameter": "parameter", "previous": "previous", "two_pass": "two_pass"})
"""Whose norm decides how far a gradient is scaled down."""


SaveMode = Enum("SaveMode", {"sync": "sync", "async": "async", "lazy": "lazy"})
"""What training waits for when a checkpoint is saved."""


class OnFailure(Enum):
    """What becomes of a run whose checkpoint could not be written."""

    go_on = "go_on"
    stop = "stop"


class Initial(Enum):
    """Where the first weights come from."""

    random = "random"
    pretrained = "pretrained"


PRECISIONS = (
    ("fp32", "fp32"),
    ("fp32", "bf16"),
    ("bf16", "bf16"),
    ("bf16_sr", "bf16"),
    ("int8_sr", "bf16"),
    ("fp64", "fp64"),
    ("fp32", "fp8"),
    ("bf16", "fp8"),
    ("bf16_sr", "fp8"),
)
"""(weights, compute) pairs that `trainer.precision` knows how to run."""


def shown(value: object) -> str:
    """Return a value as the user writes it on the command line."""
    if isinstance(value, Enum):
        return str(value.value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return "[" + ",".join(map(shown, value)) + "]" if isinstance(value, list) else str(value)


def too_small(section: str, config: object, **least: int) -> list[str]:
    """Report every option of `config` below its least value; None is left alone."""
    values = {name: getattr(config, name) for name in least}
    return [
        f"{section}.{name}={value}: must be at least {least[name]}; use {section}.{name}={least[name]} or more"
        for name, value in values.items()
        if value is not None and value < least[name]
    ]


@dataclass(kw_only=True)
class RunConfig:
    name: str = "train"
    """Folder under `runs/` that collects runs of this name."""
    dir: str | None = None
    """Exact run folder; default runs/<name>/<date-time>."""
    device: Device = Device.auto
    """auto takes CUDA where there is one."""
    threads: int | None = None
    """CPU threads of each process; default: the cores shared out over the processes."""
    deterministic: bool = True
    """On CUDA, kernels that give the same bits every time, which a bit-exact resume needs; false is a little faster."""

    def problems(self) -> list[str]:
        found = too_small("run", self, threads=1)
        if not re.fullmatch(r"[\w.+=,@-]+", self.name) or set(self.name) == {"."}:
            found.append(f"run.name={self.name!r}: names a folder under runs/; use letters, digits and . _ - only")
        if self.dir is not None and not self.dir.strip():
            found.append("run.dir='': is empty; name a folder, or leave it out for runs/<name>/<date-time>")
        return found


@dataclass(kw_only=True)
class ModelConfig:
    name: str = "llama_tiny"
    """Set by `model=...`; `hf` takes architecture and weights from `model.path`."""
    path: str | None = None
    """model=hf: local folder (safetensors) or hub name of any transformers causal language model."""
    weights: Initial = Initial.random
    """random: initialised from `seed`; pretrained: read from `model.path`."""
    hidden_size: int | None = 256
    """Width of the residual stream."""
    intermediate_size: int | None = 688
    """Width inside the MLP."""
    layers: int | None = 4
    """Decoder blocks."""
    heads: int | None = 4
    """Attention heads; each is hidden_size / heads wide."""
    kv_heads: int | None = None
    """Key and value heads (GQA); default: as many as `heads`."""
    vocab_size: int | None = None
    """Default: the tokenizer's size, rounded up to a multiple of 8; llama_60m and larger say 32000."""
    max_length: int | None = 2048
    """Longest sequence the model accepts (max_position_embeddings), before `model.rope` extends it."""
    tie_embeddings: bool | None = False
    """Whether the output head shares the embedding's weights."""
    rope_theta: float | None = 10000.0
    """Base of the rotary position embedding."""
    rope: RopeConfig = field(default_factory=RopeConfig)
    """How positions are told apart beyond the length that the model was trained with."""
    dropout: float | None = 0.0
    """Attention dropout."""
    linear: LinearKind = LinearKind.none
    """Linear attention in place of softmax, of a model from scratch: a state of a fixed size, however long the row.
    basic: everything stays in it. lightning and retention: each head forgets at a pace of its own, as those methods
    have it. gated: as fast as each token says. none: softmax in all layers."""
    softmax_every: int | None = None
    """With `linear`: every N-th layer attends by softmax all the same; default: none does."""
    attention: Attention = Attention.sdpa
    """Attention kernel of transformers."""
    trust_remote_code: bool = False
    """Run Python code that comes with a hub model. Off unless you trust its author."""


@dataclass(kw_only=True)
class TrainConfig:
    steps: int = 150
    """Optimizer steps of the whole run; a resumed run goes on to this number."""
    global_batch: int = 8
    """Sequences per step, over all ranks and micro-steps."""
    micro_batch: int = 4
    """Sequences per rank and micro-step; what is missing to the global batch is accumulated."""
    clip_norm: float = 1.0
    """Largest gradient norm; larger gradients are scaled down. 0: no clipping."""
    clip_by: ClipBy = ClipBy["global"]
    """Whose norm: `global`, of all gradients together; `parameter`, of each by itself. With optim.in_backward the
    global norm is not known in time: `previous` takes that of the step before (the first step: `parameter`), `two_pass`
    runs forward and backward once to find it and once to update."""
    log_every: int = 10
    """Steps between two lines in metrics.jsonl and on the display."""
    eval_every: int = 50
    """Steps between two held-out evaluations; the first and last step are always evaluated. 0: only those."""
    eval_by_position: int = 0
    """Tokens in the first of the buckets that held-out loss is told by: positions within a document, each bucket twice
    as long as the one before, in metrics.jsonl and plots/loss_by_position.png. 0: one number for all."""
    resume: str = "auto"
    """auto: go on from the newest good checkpoint in the run folder; never: refuse a folder that has one; or a PATH."""
    max_skipped: int = 20
    """Steps in a row skipped for a non-finite loss or gradient (on all ranks) before the run stops with exit code 3."""

    def problems(self) -> list[str]:
        found = too_small(
            "train", self, steps=1, global_batch=1, micro_batch=1, log_every=1, eval_every=0, eval_by_position=0,
            max_skipped=1,
        )  # fmt: skip
        if not self.clip_norm >= 0:
            found.append(f"train.clip_norm={self.clip_norm}: must be at least 0; 0 switches clipping off, 1.0 is usual")
        if self.clip_norm == 0 and self.clip_by is not TrainConfig.clip_by:
            found.append(
                f"train.clip_by={self.clip_by.value}: has no effect with train.clip_norm=0, which does not clip; "
                "give a norm, such as train.clip_norm=1"
            )
        if not self.resume.strip():
            found.append("train.resume='': is empty; use auto, never, or the path of a checkpoint")
        return found


@dataclass(kw_only=True)
class PrecisionConfig:
    weights: Dtype = Dtype.fp32
    """What weights are stored in; bf16_sr is bf16 whose steps are rounded stochastically, right on average; int8_sr the
    same in 8 bits for the matrices in `int8_targets`, dequantized at each use, and bf16_sr for the rest."""
    compute: Dtype = Dtype.fp32
    """What matrix products run in; bf16 over fp32 weights is autocast. fp8: bf16, with the linear layers in
    `fp8_targets` in FP8 by torchao (CUDA of capability 8.9; elsewhere emulated, the same numbers at no gain). It is a
    property of training: checkpoints, exports and `stowage eval` know nothing of it."""
    int8_group: int | None = None
    """int8_sr: neighbours in a row that share a scale; a weight takes 1 + 8/int8_group bytes. Default: as the method's
    authors, 128 for qapollo and qapollo_mini, 256 otherwise."""
    int8_targets: str = DEFAULT_TARGETS
    """int8_sr: regular expression; matrices whose parameter name it finds are kept in int8."""
    fp8_recipe: Fp8Recipe = Fp8Recipe.tensorwise
    """compute=fp8: what shares a scale. `tensorwise`: a whole tensor, the quickest, and what is kept of a layer's input
    is its codes, one byte a value. `rowwise`: a row, scales being powers of two. `rowwise_with_gw_hp`: a row, with
    weight gradients in bf16; the one whose results do not depend on how a batch is split."""
    fp8_targets: str = DEFAULT_TARGETS
    """compute=fp8: regular expression; linear layers of blocks whose parameter name it finds compute in FP8."""

    def problems(self) -> list[str]:
        int8, fp8 = self.weights is Dtype.int8_sr, self.compute is Dtype.fp8
        asked = f"precision.weights={self.weights.value}"
        found = self.pair_problems()
        found += self.idle_problems(int8, asked, "precision=int8_sr", "int8_group", "int8_targets")
        asked = f"precision.compute={self.compute.value}"
        found += self.idle_problems(fp8, asked, "precision=fp8", "fp8_recipe", "fp8_targets")
        if int8:
            found += too_small("precision", self, int8_group=8)
        for name in ("int8_targets", "fp8_targets"):
            try:
                re.compile(getattr(self, name))
            except re.error as error:
                found.append(
                    f"precision.{name}={getattr(self, name)!r}: not a regular expression ({error}); the default is "
                    f"{DEFAULT_TARGETS!r}"
                )
        return found

    def idle_problems(self, used: bool, asked: str, remedy: str, *names: str) -> list[str]:
        """An option of a format that is not chosen would be ignored."""
        return [
            f"precision.{name}={shown(getattr(self, name))}: has no effect with {asked}; use {remedy}"
            for name in names
            if not used and getattr(self, name) != getattr(PrecisionConfig, name)
        ]

    def pair_problems(self) -> list[str]:
        asked = (self.weights.value, self.compute.value)
        if asked in PRECISIONS:
            return []
        if asked == ("int8_sr", "fp8"):
            return [
                "precision.weights=int8_sr with precision.compute=fp8: weights would be rounded twice, to whole "
                "numbers and then to FP8, which has fewer digits; use precision.compute=bf16 with them, or "
                "precision.weights=bf16_sr with fp8"
            ]
        known = ", ".join(f"{weights}/{compute}" for weights, compute in PRECISIONS)
        return [
            f"precision.weights={asked[0]} with precision.compute={asked[1]}: is not available; weights/compute may be "
            f"{known} (precision=fp32, bf16, bf16_pure, bf16_sr, int8_sr, fp64, fp8)"
        ]


@dataclass(kw_only=True)
class CheckpointConfig:
    every: int = 100
    """Steps between two checkpoints; the last step is always saved. 0: only the last."""
    keep: int = 2
    """Newest checkpoints kept; older ones go once a newer one is verified. 0: keep all."""
    verify: bool = True
    """Whether a load compares every file with its SHA-256 digest."""
    mode: SaveMode = SaveMode["sync"]
    """What training waits for. sync: until the checkpoint is on the disk. async: until weights and states are copied to
    host memory; a thread writes them. lazy: for nothing at first, as the copies are made during the next forward and
    backward; what is not copied by then is waited for before the weights change. The last checkpoint is always waited
    for."""
    host_gib: float | None = None
    """async, lazy: GiB of host memory for each rank's copies, or its largest tensor where that is more; training waits
    for the rest to be written. Default: as much as there is to copy."""
    on_failure: OnFailure = OnFailure.go_on
    """When a checkpoint cannot be written: go_on, to the next one; stop, with exit code 3. Older ones stay anyway."""

    def problems(self) -> list[str]:
        found = too_small("checkpoint", self, every=0, keep=0)
        if self.mode is not SaveMode["sync"] and self.every == 0:
            found.append(
                f"checkpoint.mode={self.mode.value}: has no effect with checkpoint.every=0, which saves the last step "
                "alone, and that is waited for; give checkpoint.every=N, or leave it out"
            )
        if self.host_gib is not None and self.mode is SaveMode["sync"]:
            found.append(
                f"checkpoint.host_gib={self.host_gib:g}: has no effect with checkpoint.mode=sync, which copies "
                "nothing; use it with checkpoint.mode=lazy or async"
            )
        if self.host_gib is not None and self.host_gib <= 0:
            found.append(
                f"checkpoint.host_gib={self.host_gib:g}: must be above 0; leave it out to copy all that is to be saved"
            )
        return found

    def host_bytes(self) -> int | None:
        """Bytes of host memory that a rank's copies may take; None for no limit."""
        return None if self.host_gib is None else int(self.host_gib * 2**30)


@dataclass(kw_only=True)
class TrackConfig:
    to: str = "none"
    """none, or one of accelerate's trackers: tensorboard, wandb, mlflow, comet_ml, aim, clearml, dvclive, swanlab,
    trackio."""
    project: str = "stowage"
    """Project name given to the tracker."""

    def problems(self) -> list[str]:
        if self.to == "none" and self.project != TrackConfig.project:
            return [f"track.project={self.project}: has no effect with track=none; choose a tracker, as track=wandb"]
        return []


@dataclass(kw_only=True)
class MemoryConfig:
    """Not a group: options of the memory accounting."""

    sample_every: int = 0
    """Steps between two exact countings of activations and workspace (a counted step takes a little longer:
    benchmarks/memory_counting.py); 0: the first two steps alone."""

    def problems(self) -> list[str]:
        return too_small("memory", self, sample_every=0)


@dataclass(kw_only=True)
class Config:
    """Everything that defines a run."""

    seed: int = 0
    """Seed of weights, data order and dropout."""
    recipe: str | None = None
    """Set by `recipe=...`: the recipe this run follows, a name in recipes/ or a folder with a config.yaml."""
    run: RunConfig = field(default_factory=RunConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    precision: PrecisionConfig = field(default_factory=PrecisionConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    activations: ActivationsConfig = field(default_factory=ActivationsConfig)
    offload: OffloadConfig = field(default_factory=OffloadConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    track: TrackConfig = field(default_factory=TrackConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    deepspeed: dict[str, Any] = field(default_factory=dict)
    """parallel.engine=deepspeed: options of DeepSpeed under its own names, such as
    deepspeed.zero_optimization.offload_optimizer.device=cpu."""

    def problems(self) -> list[str]:
        return [] if 0 <= self.seed < 2**63 else [f"seed={self.seed}: must lie between 0 and 2**63 - 1, such as seed=0"]
