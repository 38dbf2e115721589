"""DeepSpeed's configuration, made from ours: what we decide, what the user may add, and what contradicts.

No torch here: `problems` is asked before anything slow. What the user writes as `deepspeed.KEY=VALUE` is passed through
under DeepSpeed's own names; a key that says again what an option of ours says must say the same.
"""

import importlib.util
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from offload.config import Fate
from parallel.config import EngineName, SequenceKind

if TYPE_CHECKING:
    from trainer.schema import Config

OURS = {
    "train_batch_size": "train.global_batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.global_batch",
    "gradient_clipping": "train.clip_norm",
    "zero_optimization.stage": "parallel.zero",
    "bf16.enabled": "precision",
    "fp16.enabled": "precision",
    "data_types.grad_accum_dtype": "precision",
    "communication_data_type": "precision",
    "zero_allow_untested_optimizer": "optim",
    "zero_force_ds_cpu_optimizer": "optim",
}
"""Keys that an option of ours decides, and that option."""

SECTIONS_OF_OURS = {
    "optimizer": "optim=NAME and its options",
    "scheduler": "schedule=NAME and its options",
    "fp16": "precision=bf16",
    "bf16": "precision=bf16",
    "amp": "precision=bf16",
    "torch_autocast": "precision=bf16",
    "data_types": "precision",
    "activation_checkpointing": "activations=recompute",
    "tensorboard": "track=tensorboard",
    "wandb": "track=wandb",
    "comet": "track=comet_ml",
    "csv_monitor": "metrics.jsonl in the run folder",
    "checkpoint": "checkpoint.every and its neighbours",
    "dataloader_drop_last": "the data options",
    "data_efficiency": "the data options",
    "curriculum_learning": "the data options",
    "gradient_allreduce_op": "nothing: gradients are sums here",
}
"""Sections that would do what an option of ours does, and that option."""

PASSED = (
    "zero_optimization.reduce_bucket_size",
    "zero_optimization.allgather_bucket_size",
    "zero_optimization.overlap_comm",
    "zero_optimization.contiguous_gradients",
    "zero_optimization.reduce_scatter",
    "zero_optimization.allgather_partitions",
    "zero_optimization.use_multi_rank_bucket_allreduce",
    "zero_optimization.sub_group_size",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_optimizer.pin_memory",
    "zero_optimization.offload_param.device",
    "zero_optimization.offload_param.pin_memory",
    "zero_optimization.stage3_prefetch_bucket_size",
    "zero_optimization.stage3_param_persistence_threshold",
    "zero_optimization.stage3_model_persistence_threshold",
    "zero_optimization.stage3_max_live_parameters",
    "zero_optimization.stage3_max_reuse_distance",
    "gradient_predivide_factor",
    "steps_per_print",
    "wall_clock_breakdown",
    "memory_breakdown",
    "dump_state",
    "comms_logger",
    "flops_profiler",
)
"""Keys and sections of DeepSpeed that are passed through: known not to change what a step computes, nor where a
partition lies. (`round_robin_gradients` and `parameter_alignment` do the latter, quantised or late updates the former.)
"""


def generated(cfg: "Config", ranks: int) -> dict[str, Any]:
    """Return the configuration given to `deepspeed.initialize`, with the user's keys in it."""
    half = cfg.precision.compute.value == "bf16"
    elements = cfg.parallel.bucket_mib * 2**20 // (2 if half else 4)
    own: dict[str, Any] = {
        "train_batch_size": cfg.train.global_batch * cfg.parallel.degree(ranks),  # which counts a row on each rank
        "train_micro_batch_size_per_gpu": cfg.train.micro_batch,
        "gradient_accumulation_steps": max(
            1, cfg.train.global_batch // max(1, cfg.train.micro_batch * (ranks // cfg.parallel.degree(ranks)))
        ),
        "gradient_clipping": cfg.train.clip_norm,  # DeepSpeed's own default is 1.0
        "zero_optimization": {
            "stage": cfg.parallel.zero,
            "reduce_bucket_size": elements,
            "allgather_bucket_size": elements,
        },
        "bf16": {"enabled": half},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_allow_untested_optimizer": True,  # ours: `partitioned.PartitionedOptimizer`
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 2**62,
    }
    return merged(own, cfg.deepspeed)


def merged(own: Mapping[str, Any], given: Mapping[str, Any]) -> dict[str, Any]:
    """Lay nested `given` over `own`."""
    out = dict(own)
    for key, value in given.items():
        both = isinstance(value, Mapping) and isinstance(out.get(key), Mapping)
        out[key] = merged(out[key], value) if both else value
    return out


def leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each value with its dotted key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def offloaded_to(cfg: "Config") -> str | None:
    """Device the user moves the optimizer to, as written; None for none."""
    section = cfg.deepspeed.get("zero_optimization", {})
    offload = section.get("offload_optimizer", {}) if isinstance(section, Mapping) else {}
    device = offload.get("device") if isinstance(offload, Mapping) else None
    return None if device in (None, "none") else str(device)


def elementwise(cfg: "Config") -> bool:
    """Whether each value is stepped by itself alone, so that any slice of a matrix can be: no projection, no codec
    (whose blocks lie in rows), nothing measured over a matrix."""
    plain = cfg.optim.name in ("adamw", "sgd") and cfg.optim.states.value == "fp32"
    return plain and getattr(cfg.optim, "rank", None) is None


def problems(cfg: "Config", ranks: int) -> list[str]:
    """Say what is wrong with `deepspeed.*`, and what DeepSpeed cannot run."""
    if cfg.parallel.engine is not EngineName.deepspeed:
        asked = f"parallel.engine={cfg.parallel.engine.value}"
        remedy = "leave it out, or use parallel.engine=deepspeed"
        return [
            f"deepspeed.{key}={value}: has no effect with {asked}; {remedy}" for key, value in leaves(cfg.deepspeed)
        ]
    return [*run_problems(cfg), *key_problems(cfg, ranks), *offload_problems(cfg)]


def run_problems(cfg: "Config") -> list[str]:
    """What of our own options DeepSpeed cannot do, each with the torch engine's way."""
    found, engine = [], "parallel.engine=deepspeed"
    weights, compute = cfg.precision.weights.value, cfg.precision.compute.value
    if importlib.util.find_spec("deepspeed") is None:
        found.append(f"{engine}: the package deepspeed isn't installed; install it with `pip install deepspeed`")
    if cfg.parallel.zero not in (1, 2, 3):
        found.append(
            f"{engine} with parallel.zero={cfg.parallel.zero}: DeepSpeed shards here, with parallel.zero=1, 2 or 3; "
            "replicas are parallel.engine=torch parallel.zero=0"
        )
    if compute == "fp8":
        found.append(
            f"precision.compute=fp8: {engine} casts the model to bf16 by itself and knows no products in FP8; use "
            "precision.compute=bf16, or parallel.engine=torch"
        )
    elif (weights, compute) not in (("fp32", "fp32"), ("fp32", "bf16")):
        found.append(
            f"precision.weights={weights}: DeepSpeed keeps fp32 weights beside those it computes with; use "
            "precision=fp32 or bf16, or parallel.engine=torch"
        )
    if cfg.parallel.replicas > 1:
        found.append(
            f"parallel.replicas={cfg.parallel.replicas}: {engine} cuts over all ranks; use parallel.replicas=1"
        )
    whole_rows = cfg.parallel.sequence is SequenceKind.none  # shared ones keep attention without torch's selection
    selects = cfg.activations.fate is Fate.selective or (cfg.activations.attention is Fate.keep and whole_rows)
    if selects and cfg.parallel.zero == 3:
        asked = "=selective" if cfg.activations.fate is Fate.selective else ".attention=keep"
        found.append(
            f"activations{asked} with parallel.zero=3: DeepSpeed gathers and frees weights between the operators of "
            "a block, which a recomputation of some of them alone cannot repeat; use activations=recompute, or "
            "parallel.engine=torch"
        )
    if cfg.parallel.matrices.value != "auto":
        found.append(
            f"parallel.matrices={cfg.parallel.matrices.value}: {engine} cuts its flat partitions anywhere, and gives "
            "each matrix that is stepped whole an owner; leave it out"
        )
    if cfg.parallel.accumulate.value != "auto":
        found.append(
            f"parallel.accumulate={cfg.parallel.accumulate.value}: {engine} adds up as its stage does; leave it out"
        )
    if cfg.optim.in_backward:
        found.append(f"optim.in_backward=true: {engine} updates after backward; use parallel.engine=torch")
    if cfg.train.clip_norm > 0 and cfg.train.clip_by.value != "global":
        found.append(
            f"train.clip_by={cfg.train.clip_by.value}: {engine} clips by the norm of all gradients; use "
            "train.clip_by=global, or parallel.engine=torch"
        )
    return found


def key_problems(cfg: "Config", ranks: int) -> list[str]:
    """Refuse contradictions, keys of what is ours, and keys that change what a step computes or that nobody reads."""
    own = dict(leaves(generated(replace(cfg, deepspeed={}), ranks)))
    return [problem for key, value in leaves(cfg.deepspeed) if (problem := key_problem(key, value, own))]


def key_problem(key: str, value: Any, own: Mapping[str, Any]) -> str | None:
    """Say what is wrong with one key, given what is generated without it."""
    asked, section = f"deepspeed.{key}={value}", key.partition(".")[0]
    if key in OURS:
        contradicts = f"{asked}: contradicts {OURS[key]}, by which it is {own.get(key)}; set {OURS[key]} alone"
        return contradicts if own.get(key) != value else None
    if section in SECTIONS_OF_OURS:
        return f"{asked}: is decided here by {SECTIONS_OF_OURS[section]}; use that"
    if not any(f"{key}.".startswith(f"{passed}.") for passed in PASSED):
        same = [passed for passed in PASSED if passed.partition(".")[0] == section] or PASSED
        return f"{asked}: is not passed through; known are {', '.join(same)}"
    return None


def offload_problems(cfg: "Config") -> list[str]:
    """Optimizer and parameters may lie on the host. What DeepSpeed swaps to disk are whole flat partitions with Adam's
    two moments of the same length beside them, which no other optimizer has, and in which neither ours nor our
    checkpoints can look at single parameters."""
    places = {key: value for key, value in leaves(cfg.deepspeed) if key.endswith(".device")}
    return [
        f"deepspeed.{key}={value}: must be cpu or none"
        + ("; for states on a disk use parallel.engine=torch offload.states=disk" if value == "nvme" else "")
        for key, value in places.items()
        if value not in ("cpu", "none")
    ]
