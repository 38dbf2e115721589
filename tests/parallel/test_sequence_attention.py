"""Every strategy's output and gradients are those of attention over whole rows, with ranks as threads."""

import pytest
import torch
from torch import Tensor

from parallel.sequence.blockwise import Method, merge_
from parallel.sequence.cost import ExactCost, Shape
from parallel.sequence.gathered import GATHERED
from parallel.sequence.kernels import attend, attend_backward, attend_by_products, backward_by_products, kernel_for
from parallel.sequence.layout import Cut, Layout, document_starts
from parallel.sequence.ring import RING
from tests.parallel.simulated import Found, furthest, members, split, tensors, whole

CUTS = {
    "alone": Cut(),
    "ulysses 2": Cut(ulysses=2),
    "ulysses 3": Cut(ulysses=3),
    "ulysses 4": Cut(ulysses=4),
    "ring 2": Cut(ring=2),
    "ring 3": Cut(ring=3),
    "ring 4": Cut(ring=4),
    "usp 2 x 2": Cut(ring=2, ulysses=2),
    "lightseq 2": Cut(ring=2, zigzag=False),
    "lightseq 3": Cut(ring=3, zigzag=False),
    "lightseq 4": Cut(ring=4, zigzag=False),
    "lightseq 2 x 2": Cut(ring=2, ulysses=2, zigzag=False),
    "gathered 2": Cut(ring=2, zigzag=False),
    "gathered 3": Cut(ring=3, zigzag=False),
    "gathered 4": Cut(ring=4, zigzag=False),
}
HEADS = {"MHA": (8, 8), "GQA 2": (8, 4), "GQA 8": (8, 1), "uneven": (6, 2), "odd share": (9, 3)}
DOCUMENTS = {
    "one document": ((0,), (0,)),
    "packed": ((0, 5, 6, 17), (0, 9, 10, 11, 20)),
    "alike, borders at the edges of ranks": ((0, 8, 16), (0, 8, 16)),
}
LENGTH = 29
"""Not a multiple of anything."""


def method(cut: str) -> Method | None:
    return GATHERED if "gathered" in cut else None


SMALLEST = [
    ("alone", "GQA 2", "packed", True),
    ("ulysses 3", "uneven", "packed", True),
    ("ulysses 4", "GQA 8", "one document", True),
    ("ring 3", "GQA 2", "packed", True),
    ("ring 2", "MHA", "one document", False),
    ("usp 2 x 2", "odd share", "packed", True),
    ("lightseq 4", "GQA 2", "packed", True),
    ("lightseq 3", "GQA 8", "one document", True),
    ("lightseq 2", "MHA", "one document", True),
    ("lightseq 3", "GQA 2", "packed", False),
    ("gathered 3", "GQA 2", "packed", True),
    ("gathered 2", "GQA 8", "packed", False),
]
"""The quick suite's; the slow one takes all."""


@pytest.mark.parametrize(("cut", "heads", "documents", "causal"), SMALLEST)
def test_split_attention_is_attention(cut: str, heads: str, documents: str, causal: bool) -> None:
    layout = Layout(CUTS[cut], LENGTH, DOCUMENTS[documents])
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs = tensors(HEADS[heads], dtype, LENGTH)
        assert furthest(split(CUTS[cut], inputs, layout, causal, method(cut)), whole(inputs, layout, causal)) < limit


@pytest.mark.slow
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "not causal"])
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cut", CUTS)
def test_split_attention_is_attention_in_every_case(cut: str, heads: str, documents: str, causal: bool) -> None:
    test_split_attention_is_attention(cut, heads, documents, causal)


@pytest.mark.parametrize("cut", ["ulysses 3", "ring 3", "usp 2 x 2", "lightseq 3", "lightseq 4", "gathered 3"])
def test_a_changed_document_leaves_the_others_bit_equal(cut: str) -> None:
    layout = Layout(CUTS[cut], LENGTH, DOCUMENTS["packed"])
    inputs = tensors((6, 2), torch.float32, LENGTH)
    changed = [x.clone() for x in inputs]
    for x in changed:
        x[0, :, 6:17] += 1
    before, after = (
        split(CUTS[cut], inputs, layout, True, method(cut)),
        split(CUTS[cut], changed, layout, True, method(cut)),
    )
    for one, other in zip([before.out, *before.gradients], [after.out, *after.gradients], strict=True):
        assert not torch.equal(one[0, :, 6:17], other[0, :, 6:17])
        for same in (one[0, :, :6] - other[0, :, :6], one[0, :, 17:] - other[0, :, 17:], one[1] - other[1]):
            assert not same.any()


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("cut", CUTS)
def test_bytes_sent_are_those_that_are_told(cut: str, heads: str) -> None:
    """LightSeq sends less for packed rows; see its own tests."""
    layout = Layout(CUTS[cut], LENGTH, DOCUMENTS["one document" if "lightseq" in cut else "packed"])
    inputs = tensors(HEADS[heads], torch.float32, LENGTH)
    costs = [each.cost(Shape(2, LENGTH, *HEADS[heads], 8, 4)) for each in members(CUTS[cut], method(cut))]
    assert split(CUTS[cut], inputs, layout, True, method(cut)).sent == [cost.forward + cost.backward for cost in costs]


def test_bytes_sent_are_those_of_the_papers() -> None:
    """For bf16, and a length and heads that divide; see the head of `ring.py` and of `ulysses.py`."""
    length, heads, keys, width, ranks = 64, 8, 4, 16, 4
    shape = Shape(1, length, heads, keys, width, 2)
    ulysses, ring = (ExactCost(cut, 1, shape, RING.cost).of() for cut in (Cut(ulysses=ranks), Cut(ring=ranks)))
    exchanged = (2 * heads + 2 * keys) * width * 2 * length * (ranks - 1) // ranks**2
    assert (ulysses.forward, ulysses.backward) == (exchanged, exchanged)
    passed = 2 * keys * width * 2 * length * (ranks - 1) // ranks
    assert (ring.forward, ring.backward) == (passed, passed + 2 * keys * width * 4 * length)
    fewer = ExactCost(Cut(ulysses=ranks), 1, Shape(1, length, heads, 1, width, 2), RING.cost).of()
    assert fewer.forward == (2 * heads + 2 * ranks) * width * 2 * length * (ranks - 1) // ranks**2


@pytest.mark.parametrize("ranks", [2, 3, 4, 8])
def test_causal_work_is_even_in_zigzag_order(ranks: int) -> None:
    work = [Layout(Cut(ring=ranks), 1000, ((0,),)).pairs(rank) for rank in range(ranks)]
    assert max(work) < 1.05 * min(work)
    assert sum(work) == 1000 * 1001 // 2  # each pair once
    uneven = [Layout(Cut(ring=ranks, zigzag=False), 1000, ((0,),)).pairs(rank) for rank in range(ranks)]
    assert max(uneven) > 2.9 * min(uneven)


def test_kernels_compute_what_is_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []

    def counting(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        queries, keys = q.shape[2], k.shape[2]
        computed.append(q.shape[0] * (queries * (queries + 1) // 2 if causal else queries * keys))
        return attend(q, k, v, causal, scale)

    monkeypatch.setattr("parallel.sequence.blockwise.attend", counting)
    layout = Layout(CUTS["ring 3"], LENGTH, DOCUMENTS["packed"])
    split(CUTS["ring 3"], tensors((2, 2), torch.float32, LENGTH), layout, True)
    assert sum(computed) == sum(layout.pairs(member) for member in range(3))
    borders = [(*starts, LENGTH) for starts in layout.documents]
    sizes = [end - begin for row in borders for begin, end in zip(row, row[1:], strict=False)]
    assert sum(computed) == sum(size * (size + 1) // 2 for size in sizes)


@pytest.mark.parametrize("cut", CUTS)
def test_each_token_lies_on_one_rank_and_comes_back(cut: str) -> None:
    for length in (8, 29, 64):
        layout = Layout(CUTS[cut], length, ((0,),))
        rows = torch.arange(2 * length).view(2, length)
        parts = [layout.take(rows, rank) for rank in range(CUTS[cut].degree)]
        assert torch.equal(layout.put(parts), rows)
        assert max(part.shape[1] for part in parts) - min(part.shape[1] for part in parts) <= 2


def test_documents_begin_where_positions_do_not_go_on() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 0, 0, 1], [0, 1, 2, 3, 4, 5, 6]])
    assert document_starts(positions) == ((0, 3, 4, 5), (0,))


@pytest.mark.parametrize("heads", [(4, 2), (4, 4)])
@pytest.mark.parametrize("causal", [True, False])
def test_products_are_the_kernel(causal: bool, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch) -> None:
    """What runs where no kernel of torch's takes the tensors, some rows at a time."""
    monkeypatch.setattr("parallel.sequence.kernels.SCORES_AT_ONCE", 2 * 4 * LENGTH * 5)
    q, k, v, grad = tensors(heads, torch.float64, LENGTH)
    for one, other in zip(attend_by_products(q, k, v, causal, 0.3), attend(q, k, v, causal, 0.3), strict=True):
        torch.testing.assert_close(one, other)
    given = grad, q, k, v, *attend(q, k, v, causal, 0.3), causal, 0.3
    for one, other in zip(backward_by_products(*given), attend_backward(*given), strict=True):
        torch.testing.assert_close(one, other)


def test_merging_stays_finite_far_from_zero() -> None:
    """exp of the sums themselves would overflow; a row that has seen nothing takes over what comes."""
    out, lse = torch.zeros(1, 1, 3, 2), torch.tensor([[[float("-inf"), 500.0, -500.0]]])
    part, part_lse = torch.ones(1, 1, 3, 2), torch.tensor([[[3.0, -500.0, 500.0]]])
    merge_(out, lse, part, part_lse)
    assert out[..., 0].tolist() == [[[1.0, 0.0, 1.0]]]
    assert lse.tolist() == [[[3.0, 500.0, 500.0]]]


@pytest.mark.gpu
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("dtype", "width", "kernel", "limit"),
    [
        (torch.bfloat16, 64, "flash", 2e-2),
        (torch.float32, 64, "efficient", 1e-3),
        (torch.float32, 20, "products", 1e-5),
    ],
)
def test_the_kernels_of_a_gpu_are_the_products(
    dtype: torch.dtype, width: int, kernel: str, limit: float, causal: bool
) -> None:
    """With output and sums of rows of which the tile is a part, as they come in a ring."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, heads, 100, width) for heads in (4, 2, 2, 4)]
    q, k, v, grad = (torch.randn(shape, generator=generator).to("cuda", dtype) for shape in shapes)
    assert kernel_for(q, v) == kernel
    out, lse = attend_by_products(q, k, v, causal, 0.2)
    for one, other in zip(attend(q, k, v, causal, 0.2), (out, lse), strict=True):
        assert (one - other).abs().max() < limit * other.abs().max()
    given = grad, q, k, v, out, lse + 0.5, causal, 0.2
    for one, other in zip(attend_backward(*given), backward_by_products(*given), strict=True):
        assert (one - other).abs().max() < limit * other.abs().max()


@pytest.mark.gpu
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 3e-2), (torch.float32, 1e-3)])
@pytest.mark.parametrize("cut", ["ulysses 4", "ring 3", "usp 2 x 2", "lightseq 3", "lightseq 4"])
def test_split_attention_on_a_gpu_is_attention(cut: str, dtype: torch.dtype, limit: float) -> None:
    """All ranks on one device, whose kernels are as coarse as they are."""
    layout = Layout(CUTS[cut], LENGTH, DOCUMENTS["packed"])
    inputs = tensors(HEADS["GQA 2"], dtype, LENGTH)
    found, expected = split(CUTS[cut], [x.cuda() for x in inputs], layout, True), whole(inputs, layout, True)
    assert furthest(Found(found.out.cpu(), [x.cpu() for x in found.gradients], found.sent), expected) < limit
