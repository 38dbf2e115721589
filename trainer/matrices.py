"""parallel.zero=1: which parameters one rank steps whole, and which all ranks step by rows.

Gradients and weights take as much either way: a rank sends each of them once. But a method that takes a matrix as a
whole (a projection, Newton-Schulz, means over columns) sends more where rows are on several ranks, in every step. How
much is measured: the optimizer steps rows of a fake tensor of that shape, and its collectives are counted.

Bytes that a rank sends beside those of gradient and weight, as part of them, for (n, n), a gate and a down projection
of a LLaMA block with n = 1024 and a rank of n / 4, in fp32 (tests/parallel/test_owners.py):

    galore, fira            12.5 %   4.7 %   25 %
    apollo                  12.5 %   4.7 %   13 %
    qgalore (int4 basis)     1.6 %   0.6 %   26 %
    cosmos                  540 %   200 %   250 %
    adafactor                0.1 %  0.04 %   0.1 %
    adamw, sgd, any codec        0       0       0

Owners send none of it, and find a new basis once instead of on every rank. But their shares are as even as whole
matrices can be laid out, where rows are even to a row.
"""

import warnings
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode

from optim import registry
from optim.base import Group, MemoryOptimizer
from optim.rules import Elementwise
from parallel.collectives import from_leader
from parallel.config import Matrices
from parallel.launch import World
from parallel.mesh import Grid
from parallel.owners import Owners, balanced
from parallel.spread import stored
from parallel.traffic import Traffic
from trainer.memory import format_bytes
from trainer.precision import rounding, settled
from trainer.schema import Config

WORTH = 0.01
"""Part of the bytes of gradient and weight below which what rows send beside them is not worth uneven shares."""
EVEN = 1.1
"""Most bytes of states that one rank may own, in those of even shares."""

Shapes = dict[str, tuple[int, ...]]


def owners_of(cfg: Config, world: World, model: nn.Module, grid: Grid) -> Owners:
    """Choose as `parallel.matrices` says. Every rank calls it, and all get the same.

    Raises:
        ValueError: there are more ranks than parameters that can only be stepped whole.
    """
    trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
    sizes = state_bytes(cfg, trainable)
    matrices = [name for name, p in trainable.items() if p.dim() == 2]
    if getattr(cfg.optim, "package", None) is not None:
        if len(sizes) < grid.count:
            raise ValueError(
                f"optim={cfg.optim.name} with parallel.zero=1: {grid.count} ranks cannot share out {len(sizes)} "
                "tensors that are stepped whole; use parallel.zero=0, or fewer ranks"
            )
        return owned(sizes, list(sizes), grid, "their blocks of codes lie over whole tensors")
    if cfg.parallel.matrices is Matrices.rows:
        return Owners()
    if cfg.parallel.matrices is Matrices.owners:
        return owned(sizes, matrices, grid, "as parallel.matrices=owners asks for")
    beside = from_leader(world, sent_beside(cfg, world, trainable, grid))
    usual = {name: sent_anyway(p, grid) for name, p in trainable.items()}
    dearer = [name for name in matrices if beside[name] >= WORTH * usual[name]]
    if not dearer:
        return Owners(why="parallel.zero=1: all tensors are stepped by rows, which takes nothing else to be sent")
    more = f"{format_bytes(sum(beside[name] for name in dearer))} more a step"
    found = owned(sizes, dearer, grid, f"by rows they would send {more}, beside {format_bytes(sum(usual.values()))}")
    uneven = unevenness(sizes, found, grid.count)
    if uneven <= EVEN:
        return found
    return Owners(
        why=f"parallel.zero=1: all tensors are stepped by rows, which sends {more}: of {len(dearer)} matrices stepped "
        f"whole, one rank would own {uneven:.1f} times its share"
    )


def owned(sizes: dict[str, int], names: Sequence[str], grid: Grid, because: str) -> Owners:
    """Give each of `names` an owner, so that their states' bytes are near each other."""
    places = balanced([sizes[name] for name in names], grid.count)
    what = f"{len(names)} of {len(sizes)} tensors are stepped whole, each by one rank ({because})"
    return Owners(dict(zip(names, places, strict=True)), f"parallel.zero=1: {what}")


def state_bytes(cfg: Config, trainable: dict[str, nn.Parameter]) -> dict[str, int]:
    """Bytes of each parameter's states."""
    shapes = [(name, tuple(p.shape)) for name, p in trainable.items()]
    dtype = max((p.dtype for p in trainable.values()), key=lambda dtype: dtype.itemsize)
    return dict(zip(trainable, registry.state_bytes_each(cfg.optim, shapes, dtype), strict=True))


def unevenness(sizes: dict[str, int], chosen: Owners, count: int) -> float:
    """Bytes of the states of the rank that owns most, in those of even shares."""
    load = [0] * count
    for name, owner in chosen.of.items():
        load[owner] += sizes[name]
    return max(load) * count / max(sum(load), 1)


def sent_anyway(p: Tensor, grid: Grid) -> int:
    """Bytes of a gradient and of a weight that a rank sends in a step."""
    held = p.numel() * p.dtype.itemsize + sum(plain.nbytes for plain in stored(p.detach()))
    return held * (grid.count - 1) // grid.count


def sent_beside(cfg: Config, world: World, trainable: dict[str, nn.Parameter], grid: Grid) -> dict[str, int]:
    """Bytes that a rank sends in a step without a refresh for each parameter whose rows `grid` shares out, beside
    gradient and weight."""
    optim = settled(cfg, world.device)
    label = {name: group["label"] for group in registry.groups(optim, trainable.items()) for name, _ in group["params"]}
    kind: dict[str, Any] = {name: (label[name], p.shape, p.dtype) for name, p in trainable.items()}
    first = {kind[name]: name for name in reversed(trainable)}
    with nullcontext() if detect_fake_mode() is not None else FakeTensorMode():
        rows = {name: nn.Parameter(fake_rows(trainable[name], grid, world)) for name in first.values()}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the real optimizer is still to be built
            optimizer = registry.build(optim, trainable.items(), rounding=rounding(cfg.precision), stepped=rows)
        optimizer.check_finite = False
        sent = {
            name: second_step(optimizer, group, p, world)
            for group in optimizer.param_groups
            for name, p in zip(group["param_names"], group["params"], strict=True)
        }
    return {name: sent[first[kind[name]]] for name in trainable}


def fake_rows(p: Tensor, grid: Grid, world: World) -> Tensor:
    """This rank's rows of a fake tensor; a scalar itself. int8 weights stand for what they decode to."""
    if not p.dim():
        return torch.zeros((), dtype=p.dtype, device=world.device)
    mine = grid.rows(p.shape[0])
    part = torch.zeros((mine.stop - mine.start, *p.shape[1:]), dtype=p.dtype, device=world.device)
    return grid.wrap(part, p.shape)


def second_step(optimizer: MemoryOptimizer, group: Group, p: Tensor, world: World) -> int:
    """Bytes that a rank sends in the second step of `p`; the first finds a basis."""
    if group.get("rank") is None and isinstance(getattr(optimizer, "rule", None), Elementwise):
        return 0  # each value by itself, which takes long to show for a large tensor in chunks
    for _ in range(2):
        p.grad = torch.zeros_like(p)
        with Traffic(world.control) as traffic:
            optimizer.step_one(p, group)
    return sum(traffic.sent.values())
