"""What a run will hold, before it runs: the real step on fake tensors.

Under `FakeTensorMode` operators give shapes and lifetimes and compute nothing. So the model, the optimizer and the
engine of a real run are built, the `train_step` of a real run is taken, and the meter of a real run counts it: a new
technique is predicted without a new formula, and on CPU the prediction is the measurement, byte for byte. No data is
read, nothing is downloaded, and no memory of the predicted size is needed.

Of several ranks one is predicted, the first, which holds the largest shards. It runs torch's own DDP and FSDP2 in a
group without other members, so the buckets, the gradients that are views of them, the separate gradients of
micro-steps that do not exchange any, and what is gathered and freed when, are theirs.

What a real run may do otherwise:
- the mask between packed documents is always made; a real micro-batch whose rows are one document each has none;
- clipping always happens, and a step is never skipped;
- kernels are those of the device that is counted for (`counting_device`).
"""

import logging
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from offload.config import ActivationsConfig, Fate
from offload.pool import TierFull
from optim import registry
from parallel.config import EngineName
from parallel.launch import World
from parallel.pretended import PretendedGroup, pretended_ranks
from trainer.build import Trainable, make_trainable
from trainer.checkpoint.staged import staging_bytes
from trainer.data.batch import Batch, StepBatch
from trainer.data.files import local_path
from trainer.data.hub import go_offline
from trainer.data.tokenizer import load_tokenizer, vocabulary_size
from trainer.engines.torch_engine import TorchEngine
from trainer.errors import UserError, first_line
from trainer.memory import MemoryMeter, Peak, Timeline
from trainer.model import build_model, check_length, check_vocabulary, model_config, parameter_count
from trainer.precision import int8_matrices
from trainer.schema import ClipBy, Config, Device, Dtype, Initial, SaveMode
from trainer.state import random_tensors
from trainer.step import kept_notes, train_step

MICRO_STEPS = 3
"""Micro-steps run of a step that has more: the first has no gradients yet, the last exchanges them, and all between
are alike. The rows of those left out are there all the same."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What one rank will hold."""

    parameters: int
    ranks: int
    device: str
    """Where the fake tensors claimed to be: cpu or cuda."""
    steps: dict[str, Timeline]
    """The `first` step, with what it sets up (a basis found, say), and a `steady` one."""
    staging: int = 0
    """Bytes of host memory that the copies of a checkpoint take (checkpoint.mode=async or lazy)."""
    notes: tuple[str, ...] = ()
    """What a user should know: tiers that are too small, rules without effect, gradients that add up."""

    @property
    def highest(self) -> str:
        """The step that holds the most; of equal ones the steady."""
        return max(reversed(self.steps), key=lambda name: self.steps[name].peak.total)

    @property
    def peak(self) -> Peak:
        """The most held at once."""
        return self.steps[self.highest].peak

    def to_json(self) -> dict[str, Any]:
        """Bytes of each step, as memory.json's `measured` has them."""
        return {name: timeline.to_json() for name, timeline in self.steps.items()}


def predict(cfg: Config, config: transformers.PretrainedConfig, *, ranks: int, device: torch.device) -> Plan:
    """Predict what one of `ranks` ranks of a run holds. Random number generators and `config` stay as they are.

    Args:
        config: of the model, as `planned_config` or a run's `Built.model_config` gives it.
        device: where the fake tensors claim to be: `counting_device(cfg)`, or the device of a run.

    Raises:
        UserError: the model computes something whose size depends on values.
    """
    if cfg.parallel.engine is not EngineName.torch:
        raise UserError(
            f"parallel.engine={cfg.parallel.engine.value}: its step reads numbers from its tensors, which fake ones do "
            "not have. Plan parallel.engine=torch at the same parallel.zero: activations and states are the same; "
            "DeepSpeed holds weights in the dtype of the products, and 4 bytes a weight over the ranks for masters"
        )
    world = World(
        process_count=ranks, device=device, gradients=PretendedGroup(ranks) if ranks > 1 else None,
        sequence_degree=cfg.parallel.degree(ranks),
    )  # fmt: skip
    from_scratch = replace(cfg.model, weights=Initial.random)  # of the same shapes as what a file holds
    weights, int8 = cfg.precision.weights, int8_matrices(cfg)
    generators = random_tensors(0, torch.device("cpu"))
    with undisturbed(device), pretended_ranks(cfg.parallel, ranks), FakeTensorMode():
        model = build_model(
            from_scratch, deepcopy(config), weights=weights, int8=int8, device=device, seed=cfg.seed,
            length=cfg.data.sequence_length,
        )  # fmt: skip
        trainable = make_trainable(cfg, world, model)
        elsewhere = trainable.activations.ledger if trainable.activations else None
        meter = MemoryMeter(
            model,
            trainable.optimizer,
            device,
            allocator=False,
            elsewhere=elsewhere,
            beside=trainable.states.ledgers if trainable.states is not None else None,
        )
        trainable = replace(trainable, meter=meter)
        try:
            first = count(trainable, 0)
            # Real DDP makes its buckets anew, in the order gradients came, before its second step. It cannot do so
            # here, where it would tell other ranks; made anew by hand, they are as large.
            assert isinstance(trainable.engine, TorchEngine)
            trainable.engine.spread.renew()
            steady = count(trainable, 1)
            staging = staged(trainable, generators)
        except TierFull as error:
            raise UserError(f"{error}. {error.remedy}.") from error
        except RuntimeError as error:  # of torch: the size of a result depends on values, or nobody has written it down
            raise UserError(
                f"model={cfg.model.name}: the step of {type(model).__name__} cannot be predicted "
                f"({type(error).__name__}: {first_line(error)}). "
                "Train a few steps instead; memory.json holds what they took."
            ) from error
    steps = {"first": first, "steady": steady}
    return Plan(
        parameters=parameter_count(model),
        ranks=ranks,
        device=device.type,
        steps=steps,
        staging=staging,
        notes=(*tier_notes(trainable), *kept_notes(trainable)),
    )


def tier_notes(trainable: Trainable) -> tuple[str, ...]:
    """What could not leave the device as it was told, and rules without effect."""
    activations, states = trainable.activations, trainable.states
    told = states.take_messages() if states is not None else []
    if activations is None:
        return tuple(told)
    return (*told, *activations.take_messages(), *activations.rules_without_effect())


def count(trainable: Trainable, step: int) -> Timeline:
    """Take step number `step` (from 0) on made-up rows, and count it."""
    batch = made_up_batch(trainable.cfg, trainable.world.data_count)
    with trainable.meter.count_step() as timeline:
        train_step(trainable, batch, step, stop=0)
    return timeline


def staged(trainable: Trainable, generators: dict[str, Tensor]) -> int:
    """Return the host memory that a checkpoint's copies take; 0 where none are made."""
    cfg = trainable.cfg.checkpoint
    if cfg.mode is SaveMode["sync"]:
        return 0
    engine = trainable.engine
    assert isinstance(engine, TorchEngine)
    return staging_bytes(
        engine.tensors() | generators, trainable.world.process_count, cfg.host_bytes(), holders=engine.spread.holders
    )


def made_up_batch(cfg: Config, shares: int) -> StepBatch:
    """Return one of `shares` shares of a step's rows as the data stream does: all in three tensors, which micro-batches
    view."""
    shape = (cfg.train.global_batch // shares, cfg.data.sequence_length)
    rows = Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3)))
    return StepBatch(rows.split(cfg.train.micro_batch)[:MICRO_STEPS], targets=1, first_sample=0)


@contextmanager
def undisturbed(device: torch.device) -> Iterator[None]:
    """Put torch's generators back afterwards, and keep quiet: warnings are the run's to give, errors the caller's."""
    devices = [device] if device.type == "cuda" else []
    told = logging.getLogger("torch._subclasses.fake_tensor")
    disabled, told.disabled = told.disabled, True
    try:
        with torch.random.fork_rng(devices), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        told.disabled = disabled


def counting_device(cfg: Config) -> torch.device:
    """Return the device to count for: the configured one, or the CPU where this machine has no CUDA to ask.

    Without CUDA linked in, torch cannot even pretend: autograd asks the device's driver for its streams.
    """
    if cfg.run.device is not Device.cpu and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def planned_config(cfg: Config) -> transformers.PretrainedConfig:
    """Return the transformers configuration of the model, from this machine's files alone.

    Raises:
        UserError: model or tokenizer are not here, or do not fit each other or the rows.
    """
    if is_elsewhere(cfg.model.path) or is_elsewhere(cfg.data.tokenizer):
        go_offline()
    known = cfg.model.path is not None or cfg.model.vocab_size is not None
    if known and is_elsewhere(cfg.data.tokenizer):  # a tokenizer takes no bytes, so this one is not looked for
        config = described(cfg, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(WordLevel())), 0)
    else:
        tokenizer = found_tokenizer(cfg)
        config = described(cfg, tokenizer, vocabulary_size(tokenizer))
        check_vocabulary(config, vocabulary_size(tokenizer))
    check_length(config, cfg.data.sequence_length)
    return config


def is_elsewhere(name: str | None) -> bool:
    """Whether a model or tokenizer is the hub's, so that at most a copy of it is on this machine."""
    return name is not None and name != "byte" and not local_path(name).exists()


def described(cfg: Config, tokenizer: PreTrainedTokenizerBase, needed: int) -> transformers.PretrainedConfig:
    try:
        return model_config(cfg.model, tokenizer, needed)
    except UserError as error:
        raise not_here("model.path", cfg.model.path, "the folder of its config.json", error) from error


def found_tokenizer(cfg: Config) -> PreTrainedTokenizerBase:
    try:
        return load_tokenizer(cfg.data.tokenizer)
    except UserError as error:
        raise not_here("data.tokenizer", cfg.data.tokenizer, "model.vocab_size=N, or its folder", error) from error


def not_here(option: str, name: str | None, remedy: str, error: UserError) -> UserError:
    """Say that a plan fetches nothing, where that is the reason."""
    if not is_elsewhere(name):
        return error
    return UserError(
        f"{option}={name}: no such folder, and no copy in this machine's hub cache. A plan downloads nothing; "
        f"give {remedy}."
    )


def compare(
    cfg: Config, config: transformers.PretrainedConfig, plan: Plan, *, device: torch.device, seconds: float
) -> tuple[dict[str, Plan], list[str]]:
    """Plan what could be chosen instead of `cfg`, and return the overrides that took too long.

    Args:
        plan: of `cfg`.
        seconds: spent at most, as far as the plans made so far can tell.
    """
    plans: dict[str, Plan] = {}
    untried = []
    end, longest = time.monotonic() + seconds, 0.0
    for override, changed in alternatives(cfg, plan.peak).items():
        begin = time.monotonic()
        if begin + longest > end:
            untried.append(override)
            continue
        try:
            plans[override] = predict(changed, config, ranks=plan.ranks, device=device)
        except UserError:  # the model does not take this choice
            continue
        longest = max(longest, time.monotonic() - begin)
    return plans, untried


OTHER_FATES = (Fate.recompute, Fate.host, Fate.fp8)
"""What is planned instead of keeping activations: exact and slower, exact and beside the device, a little coarser."""

OTHER_OPTIMIZERS = ("adamw", "galore", "adamw_8bit", "apollo_mini")
"""What is planned instead of the chosen one: the usual, a low-rank, a low-bit and a nearly stateless method."""


def alternatives(cfg: Config, peak: Peak) -> dict[str, Config]:
    """Return what could be chosen instead, by the override that chooses it; those that may lower most come first.

    Args:
        peak: of `cfg`. A choice may lower the kinds of bytes it concerns, and no others.
    """
    train, weights = cfg.train, cfg.precision.weights
    found: list[tuple[str, tuple[str, ...], Config]] = []
    if cfg.activations == ActivationsConfig():
        for fate in OTHER_FATES:
            other = replace(cfg, activations=ActivationsConfig(fate=fate, lean=fate is Fate.fp8))
            found.append((f"activations={fate.value}", ("activations",), other))
    fewer = max((rows for rows in range(1, train.micro_batch) if train.micro_batch % rows == 0), default=None)
    if fewer is not None:
        smaller = replace(cfg, train=replace(train, micro_batch=fewer))
        found.append((f"train.micro_batch={fewer}", ("activations", "workspace"), smaller))
    if weights is Dtype.fp32:
        pure = replace(cfg, precision=replace(cfg.precision, weights=Dtype.bf16, compute=Dtype.bf16))
        found.append(("precision=bf16_pure", ("weights", "gradients", "activations", "workspace"), pure))
        if cfg.precision.compute is Dtype.fp32:
            autocast = replace(cfg, precision=replace(cfg.precision, compute=Dtype.bf16))
            found.append(("precision=bf16", ("activations",), autocast))
    for name in OTHER_OPTIMIZERS:
        if name != cfg.optim.name:
            other = replace(cfg, optim=registry.config_class(name)(in_backward=cfg.optim.in_backward))
            found.append((f"optim={name}", ("states", "workspace"), other))
    if not cfg.optim.in_backward:
        override = "optim.in_backward=true"
        in_backward = replace(cfg, optim=replace(cfg.optim, in_backward=True))
        if train.clip_norm > 0 and train.clip_by is ClipBy["global"]:
            override += " train.clip_by=parameter"
            in_backward = replace(in_backward, train=replace(train, clip_by=ClipBy["parameter"]))
        found.append((override, ("gradients",), in_backward))
    found.sort(key=lambda choice: -sum(peak.by_kind[kind] for kind in choice[1]))
    return {override: changed for override, _, changed in found}
