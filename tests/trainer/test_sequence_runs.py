"""Training with rows split over gloo ranks is the training of one process: losses, norms, weights."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from parallel.collectives import sum_over_ranks
from parallel.config import ParallelConfig
from parallel.launch import World, connected
from parallel.sequence.layout import Cut
from parallel.sequence.strategy import Exact
from tests.ranks import on_ranks
from tests.trainer.tiny import step_batch, trainable
from trainer.cli.compose import load
from trainer.data import IGNORE
from trainer.data.batch import StepBatch
from trainer.sequence import layer_shape, layers_of, step_sends
from trainer.step import train_step

LENGTH = 31
"""Divided by no number of ranks."""
COMMON = (
    f"data.sequence_length={LENGTH}", "train.global_batch=4", "train.micro_batch=2", "schedule=constant",
    "precision=fp64", "train.steps=10",
)  # fmt: skip
ADAMW, GALORE = "optim=adamw", "optim=galore optim.rank=8 optim.update_proj_gap=4"
HOST = "activations=host activations.min_bytes=256"
HYBRID = "model.linear=lightning model.softmax_every=2"
QUICK = [
    (ADAMW, "parallel.sequence=ulysses parallel.zero=0 train.micro_batch=4"),
    (GALORE, f"parallel.sequence=ring parallel.zero=3 {HOST}"),
    (ADAMW, "parallel.sequence=lightseq parallel.zero=0 activations=recompute"),
    (f"{ADAMW} {HYBRID}", "parallel.sequence=lasp2 parallel.zero=0 activations=recompute"),
    (f"{GALORE} model.linear=gated", f"parallel.sequence=lasp2 parallel.zero=3 {HOST}"),
]
"""For two ranks."""
FOUR = [
    (GALORE, "parallel.sequence=usp parallel.zero=3 activations=recompute"),
    (ADAMW, "parallel.sequence=usp parallel.ulysses_degree=2 parallel.zero=0"),
    (ADAMW, f"parallel.sequence=ring parallel.sequence_degree=2 parallel.zero=3 {HOST}"),
    (ADAMW, "parallel.sequence=ring parallel.sequence_degree=2 parallel.zero=2 parallel.replicas=2"),
    (GALORE, "parallel.sequence=ulysses parallel.sequence_degree=2 parallel.zero=0"),
    (GALORE, "parallel.sequence=ring parallel.zero=1 activations=recompute"),
    (ADAMW, f"parallel.sequence=lightseq parallel.zero=0 {HOST}"),
    (GALORE, "parallel.sequence=lightseq parallel.zero=3 activations=recompute"),
    (ADAMW, "parallel.sequence=lightseq parallel.sequence_degree=2 parallel.zero=2"),
    (GALORE, "parallel.sequence=lightseq optim.in_backward=true train.clip_by=parameter activations=selective"),
    (ADAMW, "parallel.sequence=ulysses parallel.zero=3"),
    (ADAMW, "parallel.sequence=ring optim.in_backward=true train.clip_by=parameter"),
    (GALORE, "parallel.sequence=ring optim.in_backward=true train.clip_by=parameter parallel.zero=3"),
    (ADAMW, "parallel.sequence=ring activations=selective activations.lean=true"),
    (ADAMW, "parallel.sequence=ulysses activations.lean=true activations.tile_mlp=3"),
    (f"{ADAMW} {HYBRID}", f"parallel.sequence=lasp2 parallel.zero=3 {HOST}"),
    (f"{GALORE} {HYBRID}", "parallel.sequence=lasp2 parallel.sequence_degree=2 parallel.zero=0 activations=recompute"),
    (f"{ADAMW} model.linear=basic", "parallel.sequence=lasp2 activations=selective activations.lean=true"),
    (f"{GALORE} model.linear=retention", "parallel.sequence=lasp2 optim.in_backward=true train.clip_by=parameter"),
    (f"{ADAMW} {HYBRID}", "parallel.sequence=ring parallel.zero=3"),
    (f"{ADAMW} model.linear=gated", "parallel.sequence=usp parallel.zero=1 activations=recompute"),
]
Trained = tuple[list[list[float]], dict[str, torch.Tensor]]


MASKED = [[], *(cut.of_rank(LENGTH, 0) for cut in (Cut(ulysses=2), Cut(ring=2), Cut(ring=2, ulysses=2), Cut(ring=4)))]
"""Places without targets, by the step: in every other one those of the first rank of some split."""


def packed(world: World, micro_batch: int, step: int) -> StepBatch:
    """Rows of documents that end anywhere, with steps in which the first rank that shares them has no target."""
    made = step_batch(world, micro_batch, 4, step, length=LENGTH)
    positions = torch.cat([torch.arange(11), torch.arange(1), torch.arange(LENGTH - 12)])
    for places in MASKED[step % len(MASKED)]:
        for micro in made.micros:
            micro.labels[:, places.start : places.stop] = IGNORE
    targets = sum(int((micro.labels != IGNORE).sum()) for micro in made.micros)
    everywhere = int(sum_over_ranks(world, torch.tensor(targets))) // world.sequence_degree
    micros = [replace(micro, position_ids=positions.expand(len(micro), -1).contiguous()) for micro in made.micros]
    return replace(made, micros=micros, targets=everywhere)


def train(world: World, overrides: str, steps: int = 10) -> Trained:
    """Loss, norm and whether applied of each step, and the weights at the end."""
    asked = [*COMMON, *overrides.split()]
    cfg = load(asked)
    world = replace(world, sequence_degree=cfg.parallel.degree(world.process_count))
    built = trainable(world, asked)
    found = []
    for step in range(steps):
        stepped = train_step(built, packed(world, cfg.train.micro_batch, step), step, 0)
        loss = sum_over_ranks(world, stepped.loss).item()
        found.append([loss, stepped.norm or 0.0, float(stepped.applied)])
    whole = {name: p.full_tensor() if hasattr(p, "full_tensor") else p for name, p in built.model.named_parameters()}
    return found, {name: p.detach().clone() for name, p in whole.items()}


def train_all(cases: list[tuple[str, str]]) -> list[tuple[list[list[float]], dict[str, Any]]]:
    with connected(ParallelConfig(), "cpu", threads=1) as world:
        trained = [train(world, f"{optim} {layout}") for optim, layout in cases]
    # lists and not tensors: those would be shared by a process that ends here
    return [(records, {name: p.tolist() for name, p in weights.items()}) for records, weights in trained]


def check(cases: list[tuple[str, str]], ranks: int) -> None:
    for case, found in zip(cases, zip(*on_ranks(ranks, train_all, cases), strict=True), strict=True):
        in_backward = "clip_by" in case[1]  # which does not know the global norm
        records, weights = train(World(), f"{case[0]} {'train.clip_by=parameter' if in_backward else ''}")
        for rank_records, rank_weights in found:
            steps = [
                torch.tensor(each)[:, :1] if in_backward else torch.tensor(each) for each in (rank_records, records)
            ]
            torch.testing.assert_close(*steps, rtol=1e-5, atol=1e-9, msg=lambda text, case=case: f"{case}: {text}")
            for name, p in weights.items():
                found_p = torch.tensor(rank_weights[name], dtype=p.dtype)
                torch.testing.assert_close(
                    found_p, p, rtol=1e-5, atol=1e-7, msg=lambda text, case=case: f"{case}: {text}"
                )


def test_two_ranks_that_share_rows_train_as_one_process() -> None:
    check(QUICK, 2)


KEEPING = {
    "keep": ("lightseq", "activations=keep", 1),
    "the default of lightseq": ("lightseq", "activations=recompute", 1),
    "from the host": ("lightseq", "activations=recompute_host activations.min_bytes=256", 1),
    "selective": ("lightseq", "activations=selective", 1),
    "not kept": ("lightseq", "activations=recompute activations.attention=recompute", 2),
    "the default of others": ("ring", "activations=recompute", 2),
    "a ring's": ("ring", "activations=recompute activations.attention=keep", 1),
    "by a rule": ("ring", "activations=recompute activations.rules=['scaled_dot_product_attention()->keep']", 1),
    "ulysses'": ("ulysses", "activations=recompute activations.attention=keep", 1),
}
"""How rows are split, what blocks do, and how often a layer's attention is computed for a micro-batch."""


def counted(world: World, kind: str, asked: str) -> tuple[int, int, int, list[float]]:
    """Of a step: attentions computed, bytes sent, bytes told, and numbers that show any bit of its gradients."""
    overrides = [*COMMON, "optim=sgd", f"parallel.sequence={kind}", *asked.split()]
    world = replace(world, sequence_degree=world.process_count)
    built = trainable(world, overrides)
    strategy, computed = built.strategy, []
    assert isinstance(strategy, Exact)

    def counting(*args: Any) -> Any:
        computed.append(1)
        return strategy.method.forward(*args)

    method = strategy.method._replace(forward=counting)
    built = replace(built, strategy=replace(strategy, method=method))
    stepped = train_step(built, step_batch(world, 2, 4, 0, length=LENGTH), 0, 0)
    config: Any = built.model.config
    told = step_sends(built.cfg, world, layers_of(config, strategy, layer_shape(built.cfg, world, config)))
    sent = strategy.inner.sent + strategy.outer.sent
    return len(computed), sent, told, [stepped.loss.item(), *(p.sum().item() for p in built.model.parameters())]


def count_all() -> dict[str, tuple[int, int, int, list[float]]]:
    with connected(ParallelConfig(), "cpu", threads=1) as world:
        return {name: counted(world, kind, asked) for name, (kind, asked, _) in KEEPING.items()}


def test_attention_is_computed_and_sent_once_where_it_is_kept_to_the_same_bits() -> None:
    layers, micros = 2, 2
    for found in on_ranks(2, count_all):
        for name, (kind, _, times) in KEEPING.items():
            computed, sent, told, numbers = found[name]
            assert computed == times * layers * micros, name
            assert sent == told, name
            if kind == "lightseq":
                assert numbers == found["keep"][3], name


@pytest.mark.slow
def test_four_ranks_that_share_rows_train_as_one_process() -> None:
    check(FOUR, 4)


@pytest.mark.slow
def test_three_ranks_that_share_rows_train_as_one_process() -> None:
    check(QUICK, 3)
