"""One net stepped whole and in shards, by the same gradients: what the tests of sharded optimizers share."""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.utils._python_dispatch import TorchDispatchMode

from optim import registry
from optim.config_lowrank import ProjectedConfig, TargetedConfig
from parallel.dtensor import Layout, local

SMALL = {"tall": (21, 8), "wide": (9, 14), "square": (10, 10), "few": (2, 12), "narrow": (11, 2)}
LARGE = {"tall": (131, 72), "wide": (71, 150), "few": (3, 1500)}
"""Large enough for blocks of codes, of projected gradients too; with ragged rows."""
OTHERS = {"embed": (13, 6), "norm": (7,), "conv": (5, 6, 4)}


def config(name, **options):
    cls = registry.config_class(name)
    if issubclass(cls, TargetedConfig):
        options = {"rank": 1 if name == "apollo_mini" else 3, "targets": "mlp", **options}
    if issubclass(cls, ProjectedConfig):
        options = {"update_proj_gap": 7, **options}
    return cls(name=name, lr=1e-2, weight_decay=0.1, **options)


def net(shapes, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    whole = nn.Module()
    for name, shape in ({f"mlp_{key}": shape for key, shape in shapes.items()} | OTHERS).items():
        values = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        whole.register_parameter(name, nn.Parameter(values))
    return whole


def shard(module, mesh, dim):
    """Rows by `fully_shard`, columns (of which that wants equal numbers) by hand."""
    if dim == 0:
        return fully_shard(module, mesh=mesh)
    for name, p in list(module.named_parameters()):
        placed = distribute_tensor(p.detach(), mesh, [Shard(min(dim, p.dim() - 1))])
        module.register_parameter(name, nn.Parameter(placed))
    return module


def set_gradients(module, step, rank=None):
    """Gradients are a function of name and step alone, with a few leading directions that drift.

    Matrices of a given rank, if one is given."""
    for name, p in module.named_parameters():
        generator = torch.Generator().manual_seed(1000 * step + len(name) * 31 + sum(map(ord, name)))
        grad = torch.randn(p.shape, generator=generator, dtype=torch.float64)
        if p.dim() == 2:
            grad *= torch.linspace(1, 3, p.shape[1]) * torch.linspace(2, 0.5, p.shape[0])[:, None]
        if rank is not None and p.dim() == 2:
            grad = grad[:, :rank] @ torch.randn(rank, p.shape[1], generator=generator, dtype=torch.float64)
        layout = Layout.of(p)
        part = layout.cut(grad.to(p.dtype)).clone()
        p.grad = layout.wrap(part) if layout.dim is not None or not isinstance(p, DTensor) else placed(part, p)


def placed(part, like):
    return DTensor.from_local(part, like.device_mesh, like.placements, run_check=False)


def run(module, cfg, steps, rounding="nearest", gradient_rank=None):
    optimizer = registry.build(cfg, module.named_parameters(), rounding=rounding)
    for step in range(steps):
        set_gradients(module, step, gradient_rank)
        optimizer.step()
    return optimizer


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def everything(module, optimizer):
    """Weights and states by name, whole."""
    found = {}
    for name, p in module.named_parameters():
        found[name] = whole(p.detach())
        for key, value in optimizer.state[p].items():
            found[f"{name}/{key}"] = whole(value) if isinstance(value, torch.Tensor) else torch.tensor(float(value))
    return found


def local_bytes(optimizer):
    """Bytes of this rank's states, and how many of them every rank has."""
    own = everywhere = 0
    for p, state in optimizer.state.items():
        for value in state.values():
            if isinstance(value, torch.Tensor):
                own += local(value).nbytes
                if not isinstance(value, DTensor) and isinstance(p, DTensor):
                    everywhere += value.nbytes
    return own, everywhere


def differences(expected, found, tolerance):
    """Names whose tensors differ by more than `tolerance` of the largest value (codes: at all)."""
    wrong = []
    assert expected.keys() == found.keys(), expected.keys() ^ found.keys()
    for name, want in expected.items():
        have = found[name]
        if have.shape != want.shape or have.dtype != want.dtype:
            wrong.append(f"{name}: {tuple(have.shape)} {have.dtype}, not {tuple(want.shape)} {want.dtype}")
        elif want.dtype is torch.uint8:
            if not torch.equal(want, have):
                wrong.append(f"{name}: {int((want != have).sum())} of {want.numel()} codes differ")
        else:
            error = float((want.double() - have.double()).abs().max() / want.double().abs().max().clamp(min=1e-30))
            if not error <= tolerance:
                wrong.append(f"{name}: off by {error:.1e}")
    return wrong


def ranks_agree(value):
    """Whether all ranks hold the same bits."""
    box = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return all(torch.equal(box[0], other) for other in box)


class Counted(TorchDispatchMode):
    """Values a rank sends in collectives, without the ring's (D - 1) / D; `numbers` of few are counted apart."""

    def __init__(self):
        super().__init__()
        self.values = self.numbers = self.largest = 0
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.name().removeprefix("c10d::")
            sizes = [
                t.numel()
                for a in args
                for t in (a if isinstance(a, list | tuple) else [a])
                if isinstance(t, torch.Tensor)
            ]
            size = max(sizes)
            self.calls.append((name, sizes))
            if size <= 4:
                self.numbers += 1
            else:
                self.values += size * (2 if name.startswith("allreduce") else 1)
                self.largest = max(self.largest, size)
        return func(*args, **(kwargs or {}))
