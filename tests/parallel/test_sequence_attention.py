"""Every strategy's output and gradients are those of attention over whole rows, with ranks as threads."""

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from parallel.sequence.layout import Cut, Layout
from parallel.sequence.strategy import Exact
from tests.parallel.simulated import ThreadLinks, Wire, dense, on_threads

CUTS = {
    "alone": Cut(),
    "ulysses 2": Cut(ulysses=2),
    "ulysses 3": Cut(ulysses=3),
    "ulysses 4": Cut(ulysses=4),
    "ring 2": Cut(ring=2),
    "ring 3": Cut(ring=3),
    "ring 4": Cut(ring=4),
    "usp 2 x 2": Cut(ring=2, ulysses=2),
}
HEADS = {"MHA": (8, 8), "GQA 2": (8, 4), "GQA 8": (8, 1), "uneven": (6, 2), "odd share": (9, 3)}
DOCUMENTS = {
    "one document": ((0,), (0,)),
    "packed": ((0, 5, 6, 17), (0, 9, 10, 11, 20)),
    "alike, borders at the edges of ranks": ((0, 8, 16), (0, 8, 16)),
}
LENGTH = 29
"""Not a multiple of anything."""


@dataclass
class Found:
    out: Tensor
    gradients: list[Tensor]
    sent: list[int]


def members(cut: Cut) -> list[Exact]:
    """A strategy for each rank, connected to the others."""
    inner, outer = [Wire(cut.ulysses) for _ in range(cut.ring)], [Wire(cut.ring) for _ in range(cut.ulysses)]
    return [
        Exact(cut, rank, ThreadLinks(inner[rank // cut.ulysses], rank % cut.ulysses),
              ThreadLinks(outer[rank % cut.ulysses], rank // cut.ulysses))
        for rank in range(cut.degree)
    ]  # fmt: skip


def tensors(heads: tuple[int, int], dtype: torch.dtype, length: int = LENGTH, batch: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(batch, count, length, 8) for count in (heads[0], heads[1], heads[1], heads[0])]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def split(cut: Cut, inputs: list[Tensor], layout: Layout, causal: bool) -> Found:
    """Output and gradients of q, k, v, put together from all ranks."""
    strategies = members(cut)

    def run(rank: int) -> list[Tensor]:
        local = [layout.take(x.transpose(1, 2), rank).transpose(1, 2) for x in inputs]
        q, k, v = (x.clone().requires_grad_() for x in local[:3])
        out = strategies[rank].attend(q, k, v, layout, causal=causal, scale=0.3)
        out.backward(local[3])
        return [out.detach(), q.grad, k.grad, v.grad]

    found = on_threads(cut.degree, run)
    whole = [layout.put([part[i].transpose(1, 2) for part in found]).transpose(1, 2) for i in range(4)]
    return Found(whole[0], whole[1:], [each.inner.sent + each.outer.sent for each in strategies])


def whole(inputs: list[Tensor], layout: Layout, causal: bool) -> Found:
    q, k, v = (x.double().requires_grad_() for x in inputs[:3])
    out = dense(q, k, v, layout.documents, causal=causal, scale=0.3)
    out.backward(inputs[3].double())
    return Found(out.detach(), [q.grad, k.grad, v.grad], [])


def furthest(found: Found, expected: Found) -> float:
    """Largest difference beside the largest value, over output and gradients."""
    pairs = zip([found.out, *found.gradients], [expected.out, *expected.gradients], strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


SMALLEST = [
    ("alone", "GQA 2", "packed", True),
    ("ulysses 3", "uneven", "packed", True),
    ("ulysses 4", "GQA 8", "one document", True),
    ("ring 3", "GQA 2", "packed", True),
    ("ring 2", "MHA", "one document", False),
    ("usp 2 x 2", "odd share", "packed", True),
]
"""The quick suite's; the slow one takes all."""


@pytest.mark.parametrize(("cut", "heads", "documents", "causal"), SMALLEST)
def test_split_attention_is_attention(cut: str, heads: str, documents: str, causal: bool) -> None:
    layout = Layout(CUTS[cut], LENGTH, DOCUMENTS[documents])
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs = tensors(HEADS[heads], dtype)
        assert furthest(split(CUTS[cut], inputs, layout, causal), whole(inputs, layout, causal)) < limit


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cut", CUTS)
def test_split_attention_is_attention_in_every_case(cut: str, heads: str, documents: str, causal: bool) -> None:
    test_split_attention_is_attention(cut, heads, documents, causal)
