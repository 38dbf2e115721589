"""A small model, and the ordinary update that the one in backward is held against."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from optim import MemoryOptimizer, registry
from optim.config import OptimConfig
from optim.config_lowrank import ProjectedConfig, TargetedConfig

ROWS, WIDTH, VOCABULARY = 8, 96, 50


class Net(nn.Module):
    """An embedding whose weight is the head too, and matrices of every shape, wide enough for every codec."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.mlp = nn.ModuleDict(
            {"square": nn.Linear(WIDTH, WIDTH), "up": nn.Linear(WIDTH, 128, bias=False), "down": nn.Linear(128, WIDTH)}
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.to(dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        x = x + self.mlp["down"](torch.tanh(self.mlp["up"](torch.tanh(self.mlp["square"](x)))))
        return self.norm(x) @ self.embed.weight.T


def config(name: str, **options: Any) -> OptimConfig:
    cls = registry.config_class(name)
    if issubclass(cls, TargetedConfig):
        options = {"rank": 1 if name == "apollo_mini" else 24, "targets": "mlp.*weight", **options}
    if issubclass(cls, ProjectedConfig):
        options = {"update_proj_gap": 3, **options}
    return cls(name=name, **{"lr": 1e-3, "weight_decay": 0.1, **options})


def build(net: nn.Module, name: str, **options: Any) -> MemoryOptimizer:
    return registry.build(config(name, **options), net.named_parameters())


def rows(step: int) -> Tensor:
    """Tokens of one step, (ROWS, 12); the last is the target of the one before."""
    return torch.randint(0, VOCABULARY, (ROWS, 12), generator=torch.Generator().manual_seed(100 + step))


def loss_of(net: nn.Module, tokens: Tensor) -> Tensor:
    """Share of the rows `tokens` in the mean loss of a step."""
    logits = net(tokens[:, :-1]).flatten(0, 1)
    return nn.functional.cross_entropy(logits, tokens[:, 1:].flatten(), reduction="sum") / (ROWS * 11)


def ordinary(
    net: nn.Module, optimizer: MemoryOptimizer, steps: Sequence[int], micros: int, *, clip: float = 0.0,
    by: str = "global",
) -> list[float]:  # fmt: skip
    """All gradients, clipping by torch's own function, one step. Returns the global norms."""
    norms: list[float] = []
    for step in steps:
        for tokens in rows(step).chunk(micros):
            loss_of(net, tokens).backward()
        parameters = list(net.parameters())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if clip and by == "global":
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, norm)
        elif clip and by == "previous" and norms:
            torch.nn.utils.clip_grads_with_norm_(parameters, clip, torch.tensor(norms[-1], dtype=norm.dtype))
        elif clip:
            for p in parameters:
                torch.nn.utils.clip_grad_norm_([p], clip)
        norms.append(float(norm))
        optimizer.step()
        optimizer.zero_grad()
    return norms


def numbers(optimizer: MemoryOptimizer) -> list[dict[str, Any]]:
    """Counters of every state, in the order of the parameters."""
    return [{k: v for k, v in state.items() if isinstance(v, int)} for state in optimizer.state.values()]


def distance(a: nn.Module, b: nn.Module) -> float:
    """Largest difference between two models' weights."""
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return max(float((p - q).detach().abs().max()) for p, q in pairs)
