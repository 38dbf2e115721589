"""A model whose rows are split over ranks: what of a micro-batch is this rank's, and whether the model can be split.

The loop reads whole rows, the same on every rank of a group; labels are shifted already and positions count within
documents, so that a part of a row is a part of each of its tensors and nothing else. Losses are sums over a rank's
own targets, divided by the count of the whole global batch, so that gradients need no more than the sum over all ranks
that they get anyway.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from offload.config import Fate
from parallel.collectives import any_rank
from parallel.config import SequenceKind
from parallel.launch import World
from parallel.sequence.cost import Cost, Decay, Shape, StateCost
from parallel.sequence.group import make_strategy
from parallel.sequence.interface import NAME, Share, Unsupported, register
from parallel.sequence.layout import Layout, document_starts
from parallel.sequence.strategy import Strategy, WithStates
from parallel.shard import reshard
from trainer.adapt import keeps_attention
from trainer.check_sequence import check_attention, heads_of, linear_layers
from trainer.data.batch import Batch
from trainer.errors import UserError
from trainer.memory import format_bytes
from trainer.precision import autocast
from trainer.schema import Config, Dtype

LIMITS = {Dtype.fp64: 1e-9, Dtype.fp32: 1e-3, Dtype.bf16: 0.1, Dtype.fp8: 0.3}
"""Largest difference of split and whole logits beside the largest logit, by what products are made in. Attention that
is not what it should be shows as 0.1 and more in fp32, and is found in any precision by what it asks for."""


def split_rows(cfg: Config, world: World, model: nn.Module) -> Strategy | None:
    """Have `model` attend over rows that several ranks share, if they do; None where each has whole rows.

    Raises:
        UserError: its attention cannot be split so.
    """
    if world.sequence_degree == 1:
        return None
    config = model.config.get_text_config()  # type: ignore[union-attr, operator]
    heads, key_heads = check_attention(cfg, config, world.process_count)
    linear = linear_layers(config) > 0
    strategy = make_strategy(world, cfg.parallel, heads=heads, key_heads=key_heads, linear=linear)
    register()
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    return strategy


def own_part(batch: Batch, strategy: Strategy | None) -> Batch:
    """Cut from whole rows what this rank holds, and note where it lies."""
    if strategy is None:
        return batch
    positions = batch.position_ids
    fake = isinstance(positions, FakeTensor)  # has no values to find documents by
    starts = ((0,),) * len(batch) if fake else document_starts(positions)
    layout = Layout(strategy.cut, positions.shape[1], starts)

    def take(rows: Tensor) -> Tensor:
        return layout.take(rows, strategy.index)

    return Batch(take(batch.input_ids), take(batch.labels), take(positions), share=Share(strategy, layout))


@contextmanager
def whole_rows(cfg: Config, model: nn.Module, strategy: Strategy | None) -> Iterator[None]:
    """Let `model` attend by transformers' own function, over rows that this rank has whole."""
    if strategy is None:
        yield
        return
    model.set_attn_implementation(cfg.model.attention.value)  # type: ignore[operator]
    try:
        yield
    finally:
        model.set_attn_implementation(NAME)  # type: ignore[operator]


@torch.no_grad()
def check_split(cfg: Config, world: World, model: nn.Module, vocab_size: int, strategy: Strategy) -> None:
    """Run the model once over two short packed rows, split and whole, and hold the logits against each other.

    Whatever a model does along a row beside attention of the known kind shows here: a convolution, a state, a bias
    that distances make, a mask of its own. Every rank calls it; all raise if one has reason to.

    Raises:
        UserError: they differ.
    """
    length = 6 * strategy.cut.shortest + 5
    starts = (0, length // 3 + 1, length // 2 + 1)
    borders = torch.tensor([*starts, length]).diff()
    positions = torch.cat([torch.arange(int(count)) for count in borders])[None].expand(2, -1)
    ids = (7 * torch.arange(2 * length).square() + 3).reshape(2, length) % vocab_size
    rows = Batch(ids, ids, positions)
    mine, problem, off = own_part(rows, strategy), "", 0.0
    was_training = model.training
    model.eval()
    try:
        with autocast(cfg.precision, world.device):
            with whole_rows(cfg, model, strategy):
                expected = logits_of(model, rows, world.device)
            assert mine.share is not None
            expected = mine.share.layout.take(expected.flatten(2), strategy.index).view(2, -1, expected.shape[-1])
            found = logits_of(model, mine, world.device)
        off = float((found - expected).abs().max() / expected.abs().max())
    except Unsupported as error:
        problem = str(error)
    finally:
        model.train(was_training)
        reshard(model)
    asked = f"parallel.sequence={cfg.parallel.sequence.value}: {type(model).__name__}"
    if not problem and not off <= LIMITS[cfg.precision.compute]:
        problem = f"gives other logits when a row is split (off by {off:.1e} of the largest)"
    if any_rank(world, int(bool(problem)))[0]:
        raise UserError(f"{asked}: {problem or 'cannot be split'}. Use parallel.sequence=none for this model.")


def logits_of(model: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    logits: Tensor = model(
        input_ids=batch.input_ids.to(device), position_ids=batch.position_ids.to(device), use_cache=False, **batch.extra
    ).logits
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def layer_shape(cfg: Config, world: World, config: transformers.PretrainedConfig) -> Shape:
    """A layer's attention over the whole rows of a micro-batch."""
    text = config.get_text_config()
    heads, key_heads = heads_of(text)
    value_bytes = {Dtype.fp64: 8, Dtype.fp32: 4}.get(cfg.precision.compute, 2)
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    micro = min(cfg.train.micro_batch, cfg.train.global_batch // world.data_count)
    return Shape(micro, cfg.data.sequence_length, heads, key_heads, width, value_bytes)


def step_sends(cfg: Config, world: World, layers: "list[Layers]") -> int:
    """Bytes that a rank's attention sends in a step."""
    rows = cfg.train.global_batch // world.data_count
    recomputes = cfg.activations.fate in (Fate.recompute, Fate.selective)
    kept = keeps_attention(cfg)
    micro_step = 0
    for each in layers:
        again = each.cost.again if kept else each.cost.forward
        micro_step += each.count * (each.cost.forward + each.cost.backward + (again if recomputes else 0))
    return micro_step * (rows // min(cfg.train.micro_batch, rows))


def sequence_text(cfg: Config, world: World, config: transformers.PretrainedConfig, strategy: Strategy) -> str:
    """Say what sharing rows costs a rank and what it saves."""
    shape, cut, kind = layer_shape(cfg, world, config), strategy.cut, cfg.parallel.sequence
    layers = layers_of(config.get_text_config(), strategy, shape)
    how = {SequenceKind.usp: f" ({cut.ulysses} exchange heads, a ring of {cut.ring})"}.get(kind, "")
    fewer = " (fewer where rows are packed)" if kind is SequenceKind.lightseq else ""
    held = sum(map(len, cut.of_rank(shape.length, strategy.index)))
    costs = "".join(f"; {each.text}" for each in layers)
    return (
        f"parallel.sequence={kind.value}: {cut.degree} ranks share each row{how}, {held:,} of {shape.length:,} tokens "
        f"here{costs}; sent in all: {format_bytes(step_sends(cfg, world, layers))} a step{fewer}"
    )


@dataclass(frozen=True)
class Layers:
    """Layers whose attention costs the same."""

    name: str
    count: int
    cost: Cost
    whole_kept: int

    @property
    def text(self) -> str:
        cost = self.cost
        sent = f"{format_bytes(cost.forward)} forward and {format_bytes(cost.backward)} backward"
        kept = f"{format_bytes(cost.kept)} for backward (whole rows: {format_bytes(self.whole_kept)})"
        return (
            f"a {self.name} sends {sent} a micro-batch; its attention keeps {kept} and holds "
            f"{format_bytes(cost.working)} more while it runs"
        )


def layers_of(config: Any, strategy: Strategy, shape: Shape) -> list[Layers]:
    """A model's layers by what their attention costs."""
    linear = linear_layers(config)
    softmax = int(config.num_hidden_layers) - linear
    found = []
    if isinstance(strategy, WithStates):
        decay = decay_of(config)
        whole = StateCost(strategy.cut, 0, shape, decay).kept_of(shape.length)
        found.append(Layers("layer of linear attention", linear, strategy.state_cost(shape, decay), whole))
    if softmax:
        name = "layer of softmax attention" if linear else "layer"
        found.append(Layers(name, softmax, strategy.cost(shape), shape.whole_kept))
    return found


def decay_of(config: Any) -> Decay:
    """What a linear layer's decays depend on."""
    of_tokens = {"basic": Decay.none, "gated": Decay.of_tokens}
    return of_tokens.get(config.linear_attention, Decay.of_heads)
