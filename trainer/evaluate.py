"""Held-out loss: token-weighted and exact, over any number of ranks."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn

from parallel.collectives import sum_over_ranks
from parallel.launch import World, connected, launched_rank
from parallel.sequence.strategy import Strategy
from parallel.shard import reshard
from trainer.check import check_hardware, sequence_problems
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
) -> Evaluation:
    """Measure `model` on this rank's share of held-out batches, and sum over the ranks.

    The model is put into evaluation mode and back.
    """
    was_training = model.training
    model.eval()
    # (loss sum, targets, sum of batch means, batches)
    sums = torch.zeros(4, dtype=torch.float64)
    try:
        for batch in batches:
            mine = own_part(batch, strategy)
            moved = to_device(mine, world.device)
            with autocast(precision, world.device):
                run = partial(
                    model, input_ids=moved.input_ids, position_ids=moved.position_ids, use_cache=False, **moved.extra
                )
                loss = float(loss_of(run, moved.labels, evaluating=True))
            targets, of_batch = (int((part.labels != IGNORE).sum()) for part in (mine, batch))
            counted = (of_batch > 0) / world.sequence_degree  # by each rank that shares it
            sums += torch.tensor([loss, targets, loss / max(of_batch, 1), counted], dtype=torch.float64)
    finally:
        model.train(was_training)
        reshard(model)
    loss_sum, targets_sum, means, count = sum_over_ranks(world, sums).tolist()
    return Evaluation(loss_sum / max(targets_sum, 1), int(targets_sum), means / (count + 1))


def evaluate_run(run: Path, overrides: list[str], step: int | None) -> Evaluation:
    """Measure the checkpoint of `run` at `step` (default: the newest good one) on held-out text, and print it.

    Args:
        overrides: options of `data`, `precision` and the like, in place of the run's own.

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
        found = evaluate(model, HeadLoss(model, cfg.loss), batches, world, cfg.precision, strategy)
        if world.leads:
            rows = min(cfg.data.eval_rows or len(corpus.heldout), len(corpus.heldout))
            print(
                f"step {checkpoint.step} of {run}, {rows:,} of {len(corpus.heldout):,} held-out rows, "
                f"{found.targets:,} targets"
            )
            print(f"  loss        {found.loss:.6f}  nats a token, every target weighs the same")
            print(f"  perplexity  {found.perplexity:.4f}")
            print(
                f"              {found.authors_perplexity:.4f}  as the low-rank papers' evaluators print it "
                "(loss * B/(B+1) for B batches: understated)"
            )
    return found
