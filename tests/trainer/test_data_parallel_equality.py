"""DDP on several ranks, with accumulation and uneven masks, trains what one process trains."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from parallel.config import ParallelConfig
from parallel.launch import World, connected
from tests.ranks import on_ranks

STEPS = 10
Weights = dict[str, NDArray[Any]]


def chat_file(folder: Path) -> Path:
    """Chats with answers of very different lengths: rows with many targets, rows with few."""
    rng = np.random.default_rng(0)
    path = folder / "chats.jsonl"
    with path.open("w") as file:
        for index in range(240):
            question = "tell me about " + " ".join(f"w{rng.integers(99)}" for _ in range(rng.integers(1, 20)))
            answer = " ".join(f"a{rng.integers(99)}" for _ in range(1 if index % 3 else rng.integers(5, 30)))
            messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": messages}) + "\n")
    return path


def overrides(path: str, precision: str, optimizer: str) -> list[str]:
    low_rank = (
        ["optim.rank=8", "optim.update_proj_gap=4", "optim.lr=0.01"] if optimizer == "galore" else ["optim.lr=0.003"]
    )
    return [
        "data=chat",
        f"data.path={path}",
        "data.packing=document",
        "data.sequence_length=96",
        "data.eval_fraction=0.1",
        f"data.cache_dir={Path(path).parent / 'cache'}",
        "model.hidden_size=32",
        "model.intermediate_size=48",
        "model.layers=2",
        "model.heads=4",
        "model.kv_heads=2",
        f"precision={precision}",
        f"optim={optimizer}",
        *low_rank,
        f"train.steps={STEPS}",
        "train.global_batch=12",
        "train.micro_batch=2",
        "train.clip_norm=0.5",
        "schedule.warmup=0.3",
        "run.device=cpu",
        "run.threads=1",
    ]


def trained(asked: list[str], world: World) -> tuple[list[float], Weights, Weights]:
    """Take STEPS real trainer steps; return global losses, final weights, and the first step's gradients."""
    from parallel.collectives import sum_over_ranks
    from trainer.build import build
    from trainer.cli.compose import load
    from trainer.data.stream import TrainStream
    from trainer.step import train_step

    cfg = load(asked)
    built = build(cfg, world)
    stream = TrainStream(
        built.corpus.train,
        seed=0,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        process_rank=world.process_rank,
        process_count=world.process_count,
    )
    gradients: Weights = {}
    clear = built.engine.clear_gradients

    def keep_first() -> None:
        if not gradients:
            gradients.update({n: p.grad.numpy().copy() for n, p in built.model.named_parameters()})
        clear()

    built.engine.clear_gradients = keep_first
    losses = []
    for step in range(STEPS):
        stepped = train_step(built, next(stream), step, 0)
        assert stepped.applied
        losses.append(sum_over_ranks(world, stepped.loss).item())
    return losses, {name: p.detach().numpy().copy() for name, p in built.model.named_parameters()}, gradients


def plain_torch(asked: list[str], world: World) -> Weights:
    """The same training with nothing of ours but data and model: torch's DDP, its averaging, its AdamW."""
    from torch.nn.functional import cross_entropy
    from torch.nn.parallel import DistributedDataParallel

    from optim.schedule import multiplier
    from trainer.build import build_parts
    from trainer.cli.compose import load
    from trainer.data.stream import TrainStream

    cfg = load(asked)
    corpus, _, model = build_parts(cfg, world)
    stream = TrainStream(
        corpus.train,
        seed=0,
        global_batch=cfg.train.global_batch,
        micro_batch=cfg.train.micro_batch,
        process_rank=world.process_rank,
        process_count=world.process_count,
    )
    wrapped = DistributedDataParallel(model) if world.process_count > 1 else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=cfg.optim.lr, weight_decay=0.0)
    for step in range(STEPS):
        batch = next(stream)
        for index, micro in enumerate(batch.micros):
            if world.process_count > 1:
                wrapped.require_backward_grad_sync = index == len(batch.micros) - 1
            logits = wrapped(input_ids=micro.input_ids, position_ids=micro.position_ids, use_cache=False).logits
            total = cross_entropy(logits.flatten(0, 1), micro.labels.flatten(), reduction="sum")
            (total * world.process_count / batch.targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.train.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = cfg.optim.lr * multiplier(cfg.schedule, step, STEPS)
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters()}


CASES = [("fp64", "adamw"), ("fp64", "galore"), ("fp32", "adamw"), ("fp32", "galore")]


def all_cases(path: str) -> dict[str, Any]:
    """Everything one set of processes has to show; one launch for all cases."""
    with connected(ParallelConfig(), "cpu", 1) as world:
        found: dict[str, Any] = {f"{p} {o}": trained(overrides(path, p, o), world) for p, o in CASES}
        found["plain"] = plain_torch(overrides(path, "fp32", "adamw"), world)
        if world.process_count == 1:
            for optimizer in ("adamw", "galore"):
                asked = overrides(path, "fp32", optimizer)
                found[f"summed otherwise {optimizer}"] = [
                    trained([*asked, f"train.micro_batch={size}"], world)[0] for size in (1, 12)
                ]
    return found


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Any]]:
    path = str(chat_file(tmp_path_factory.mktemp("chat")))
    alone = all_cases(path)
    return {1: alone, 2: on_ranks(2, all_cases, path)[0], 3: on_ranks(3, all_cases, path)[0]}


def distance(a: Weights, b: Weights) -> float:
    return max(float(np.abs(a[name] - b[name]).max()) for name in a)


def test_rows_are_unevenly_masked(results: dict[int, dict[str, Any]], tmp_path: Path) -> None:
    """Else the other tests could pass with a mean of means."""
    from trainer.cli.compose import load
    from trainer.data.corpus import build_corpus

    cfg = load(overrides(str(chat_file(tmp_path)), "fp32", "adamw"))
    targets = build_corpus(cfg.data, seed=0).train.targets
    assert targets.max() > 10 * targets.min()


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_fp64_losses_and_weights_equal_one_process(
    results: dict[int, dict[str, Any]], ranks: int, optimizer: str
) -> None:
    losses, weights, _ = results[ranks][f"fp64 {optimizer}"]
    alone_losses, alone_weights, _ = results[1][f"fp64 {optimizer}"]
    np.testing.assert_allclose(losses, alone_losses, rtol=0, atol=1e-10)
    assert distance(weights, alone_weights) < 1e-10


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("optimizer", ["adamw", "galore"])
def test_fp32_first_gradients_and_losses_equal_one_process(
    results: dict[int, dict[str, Any]], ranks: int, optimizer: str
) -> None:
    losses, _, gradients = results[ranks][f"fp32 {optimizer}"]
    alone_losses, _, alone_gradients = results[1][f"fp32 {optimizer}"]
    for name, gradient in alone_gradients.items():
        assert np.linalg.norm(gradients[name] - gradient) <= 1e-5 * np.linalg.norm(gradient), name
    # A subspace is found in the gradient's last bits too: where rows are only summed in another order, GaLore's losses
    # part by 7e-6 in one process, and AdamW's by 2e-7. Ranks add no more than another order does.
    others = results[1][f"summed otherwise {optimizer}"]
    drift = max(np.abs(np.divide(other, alone_losses) - 1).max() for other in others)
    np.testing.assert_allclose(losses, alone_losses, rtol=3 * drift)


@pytest.mark.parametrize("ranks", [2, 3])
def test_fp32_adamw_weights_drift_no_further_than_plain_torch(results: dict[int, dict[str, Any]], ranks: int) -> None:
    """Where a gradient is all rounding error, AdamW turns its sign into a full step: weights drift under any DDP."""
    ours = distance(results[ranks]["fp32 adamw"][1], results[1]["fp32 adamw"][1])
    theirs = distance(results[ranks]["plain"], results[1]["plain"])
    # Both are maxima over rounding: the factor, and one unit in the last place of a weight, are for chance.
    assert ours <= max(2 * theirs, 2**-23)


def test_single_process_trainer_is_plain_torch(results: dict[int, dict[str, Any]]) -> None:
    """Our step adds nothing to the mathematics: against torch's unfused AdamW within fp32 rounding."""
    assert distance(results[1]["fp32 adamw"][1], results[1]["plain"]) < 1e-4


def test_a_world_of_one_needs_no_process_group() -> None:
    with connected(ParallelConfig(), "cpu", 1) as world:
        assert world.process_count == 1 and world.control is None and world.leads
        assert not torch.distributed.is_initialized()
