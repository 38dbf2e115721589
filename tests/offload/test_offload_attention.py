"""Recomputed blocks that hold attention's results run everything again but attention, to the same bits."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from offload.activations import Activations
from offload.attention import FirstRun, Results, SecondRun
from offload.config import ActivationsConfig, Fate
from offload.streams import Copies
from parallel.sequence.blockwise import BlockwiseAttention, Method
from parallel.sequence.interface import NAME, Share, register
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.links import Alone
from parallel.sequence.ring import RING
from parallel.sequence.strategy import Exact
from tests.offload.models import LAYERS, llama, managed, rows, same, step
from trainer.adapt import blocks

KEPT: dict[str, dict[str, Any]] = {
    "recompute": {"fate": Fate.recompute, "attention": Fate.keep},
    "from the host": {"fate": Fate.recompute, "attention": Fate.keep, "inputs": Fate.host},
    "from the disk": {"fate": Fate.recompute, "attention": Fate.keep, "inputs": Fate.disk, "keep_last": 0},
    "selective": {"fate": Fate.selective},
    "by a rule": {"fate": Fate.recompute, "rules": ["scaled_dot_product_attention() -> keep"]},
    "in a module": {"rules": ["self_attn -> recompute"], "attention": Fate.keep},
}
PACKED = ((0, 5, 6, 17), (0, 9))
CPU = torch.device("cpu")


class Shared:
    """A LLaMA whose attention goes as over rows that ranks share, of whom this process is the only one."""

    def __init__(self, **options: Any) -> None:
        self.computed = 0

        def counting(*args: Any) -> tuple[Tensor, Tensor]:
            self.computed += 1
            return RING.forward(*args)

        register()
        self.model = llama(attention_dropout=0.0)
        self.model.set_attn_implementation(NAME)
        method = Method(counting, RING.backward, RING.cost)
        self.share = Share(Exact(Cut(), 0, Alone(), Alone(), method), Layout(Cut(), 24, PACKED))
        if options:
            cfg = ActivationsConfig(**{"fate": Fate.keep, "min_bytes": 0} | options)
            copies = Copies(CPU, delay=0.001)
            self.policy = Activations(cfg, blocks(self.model), CPU, shared_rows=True, copies=copies)

    def step(self, retain: bool = False) -> list[Tensor]:
        """Loss and gradients; of `retain` those of a second backward."""
        loss = self.model(input_ids=rows(), labels=rows(), use_cache=False, sequence=self.share).loss
        if retain:
            loss.backward(retain_graph=True)
        self.model.zero_grad()
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in self.model.parameters())]


@pytest.mark.parametrize("name", KEPT)
def test_attention_over_shared_rows_is_computed_once_and_bits_are_the_same(name: str) -> None:
    expected = Shared().step()
    shared = Shared(**KEPT[name])
    for _ in range(2):
        shared.computed = 0
        assert same(shared.step(), expected)
        assert shared.computed == LAYERS
    assert shared.policy.rules_without_effect() == []


def test_attention_that_is_not_kept_is_computed_twice() -> None:
    shared = Shared(fate=Fate.recompute)
    assert same(shared.step(), Shared().step())
    assert shared.computed == 2 * LAYERS


def test_backward_twice_takes_the_same_results() -> None:
    assert same(Shared(**KEPT["recompute"]).step(retain=True), Shared().step())


def test_results_go_where_inputs_go() -> None:
    """The last block's stay; of the others go inputs, attention's outputs and a sum a row of scores."""
    shared = Shared(**KEPT["from the host"])
    shared.step()
    hidden, sums = rows().numel() * 32 * 4, rows().numel() * 4 * 4
    assert shared.policy.ledger.out["host"] == (LAYERS - 1) * (2 * hidden + sums)


def test_operators_inside_attention_are_not_counted_among_those_selected(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention that goes by plain products has them the first time and not the second; another product of the block
    is still given its own result."""
    monkeypatch.setattr("parallel.sequence.kernels.kernel_for", lambda q, v: "products")
    weight = torch.randn(2, 32, 32)
    found = []
    for options in ({}, {"fate": Fate.selective}, KEPT["recompute"] | {"rules": ["bmm() -> keep"]}):
        shared = Shared(**options)
        for layer in shared.model.model.layers:
            layer.mlp.register_forward_hook(lambda _, __, out: torch.bmm(out, weight).sin())
        found.append(shared.step())
        assert shared.computed == LAYERS
    assert same(found[0], found[1]) and same(found[0], found[2])


class Kernels(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.__name__.startswith("_scaled_dot_product") and "backward" not in func.__name__
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("attention, times", [(Fate.keep, 1), (Fate.recompute, 2)])
def test_attention_over_whole_rows_is_computed_once_where_it_is_kept(attention: Fate, times: int) -> None:
    expected, model = step(llama(attention_dropout=0.0)), llama(attention_dropout=0.0)
    managed(model, fate=Fate.recompute, attention=attention)
    with Kernels() as kernels:
        assert same(step(model), expected)
    assert kernels.count == times * LAYERS


class Overwriting(nn.Module):
    def forward(self, q: Tensor, layout: Layout) -> Tensor:
        out: Tensor = BlockwiseAttention.apply(q, q, q, RING, layout, Alone(), True, 0.3)
        return out.mul_(2)


def test_a_result_that_is_written_over_ends_the_step() -> None:
    results = Results(lambda tensor: tensor, lambda tensor: tensor)
    runs = FirstRun(results, torch.no_grad()), SecondRun(results, torch.no_grad())
    q = torch.randn(1, 2, 24, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"writes into attention's output.*use activations\.attention=recompute"):
        checkpoint(Overwriting(), q, Layout(Cut(), 24, ((0, 5),)), use_reentrant=False, context_fn=lambda: runs)
