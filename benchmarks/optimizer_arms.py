"""The optimizers that `optimizer_step` sets against each other, on the same weights and gradients.

Every arm steps the same parameters with the same gradients in turn; only states are its own. Low-rank arms share the
group keys of the authors' packages, with a gap that no measurement reaches: refreshes are asked for.
"""

import functools
import importlib
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from optim import registry
from optim.config import OptimConfig, Products, Refresh
from optim.fused import eager
from optim.projection import add_back_, low_shape, project, side_of
from optim.subspace import SEARCH_EVERY
from optim.warm import orthonormal_rows

NEVER = 10**9
MINI_SCALE = 128.0


@dataclass(frozen=True)
class Size:
    """Matrices of LLaMA blocks of one size."""

    hidden: int
    inner: int
    blocks: int
    rank: int
    """Of GaLore and Fira."""
    svd: bool
    """Whether an SVD of every matrix, as the authors' refresh makes, fits into a few minutes on a CPU."""

    @property
    def apollo_rank(self) -> int:
        """At most 256, as in the authors' scripts of every size."""
        return min(self.rank, 256)

    @property
    def shapes(self) -> list[tuple[int, int]]:
        block = [(self.hidden, self.hidden)] * 4 + [(self.inner, self.hidden)] * 2 + [(self.hidden, self.inner)]
        return block * self.blocks


SIZES = {
    "60M": Size(512, 1376, blocks=2, rank=128, svd=True),
    "350M": Size(1024, 2736, blocks=1, rank=256, svd=True),
    "1B": Size(2048, 5461, blocks=1, rank=512, svd=False),
    "7B": Size(4096, 11008, blocks=1, rank=1024, svd=False),
}


@functools.cache
def some_basis(rank: int, length: int, device: torch.device) -> Tensor:
    """A random orthonormal basis (rank, length), the same at each call."""
    return orthonormal_rows(torch.randn(rank, length, device=device))


class Arm:
    """One optimizer on some parameters."""

    def __init__(
        self, optimizer: torch.optim.Optimizer, refresh: Callable[[], None] | None = None,
        search: Callable[[], None] | None = None, within: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:  # fmt: skip
        self.optimizer = optimizer
        self.refresh = refresh
        """Makes the next step find new bases; None where there are none."""
        self.search = search
        """Makes the next step search anew, as every tenth refresh of ours does."""
        self.within = within

    def step(self) -> None:
        with self.within():
            self.optimizer.step()

    def begin_anywhere(self) -> None:
        """Start from random bases, which step and refresh in the same time as others: the decompositions of a first
        step take minutes for large matrices. For optimizers of ours."""
        for group in self.optimizer.param_groups:
            for p in group["params"]:
                state = self.optimizer.state[p]
                if group.get("refresh") == "warm" and "basis" in state:
                    state["basis"].copy_(some_basis(*state["basis"].shape, p.device))
                    state |= {"refreshes": 1, "next_refresh": NEVER}


class Bare:
    """The floor under any GaLore step: R = G Q^T and W += R Q, nothing else."""

    refresh = search = None

    def __init__(self, params: list[Tensor], rank: int, products: str = "fp32") -> None:
        self.products = products
        self.work = []
        for p in params:
            side = side_of(p.shape, "std")
            length = p.shape[0] if side == "left" else p.shape[1]
            self.work.append(
                (
                    p,
                    some_basis(rank, length, p.device),
                    side,
                    torch.randn(low_shape(p.shape, rank, side), device=p.device),
                )
            )

    @torch.no_grad()
    def step(self) -> None:
        for p, basis, side, _ in self.work:
            assert p.grad is not None
            low = project(p.grad, basis, side, self.products)
            add_back_(p, low, basis, side, beta=1.0, alpha=-1e-6, products=self.products)


def low_rank_group(params: list[Tensor], rank: int, **more: Any) -> list[dict[str, Any]]:
    return [{"params": params, "rank": rank, "update_proj_gap": NEVER, "scale": 0.25, "proj_type": "std", **more}]


def ours(
    name: str, within: Callable[[], AbstractContextManager[object]] = nullcontext, **options: Any
) -> Callable[[list[Tensor], int], Arm]:
    """One of our optimizers by its registered name."""

    def build(params: list[Tensor], rank: int) -> Arm:
        kind: type[OptimConfig] = registry.config_class(name)
        low = {"rank": rank, "update_proj_gap": NEVER, "targets": "w"} if hasattr(kind, "update_proj_gap") else {}
        if name in ("apollo_mini", "cosmos"):
            low = {"targets": "w"} | ({"update_proj_gap": NEVER} if name == "apollo_mini" else {})
        cfg = kind(lr=1e-4, **low, **options)
        optimizer = registry.build(cfg, [(f"w{i}", p) for i, p in enumerate(params)])  # type: ignore[misc]
        optimizer.check_finite = False  # as in our trainer, which has looked at the norm; the others look at nothing

        def refresh() -> None:
            for state in optimizer.state.values():
                state |= {"next_refresh": 0, "refreshes": 1}

        def search() -> None:
            for state in optimizer.state.values():
                state |= {"next_refresh": 0, "refreshes": SEARCH_EVERY - 1}

        if not low or name == "cosmos":
            return Arm(optimizer, within=within)
        return Arm(optimizer, refresh, search if getattr(cfg, "refresh", None) is Refresh.warm else None, within)

    return build


def torchs(params: list[Tensor], rank: int) -> Arm:
    return Arm(torch.optim.AdamW(params, lr=1e-4, fused=True))


def theirs(module: str, kind: str, **low_rank: Any) -> Callable[[list[Tensor], int], Arm]:
    """An optimizer of another package; low-rank ones are told to refresh by taking their basis away."""

    def build(params: list[Tensor], rank: int) -> Arm:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            made = getattr(importlib.import_module(module), kind)
            if not low_rank:
                return Arm(made(params, lr=1e-4))
            own = {key: value for key, value in low_rank.items() if value is not None}
            groups = low_rank_group(params, own.pop("rank", rank), **own)
            if "alpha" in own:
                del groups[0]["scale"]
            optimizer = made(groups, lr=1e-4)

        def refresh() -> None:
            for state in optimizer.state.values():
                state["projector"].ortho_matrix = None

        return Arm(optimizer, refresh)

    return build


@contextmanager
def tf32() -> Iterator[None]:
    """Let products of fp32 run on tensor cores in TF32, as a user may set it for the whole process."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


BF16 = {"products": Products.bf16}
APOLLO_KEYS = {"proj": "random", "scale": 1.0, "scale_type": "channel"}
MINI_KEYS = {"rank": 1, "proj": "random", "scale": MINI_SCALE, "scale_type": "tensor"}
ARMS: dict[str, Callable[[list[Tensor], int], Any]] = {
    "torch adamw fused": torchs,
    "adamw": ours("adamw"),
    "galore products": Bare,
    "galore products bf16": functools.partial(Bare, products="bf16"),
    "galore": ours("galore"),
    "galore tf32": ours("galore", tf32),
    "galore bf16": ours("galore", **BF16),
    "galore bf16 eager": ours("galore", eager, **BF16),
    "galore-torch": theirs("galore_torch", "GaLoreAdamW", scale=0.25),
    "galore_8bit": ours("galore_8bit"),
    "galore_8bit bf16": ours("galore_8bit", **BF16),
    "apollo": ours("apollo"),
    "apollo tf32": ours("apollo", tf32),
    "apollo bf16": ours("apollo", **BF16),
    "apollo bf16 eager": ours("apollo", eager, **BF16),
    "apollo-torch": theirs("apollo_torch", "APOLLOAdamW", **APOLLO_KEYS),
    "apollo_mini": ours("apollo_mini"),
    "apollo-torch mini": theirs("apollo_torch", "APOLLOAdamW", **MINI_KEYS),
    "fira": ours("fira"),
    "fira (authors)": theirs("fira", "FiraAdamW", alpha=0.25),
    "cosmos": ours("cosmos"),
    "adamw_8bit": ours("adamw_8bit"),
    "adamw_8bit eager": ours("adamw_8bit", eager),
    "bitsandbytes 8bit": theirs("bitsandbytes.optim", "AdamW8bit"),
    "torchao 8bit": theirs("torchao.optim", "AdamW8bit"),
    "adamw_4bit": ours("adamw_4bit"),
    "torchao 4bit": theirs("torchao.optim", "AdamW4bit"),
    "adamw_fp8": ours("adamw_fp8"),
    "adamw_fp8 eager": ours("adamw_fp8", eager),
    "torchao fp8": theirs("torchao.optim", "AdamWFp8"),
}
"""By name: builds the arm for parameters with gradients, given the rank of low-rank methods."""
ON_CUDA = tuple(name for name in ARMS if name.split()[-1] in ("tf32", "bf16", "eager"))
"""Arms that are another way of the same only there."""


def gradients(shapes: list[tuple[int, int]], device: torch.device, *, drift: float, seed: int) -> list[Tensor]:
    """Gradients with singular values i^-0.5, and `drift` times as much of another of that kind on top.

    Two calls with the same `seed` and another `drift` are what a run sees between two refreshes.
    """
    return [
        spectrum(shape, device, seed + i) + drift * spectrum(shape, device, seed + i + 10_000)
        for i, shape in enumerate(shapes)
    ]


def spectrum(shape: tuple[int, int], device: torch.device, seed: int) -> Tensor:
    """A matrix whose singular values fall about as i^-0.5. Rows of random vectors, scaled: no SVD is needed."""
    generator = torch.Generator(device).manual_seed(seed)
    k = min(shape)
    left = torch.randn(shape[0], k, generator=generator, device=device)
    right = torch.randn(k, shape[1], generator=generator, device=device)
    sizes = torch.arange(1, k + 1, device=device, dtype=torch.float32).rsqrt()
    return (left * sizes) @ right / (shape[0] * shape[1]) ** 0.5
