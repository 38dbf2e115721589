"""FSDP2 with the update in backward: hooks on shards step as one process does at once."""

from typing import Any

import pytest
import torch

from parallel.launch import World, connected
from tests.parallel.sharded import BASE, Outcome, make, on_each_rank, step_batch, train, train_each, whole
from trainer.cli.compose import load
from trainer.step import train_step

GALORE = ["optim=galore", "optim.rank=4", "optim.update_proj_gap=3"]
AT_ONCE = {
    "adamw": ["optim=adamw", "train.clip_norm=0", "train.micro_batch=6"],
    "adamw, tied": ["optim=adamw", "train.clip_norm=0", "model.tie_embeddings=true"],
    "galore": [*GALORE, "train.clip_norm=0", "train.micro_batch=6"],
    "galore, micro-steps": [*GALORE, "train.clip_norm=0"],
    "galore_8bit, micro-steps": [*GALORE, "optim=galore_8bit", "train.clip_norm=0"],
    "apollo": ["optim=apollo", "optim.rank=4", "train.clip_norm=0", "activations=recompute"],
    "by parameter": [*GALORE, "train.clip_by=parameter", "train.clip_norm=0.02"],
    "in two passes": [*GALORE, "train.micro_batch=6", "train.clip_norm=0.02"],
}
"""What one process does at once."""
IN_BACKWARD = {"in two passes": ["train.clip_by=two_pass"]}
"""What its counterpart says besides."""
LAYOUTS = ["parallel.zero=2", "parallel.zero=3"]


def largest(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(((found[k] - wanted[k]).abs().max() / wanted[k].abs().max()).item() for k in wanted)


def with_nan(world: World, overrides: list[str]) -> tuple[tuple[str, ...], bool, list[str]]:
    """A NaN in one shard of a gradient: what was left out, whether that counts as applied, what stayed as it was."""
    built = make([*overrides, "optim.in_backward=true"], world)
    name = "model.layers.1.mlp.up_proj.weight"
    p = built.model.get_parameter(name)

    def poison(p: torch.Tensor) -> None:
        if world.process_rank == 1:
            p.grad._local_tensor[0] = torch.nan  # type: ignore[union-attr]

    poisoned = p.register_post_accumulate_grad_hook(poison)
    hooks = p._post_accumulate_grad_hooks  # type: ignore[attr-defined]
    hooks.move_to_end(poisoned.id, last=False)  # ahead of the update
    before = {n: whole(q) for n, q in built.model.named_parameters()}
    stepped = train_step(built, step_batch(built.cfg, world, 0), 0, stop=0)
    same = [n for n, q in built.model.named_parameters() if torch.equal(whole(q), before[n])]
    return stepped.left_out, stepped.applied, same


def after_a_skipped_step(world: World, overrides: list[str]) -> tuple[bool, bool]:
    """A loss of NaN on one rank, then a sound one: whether each was applied."""
    built = make([*overrides, "optim.in_backward=true"], world)
    batch = step_batch(built.cfg, world, 0)
    norm = built.model.get_submodule("model.norm")
    hook = norm.register_forward_hook(lambda _module, _inputs, out: out * torch.nan)
    if world.process_rank == 0:
        hook.remove()
    before = {n: whole(q) for n, q in built.model.named_parameters()}
    first = train_step(built, batch, 0, stop=0)
    hook.remove()
    assert all(torch.equal(whole(q), before[n]) for n, q in built.model.named_parameters())
    return first.applied, train_step(built, batch, 0, stop=0).applied


def everything(cases: list[list[str]]) -> dict[str, Any]:
    torch.set_num_threads(1)
    with connected(load(BASE).parallel, "cpu", 1) as world:
        asked = ["train.clip_norm=0", "parallel.zero=3", "train.micro_batch=6"]
        trained = [train(case, world, steps=5) for case in cases]
        return {"trained": trained, "nan": with_nan(world, asked), "skipped": after_a_skipped_step(world, asked)}


CASES = {
    f"{name}, {layout}": [*AT_ONCE[name], layout, "optim.in_backward=true", *IN_BACKWARD.get(name, [])]
    for name in AT_ONCE
    for layout in LAYOUTS
} | {
    f"{name}, local accumulation": [
        *AT_ONCE[name], "parallel.zero=3", "parallel.accumulate=local", "optim.in_backward=true",
    ]
    for name in ("adamw, tied", "galore, micro-steps")
}  # fmt: skip


@pytest.fixture(scope="module")
def alone() -> dict[str, Outcome]:
    return dict(zip(AT_ONCE, train_each(list(AT_ONCE.values())), strict=True))


@pytest.fixture(scope="module")
def ranks() -> list[dict[str, Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        return on_each_rank(2, everything, list(CASES.values()))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_shards_step_in_backward_as_one_process_does_at_once(
    case: str, alone: dict[str, Outcome], ranks: list[dict[str, Any]]
) -> None:
    wanted = alone[case.rpartition(", ")[0]]
    for rank in ranks:
        found = rank["trained"][list(CASES).index(case)]
        assert largest(found.weights, wanted.weights) < 1e-9
        known = [(one, other) for one, other in zip(found.norms, wanted.norms, strict=True) if one is not None]
        assert [one for one, _ in known] == pytest.approx([other for _, other in known], rel=1e-9)
        only_projections = case.startswith("galore") and "micro-steps, parallel.zero" in case
        assert len(known) == (2 if only_projections else 5)


@pytest.mark.slow
def test_replicas_of_shards_step_in_backward_as_one_process_does_at_once(alone: dict[str, Outcome]) -> None:
    """Two lines of two shards; what the optimizer sums in a hook, it sums within its own line."""
    cases, names = [], []
    for name, own in AT_ONCE.items():
        micro_steps = "train.micro_batch=6" not in own
        for layout in LAYOUTS:
            for accumulate in ("auto", "local") if micro_steps else ("auto",):
                names.append(name)
                cases.append([
                    *own, layout, "parallel.replicas=2", f"parallel.accumulate={accumulate}", "optim.in_backward=true",
                    *IN_BACKWARD.get(name, []), f"train.micro_batch={1 if micro_steps else 3}",
                ])  # fmt: skip
    for rank in on_each_rank(4, train_each, cases):
        for name, case, found in zip(names, cases, rank, strict=True):
            assert largest(found.weights, alone[name].weights) < 1e-9, case
            assert found.norms == pytest.approx(alone[name].norms, rel=1e-9), case


@pytest.mark.slow
def test_nan_in_one_shard_leaves_the_parameter_out_on_all_ranks(ranks: list[dict[str, Any]]) -> None:
    for left_out, applied, same in (rank["nan"] for rank in ranks):
        assert left_out == ("model.layers.1.mlp.up_proj.weight",) == tuple(same) and not applied


@pytest.mark.slow
def test_a_loss_of_nan_on_one_rank_skips_the_step_on_all_and_the_next_goes_on(ranks: list[dict[str, Any]]) -> None:
    assert [rank["skipped"] for rank in ranks] == [(False, True)] * 2
