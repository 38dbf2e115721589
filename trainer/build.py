"""From configuration to objects, in the one legal order: data, model, adapt, shard, optimizer, engine, meter.

The optimizer sees what is left to this rank of each parameter, under the parameter's name. Everything a user can get
wrong about data and model files is found before weights are made.
"""

from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
import transformers
from torch import nn
from torch.optim import Optimizer

from offload.activations import Activations
from offload.config import Fate
from offload.float8_layers import plain_products
from offload.host_step import states_away
from offload.pool import TierError
from offload.states import OffloadedStates, offloaded
from optim import registry
from optim.in_backward import InBackward
from optim.residency import kept_by
from parallel.config import EngineName
from parallel.launch import World
from parallel.mesh import another_group_of_shards, share_of
from parallel.place import spread as spread_over_ranks
from parallel.sequence.strategy import Strategy
from parallel.shard import reshard
from parallel.spread import Spread
from trainer.adapt import blocks, keeps_attention, manage_activations, untied_ends
from trainer.data.corpus import Corpus, build_corpus
from trainer.data.leak import check_documents_apart
from trainer.determinism import make_deterministic
from trainer.engines.base import Engine
from trainer.engines.partition import flat_share
from trainer.engines.torch_engine import TorchEngine
from trainer.errors import UserError
from trainer.gate import Gate
from trainer.loss.head import HeadLoss
from trainer.matrices import owners_of
from trainer.memory import MemoryMeter
from trainer.model import build_model, check_length, check_vocabulary, hub_config, linear_remarks, model_config
from trainer.precision import autocast, int8_matrices, is_mixed, rounding, settled, use_float8_of
from trainer.rows import Part
from trainer.schema import Config
from trainer.sequence import check_split, split_rows, whole_rows
from trainer.state import seed_all


@dataclass(frozen=True, kw_only=True)
class Trainable:
    """What a step needs."""

    cfg: Config
    world: World
    model: nn.Module
    """The transformers model itself, never a wrapper."""
    optimizer: Optimizer
    engine: Engine
    in_backward: InBackward | None
    """What steps the weights while backward runs, instead of the engine."""
    meter: MemoryMeter
    loss: HeadLoss
    activations: Activations | None
    """None where autograd keeps all that blocks save."""
    remarks: tuple[str, ...] = ()
    """What the user should know of how it was made."""
    strategy: Strategy | None = None
    """How attention goes over rows that several ranks share; None where each has whole rows."""
    states: OffloadedStates | None = None
    """None where the optimizer's states stay on the device."""
    gate: Gate = field(default_factory=Gate)
    """Opened before weights and states change."""


@dataclass(frozen=True, kw_only=True)
class Built(Trainable):
    """What a run is made of."""

    corpus: Corpus
    model_config: transformers.PretrainedConfig


def build_parts(cfg: Config, world: World) -> tuple[Corpus, transformers.PretrainedConfig, nn.Module]:
    """Return corpus, model configuration and model: what an evaluation needs."""
    if cfg.model.path is not None:
        hub_config(cfg.model)  # what is wrong with it is told before text is read
    corpus = build_corpus(
        cfg.data,
        seed=cfg.seed,
        process_rank=world.process_rank,
        barrier=world.barrier,
        say=partial(print, flush=True) if world.leads else lambda message: None,
    )
    config = model_config(cfg.model, corpus.tokenizer, corpus.vocab_size)
    check_vocabulary(config, corpus.vocab_size)
    check_length(config, cfg.data.sequence_length)
    share: Part | None = share_of(world, cfg.parallel)
    if cfg.parallel.engine is EngineName.deepspeed:
        share = flat_share(world, cfg.parallel)
    model = build_model(
        cfg.model, config,
        weights=cfg.precision.weights, int8=int8_matrices(cfg), device=world.device, seed=cfg.seed, share=share,
        length=cfg.data.sequence_length,
    )  # fmt: skip
    if not next(model.parameters()).is_meta:
        try_out(cfg, world, model, corpus.vocab_size)
    return corpus, config, model


def try_out(cfg: Config, world: World, model: nn.Module, vocab_size: int) -> None:
    """Run the model once, to see that it keeps documents apart and, on CUDA, can give the same bits every time.

    Raises:
        UserError: it mixes the documents of a row.
    """
    # FSDP2 hands out weights in the dtype that products are made in. FP8's scales are shared by the documents of a row:
    # a product without them shows what else they share.
    with plain_products(model), autocast(cfg.precision, world.device):
        check_documents_apart(model, vocab_size, cfg.data.packing)
    if world.device.type == "cuda" and cfg.run.deterministic:
        problem = make_deterministic(model, vocab_size)
        if problem and world.leads:
            print(f"! {problem}", flush=True)


def with_torch(cfg: Config, world: World, model: nn.Module) -> tuple[Optimizer, Engine, InBackward | None]:
    """Lay `model` over the ranks; return the optimizer of what is left here, its engine, and its update in backward."""
    spread = place(cfg, world, model)
    with kept_by(states_away(cfg.offload, world.device)) if cfg.offload.moves_states else nullcontext():
        asked = settled(cfg, world.device)
        named, stepped = spread.owner.named_parameters(), dict(spread.named_parameters())
        optimizer = registry.build(asked, named, rounding=rounding(cfg.precision), stepped=stepped)
    states, away = offloaded(optimizer), None
    if states is not None:
        states.require_room()
        if cfg.offload.gradients:
            away = states.take_gradients([p for _, p in spread.named_parameters() if p.requires_grad])
    optimizer.check_finite = False  # the step has looked at the global norm before it lets an optimizer run
    in_backward = None
    if cfg.optim.in_backward:
        clip_by = cfg.train.clip_by.value
        if cfg.parallel.zero > 1 and world.process_count > 1 and world.gradients is None:
            optimizer.shard_group = another_group_of_shards(world, cfg.parallel)  # FSDP2's own is busy in the hooks
        in_backward = InBackward(optimizer, world, clip_norm=cfg.train.clip_norm, clip_by=clip_by)
    return optimizer, TorchEngine(spread, optimizer, away), in_backward


def with_library(cfg: Config, world: World, model: nn.Module) -> tuple[Optimizer, Engine, None]:
    """Put a library around `model` that wants to wrap the optimizer too; it is imported when it is asked for."""
    from trainer.engines.deepspeed_engine import DeepSpeedEngine

    engine = DeepSpeedEngine(model, world, cfg)
    return engine.optimizer, engine, None


def make_trainable(cfg: Config, world: World, model: nn.Module) -> Trainable:
    """Put around `model` what trains it, fake weights included (`trainer.plan`).

    Raises:
        UserError: model and options do not fit each other.
    """
    strategy = split_rows(cfg, world, model)
    remarks = [*use_float8_of(cfg.precision, model), *linear_remarks(model, world.device)]
    fates = replace(cfg.activations, attention=Fate.keep) if keeps_attention(cfg) else cfg.activations
    activations = manage_activations(fates, world, model, shared_rows=strategy is not None)
    loss = HeadLoss(model, cfg.loss)
    with_engine = with_torch if cfg.parallel.engine is EngineName.torch else with_library
    try:
        optimizer, engine, in_backward = with_engine(cfg, world, model)
    except ValueError as error:  # a rule that fits no parameter, say
        raise UserError(str(error)) from error
    except TierError as error:
        raise UserError(f"{error}. {error.remedy}.") from error
    states = offloaded(optimizer)
    return Trainable(
        cfg=cfg,
        world=world,
        model=model,
        optimizer=optimizer,
        engine=engine,
        in_backward=in_backward,
        meter=MemoryMeter(
            model,
            optimizer,
            world.device,
            elsewhere=activations.ledger if activations else None,
            beside=states.ledgers if states is not None else None,
        ),
        loss=loss,
        activations=activations,
        remarks=(*remarks, *engine.remarks()),
        strategy=strategy,
        states=states,
    )


def place(cfg: Config, world: World, model: nn.Module) -> Spread:
    """Lay the model over the ranks, as `parallel.zero` says.

    Raises:
        UserError: the model has no blocks to shard by.
    """
    layers = [block for _, block in blocks(model)]
    if cfg.parallel.zero > 1 and not layers:
        raise UserError(
            f"parallel.zero={cfg.parallel.zero}: {type(model).__name__} has no blocks (transformers' "
            "GradientCheckpointingLayer) to gather one after the other. Use parallel.zero=1 or 0."
        )
    compute = torch.bfloat16 if is_mixed(cfg.precision) else None
    return spread_over_ranks(
        model, world, cfg.parallel,
        blocks=layers, ends=untied_ends(model), compute=compute, in_backward=cfg.optim.in_backward,
        owners=partial(owners_of, cfg, world, model),
    )  # fmt: skip


def build(cfg: Config, world: World) -> Built:
    """Make everything a training run needs.

    Raises:
        UserError: files or names that the configuration alone could not show to be wrong.
    """
    corpus, config, model = build_parts(cfg, world)
    tried = not next(model.parameters()).is_meta
    trainable = make_trainable(cfg, world, model)
    if not tried:
        with whole_rows(cfg, model, trainable.strategy):
            try_out(cfg, world, model, corpus.vocab_size)
        reshard(model)
    if trainable.strategy is not None:
        check_split(cfg, world, model, corpus.vocab_size, trainable.strategy)
    seed_all(cfg.seed, world.process_rank)
    return Built(**vars(trainable), corpus=corpus, model_config=config)
