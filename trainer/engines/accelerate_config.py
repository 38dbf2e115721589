"""`parallel.engine=accelerate`: what the file given to `accelerate launch` says, as options of ours.

The launcher starts the processes and tells each, in its environment, what the file chose: DDP, FSDP2 or DeepSpeed, with
which precision. That choice is carried out by the engine of ours that does it (torch or deepspeed), so that every
optimizer, checkpoint and memory technique is the same under accelerate as without it, and so that FSDP2 shards on a
CPU too, where accelerate itself would leave it out without a word. What the file says and nothing of ours does is
refused. No torch here.
"""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from parallel.config import EngineName

if TYPE_CHECKING:
    from trainer.schema import Config

PRECISIONS = {"no": "fp32", "bf16": "bf16"}
"""Accelerate's mixed precision, and the compute dtype over fp32 weights that it means."""

REFUSED = {
    "ACCELERATE_USE_MEGATRON_LM": ("Megatron-LM", "use FSDP (fsdp_version: 2) or DeepSpeed in the file"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (
        "a parallelism_config",
        "leave it out; parallel.replicas is dp_replicate_size, parallel.sequence=ring cp_size, =ulysses sp_size",
    ),
    "FSDP_OFFLOAD_PARAMS": ("fsdp_offload_params", "use DeepSpeed's offload_optimizer_device: cpu"),
    "FSDP_ACTIVATION_CHECKPOINTING": ("fsdp_activation_checkpointing", "use activations=recompute"),
}
"""Switches of the file that nothing here carries out, with the user's name for them and what does."""


def applied(cfg: "Config", environment: Mapping[str, str]) -> tuple["Config", list[str]]:
    """Return `cfg` with the engine, stage and precision of accelerate's file, and what is wrong with these.

    Another engine than `accelerate` is left as it is: `accelerate launch` then starts the processes and no more.
    """
    if cfg.parallel.engine is not EngineName.accelerate:
        return cfg, []
    if "ACCELERATE_MIXED_PRECISION" not in environment:
        return cfg, [
            "parallel.engine=accelerate: was not started by accelerate; start it with `accelerate launch --config_file "
            "FILE -m trainer ...`, or use parallel.engine=torch"
        ]
    try:
        file = deepspeed_file(environment)
    except (OSError, ValueError) as error:
        return cfg, [f"deepspeed_config_file of accelerate's file: cannot be read ({error}); correct its path or text"]
    precision, found = precision_of(cfg, mixed_precision(environment, file))
    found = switch_problems(environment) + found
    cfg = replace(cfg, precision=precision)
    if on(environment, "ACCELERATE_USE_DEEPSPEED"):
        zero, keys = deepspeed_keys(environment, file)
        parallel = replace(cfg.parallel, engine=EngineName.deepspeed, zero=zero)
        applied = replace(cfg, parallel=parallel, deepspeed=keys | cfg.deepspeed)
    else:
        zero = fsdp_stage(environment)
        applied = replace(cfg, parallel=replace(cfg.parallel, engine=EngineName.torch, zero=zero))
    if cfg.parallel.zero not in (0, zero):
        found.append(
            f"parallel.zero={cfg.parallel.zero}: contradicts accelerate's file, which means parallel.zero={zero}; "
            "leave it out, or change the file"
        )
    return applied, found


def on(environment: Mapping[str, str], name: str) -> bool:
    return environment.get(name, "").lower() in ("true", "1", "yes")


def switch_problems(environment: Mapping[str, str]) -> list[str]:
    """Refuse what the file switches on and nothing here carries out."""
    found = [
        f"parallel.engine=accelerate: its file asks for {what}, which is not available here; {remedy}"
        for name, (what, remedy) in REFUSED.items()
        if on(environment, name)
    ]
    if on(environment, "ACCELERATE_USE_FSDP") and environment.get("FSDP_VERSION") != "2":
        found.append("parallel.engine=accelerate: its file asks for FSDP 1; write fsdp_version: 2 in it")
    dynamo = environment.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if dynamo != "no":
        found.append(
            f"parallel.engine=accelerate: its file asks for dynamo_backend {dynamo}; write dynamo_backend: 'NO'"
        )
    return found


def mixed_precision(environment: Mapping[str, str], file: dict[str, Any]) -> str:
    """What the file says; a DeepSpeed configuration of its own has the last word, as in accelerate."""
    for name in ("bf16", "fp16"):
        if file.get(name, {}).get("enabled") is True:
            return name
    return environment["ACCELERATE_MIXED_PRECISION"]


def precision_of(cfg: "Config", asked: str) -> tuple[Any, list[str]]:
    """The precision that the file means; one on the command line must be the same."""
    from trainer.schema import Dtype, PrecisionConfig

    if asked not in PRECISIONS:
        return cfg.precision, [
            f"parallel.engine=accelerate: its file says mixed_precision: {asked}; write no or bf16 there"
        ]
    wanted = PrecisionConfig(weights=Dtype.fp32, compute=Dtype(PRECISIONS[asked]))
    if cfg.precision in (PrecisionConfig(), wanted):
        return wanted, []
    own = f"precision.weights={cfg.precision.weights.value} precision.compute={cfg.precision.compute.value}"
    return cfg.precision, [
        f"{own}: contradicts mixed_precision: {asked} of accelerate's file; leave precision out, or change the file"
    ]


def fsdp_stage(environment: Mapping[str, str]) -> int:
    """0 for DDP, 2 or 3 for FSDP2 without or with resharding after forward."""
    if not on(environment, "ACCELERATE_USE_FSDP"):
        return 0
    return 3 if on(environment, "FSDP_RESHARD_AFTER_FORWARD") else 2


def deepspeed_file(environment: Mapping[str, str]) -> dict[str, Any]:
    """The DeepSpeed configuration that accelerate's file names, without what it leaves open.

    Raises:
        OSError, ValueError: it is missing, or no JSON object.
    """
    path = environment.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    if path.lower() in ("none", ""):
        return {}
    values = json.loads(Path(path).read_text())
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds no JSON object")
    return without_auto(values)


def without_auto(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what the file leaves to whoever runs it, and what is empty then."""
    kept = {key: without_auto(value) if isinstance(value, dict) else value for key, value in values.items()}
    return {key: value for key, value in kept.items() if value not in ("auto", {})}


def deepspeed_keys(environment: Mapping[str, str], file: dict[str, Any]) -> tuple[int, dict[str, Any]]:
    """Stage and further keys of DeepSpeed, of a configuration of its own or of accelerate's few."""
    keys = {key: value for key, value in file.items() if key not in ("bf16", "fp16")}  # of `mixed_precision`
    section = dict(keys.pop("zero_optimization", {}))
    zero = int(section.pop("stage", environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", 2)))
    for part in ("optimizer", "param"):
        device = environment.get(f"ACCELERATE_DEEPSPEED_OFFLOAD_{part.upper()}_DEVICE", "none")
        if device != "none":
            section.setdefault(f"offload_{part}", {"device": device})
    clipping = environment.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    if clipping != "none":
        keys.setdefault("gradient_clipping", float(clipping))
    micro_steps = environment.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")
    if micro_steps not in ("1", "none"):  # 1 is what accelerate says where nobody did
        keys.setdefault("gradient_accumulation_steps", int(micro_steps))
    return zero, keys | ({"zero_optimization": section} if section else {})
