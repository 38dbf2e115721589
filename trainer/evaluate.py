"""Held-out loss: token-weighted and exact, over any number of ranks."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from parallel.collectives import sum_over_ranks
from parallel.launch import World, connected, launched_rank
from parallel.sequence.strategy import Strategy
from parallel.shard import reshard
from trainer.by_position import Buckets, buckets_of
from trainer.check_machine import check_hardware
from trainer.check_ranks import sequence_problems
from trainer.cli.compose import load_saved
from trainer.data import IGNORE
from trainer.data.batch import Batch
from trainer.data.corpus import build_corpus
from trainer.data.stream import heldout_batches
from trainer.errors import UserError
from trainer.finished import load_model, open_checkpoint, open_run
from trainer.loss.head import HeadLoss
from trainer.model import check_length, check_vocabulary
from trainer.precision import autocast
from trainer.rope.scaling import rope_text
from trainer.schema import PrecisionConfig
from trainer.sequence import own_part, split_rows
from trainer.step import to_device


@dataclass(frozen=True)
class Evaluation:
    """What an evaluation found."""

    loss: float
    """Mean negative log likelihood of a target, nats; every target counts once."""
    targets: int
    authors_loss: float
    """What the low-rank papers' evaluators print for the same model: the unweighted mean of batch means, divided by
    one batch too many (their counter starts at 1; GaLore issue #30)."""
    by_position: dict[str, dict[str, Any]] = field(default_factory=dict)
    """`loss`, `perplexity` and `targets` by bucket of positions (`first-last`), where that was asked for."""

    def to_json(self) -> dict[str, Any]:
        """Return all figures, under the names they have in metrics.jsonl."""
        found = {
            "eval_loss": self.loss,
            "eval_perplexity": self.perplexity,
            "eval_perplexity_authors": self.authors_perplexity,
            "eval_targets": self.targets,
        }
        return found | ({"eval_by_position": self.by_position} if self.by_position else {})

    def lines(self) -> list[str]:
        """Return all figures as text."""
        found = [
            f"targets     {self.targets:,}",
            f"loss        {self.loss:.6f}  nats a token, every target weighs the same",
            f"perplexity  {self.perplexity:.4f}",
            f"            {self.authors_perplexity:.4f}  as the low-rank papers' evaluators print it "
            "(loss * B/(B+1) for B batches: understated)",
        ]
        if self.by_position:
            found.append("by position        loss  perplexity     targets")
        return found + [
            f"  {name:<13} {figures['loss']:7.4f}  {figures['perplexity']:10.2f}  {figures['targets']:10,}"
            for name, figures in self.by_position.items()
        ]

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def authors_perplexity(self) -> float:
        return math.exp(min(self.authors_loss, 700.0))


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loss_of: HeadLoss,
    batches: Iterable[Batch],
    world: World,
    precision: PrecisionConfig,
    strategy: Strategy | None = None,
    buckets: Buckets | None = None,
) -> Evaluation:
    """Measure `model` on this rank's share of held-out batches, and sum over the ranks.

    The model is put into evaluation mode and back.
    """
    was_training = model.training
    model.eval()
    # (loss sum, targets, sum of batch means, batches), then losses and targets by bucket
    sums = torch.zeros(4 + 2 * len(buckets or ()), dtype=torch.float64)
    try:
        for batch in batches:
            mine = own_part(batch, strategy)
            moved = to_device(mine, world.device)
            with autocast(precision, world.device):
                run = partial(
                    model, input_ids=moved.input_ids, position_ids=moved.position_ids, use_cache=False, **moved.extra
                )
                groups = buckets.groups(moved) if buckets else None
                losses = loss_of(run, moved.labels, evaluating=True, groups=groups).double().cpu()
            loss = float(losses.sum())
            targets, of_batch = (int((part.labels != IGNORE).sum()) for part in (mine, batch))
            counted = (of_batch > 0) / world.sequence_degree  # by each rank that shares it
            sums[:4] += torch.tensor([loss, targets, loss / max(of_batch, 1), counted], dtype=torch.float64)
            if buckets:
                sums[4:] += torch.cat([losses, buckets.targets(mine)])
    finally:
        model.train(was_training)
        reshard(model)
    loss_sum, targets_sum, means, count, *rest = sum_over_ranks(world, sums).tolist()
    by_position = buckets.found(rest[: len(buckets)], rest[len(buckets) :]) if buckets else {}
    return Evaluation(loss_sum / max(targets_sum, 1), int(targets_sum), means / (count + 1), by_position)


def evaluate_run(run: Path, overrides: list[str], step: int | None, as_json: bool = False) -> Evaluation:
    """Measure the checkpoint of `run` at `step` (default: the newest good one) on held-out text, and print it.

    Args:
        overrides: options of `data`, `precision` and the like, in place of the run's own.
        as_json: print an object instead of text.

    Raises:
        UserError: no run, no checkpoint, or text and tokenizer that do not fit the model.
    """
    folder = open_run(run)
    cfg = load_saved(folder.config, overrides)
    check_hardware(cfg)
    ranks = launched_rank()[1]
    if ranks > 1 and (problems := sequence_problems(cfg, ranks)):  # one process has whole rows, whatever the run had
        raise UserError("\n".join(problems))
    with connected(cfg.parallel, cfg.run.device.value, cfg.run.threads) as world:
        checkpoint = open_checkpoint(folder, step, world)
        corpus = build_corpus(cfg.data, seed=cfg.seed, process_rank=world.process_rank, barrier=world.barrier)
        model, _ = load_model(cfg, folder, checkpoint, world)
        check_vocabulary(model.config, corpus.vocab_size)
        check_length(model.config, cfg.data.sequence_length)
        strategy = split_rows(cfg, world, model)
        batches = heldout_batches(
            corpus.heldout,
            micro_batch=cfg.train.micro_batch,
            process_rank=world.data_rank,
            process_count=world.data_count,
            limit=cfg.data.eval_rows,
        )
        buckets = buckets_of(cfg.train.eval_by_position, cfg.data.sequence_length)
        found = evaluate(model, HeadLoss(model, cfg.loss), batches, world, cfg.precision, strategy, buckets)
        if world.leads and as_json:
            print(json.dumps({"run": str(run), "step": checkpoint.step, **found.to_json()}, indent=2))
        elif world.leads:
            held = len(corpus.heldout)
            print(
                f"step {checkpoint.step} of {run}, {min(cfg.data.eval_rows or held, held):,} of {held:,} held-out rows"
            )
            positions = rope_text(model.config, cfg.model.rope, cfg.data.sequence_length)
            print("\n".join(f"  {line}" for line in ([positions] if positions else []) + found.lines()))
    return found
