"""LightSeq's schedule: every pair once, work that is even, the messages and bytes that are told."""

import threading
from collections import Counter
from collections.abc import Sequence
from typing import Any
from weakref import finalize

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from parallel.sequence import blockwise
from parallel.sequence.blockwise import Method
from parallel.sequence.cost import Shape
from parallel.sequence.layout import Cut, Layout, Tile
from parallel.sequence.lightseq import LIGHTSEQ, cost_of, lightseq_cost
from parallel.sequence.links import Pending, PretendedLinks
from parallel.sequence.ring import RING
from parallel.sequence.schedule import job, loans, turns
from tests.parallel.simulated import furthest, split, tensors, whole

DEGREES = [2, 3, 4, 5, 8]
LENGTH = 61
PACKED = ((0, 5, 6, 17, 50), (0, 30))


def layout_of(ranks: int, documents: tuple[tuple[int, ...], ...] = ((0,),), length: int = LENGTH) -> Layout:
    return Layout(Cut(ring=ranks, zigzag=False), length, documents)


def tiles(layout: Layout, member: int) -> list[tuple[int, int, Tile]]:
    """All that a member computes, with whose queries and keys."""
    jobs = [turn.mine for turn in turns(layout, member)]
    own = [(member, member, tile) for tile in layout.tiles(member, member, True)]
    return own + [(each.asking, each.asked, tile) for each in jobs for tile in each.tiles]


@pytest.mark.parametrize("documents", [((0,), (0,)), PACKED], ids=["one document", "packed"])
@pytest.mark.parametrize("ranks", DEGREES)
def test_each_pair_of_tokens_is_computed_once(ranks: int, documents: tuple[tuple[int, ...], ...]) -> None:
    layout = layout_of(ranks, documents)
    seen = torch.zeros(2, LENGTH, LENGTH, dtype=torch.int)
    for member in range(ranks):
        for asking, asked, tile in tiles(layout, member):
            q, k = (layout.cut.of_member(LENGTH, each)[0].start for each in (asking, asked))
            part = seen[tile.rows, q + tile.q.start : q + tile.q.stop, k + tile.k.start : k + tile.k.stop]
            part += torch.ones(part.shape[1:], dtype=torch.int).tril() if tile.causal else 1
    document = torch.stack([torch.bucketize(torch.arange(LENGTH), torch.tensor(row), right=True) for row in documents])
    assert torch.equal(seen, (document[:, :, None] == document[:, None]).int().tril())


@pytest.mark.parametrize("ranks", DEGREES)
def test_causal_work_is_even_and_no_step_is_idle(ranks: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scores that kernels compute, by rank. In the paper's last step half of an even number of ranks wait: with two
    ranks one computes three times as much as the other."""
    computed: Counter[int] = Counter()
    attend = blockwise.attend

    def counting(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
        queries, keys = q.shape[2], k.shape[2]
        computed[threading.get_ident()] += queries * (queries + 1) // 2 if causal else queries * keys
        return attend(q, k, v, causal, scale)

    monkeypatch.setattr(blockwise, "attend", counting)
    length = 40 * ranks + 1
    layout = layout_of(ranks, length=length)
    split(layout.cut, tensors((2, 2), torch.float32, length, batch=1), layout, True)
    assert len(computed) == ranks and sum(computed.values()) == length * (length + 1) // 2
    assert max(computed.values()) < 1.05 * min(computed.values())
    assert all(turn.mine.tiles for member in range(ranks) for turn in turns(layout, member))


@pytest.mark.parametrize("ranks", DEGREES)
def test_messages_are_those_of_the_paper_and_the_shared_last_step(ranks: int) -> None:
    """Of 24 tokens each: r fetches min(r, P / 2) blocks of keys, and an r < P / 2 helps P / 2 - 1 - r times and, of an
    even P, once with a half."""
    layout = layout_of(ranks, length=24 * ranks)
    for member in range(ranks):
        steps = loans(layout, member)
        assert [step.keys_borrowed for step in steps if step.keys_borrowed] == [24] * min(member, ranks // 2)
        whole = max(0, (ranks - 1) // 2 - member)
        shared = [12] if ranks % 2 == 0 and member < ranks // 2 else []
        assert [step.queries_borrowed for step in steps if step.queries_borrowed] == [24] * whole + shared


@pytest.mark.parametrize("ranks", DEGREES)
def test_all_ranks_send_what_the_formula_says(ranks: int) -> None:
    """See the head of `lightseq.py`; the paper's figures for an even P but for the queries of the last step."""
    tokens, heads, keys, width, value = 24, 8, 4, 16, 2
    shape = Shape(1, tokens * ranks, heads, keys, width, value)
    cut = Cut(ring=ranks, zigzag=False)
    costs = [lightseq_cost(cut, member, shape, heads, keys) for member in range(ranks)]
    even = ranks % 2 == 0
    own = (3 * ranks**2 - 2 * ranks if even else 3 * ranks**2 - 4 * ranks + 1) / 8
    helped = (ranks**2 if even else ranks**2 - 1) / 8
    key, query = 2 * keys * width * value * tokens, heads * width * value * tokens
    lse = heads * 4 * tokens
    assert sum(cost.forward for cost in costs) == own * key + helped * (2 * query + lse)
    assert sum(cost.backward for cost in costs) == own * 2 * key + helped * (4 * query + lse)
    if even:
        paper = (3 * ranks**2 / 8 - ranks / 4) * key + (ranks**2 / 8 - ranks / 4) * (2 * query + lse)
        assert sum(cost.forward for cost in costs) == paper + ranks / 4 * (2 * query + lse)


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_packed_rows_send_what_their_documents_need(ranks: int) -> None:
    layout = layout_of(ranks, PACKED)
    found = split(layout.cut, tensors((4, 2), torch.float32, LENGTH), layout, True)
    costs = [cost_of(layout, member, Shape(2, LENGTH, 4, 2, 8, 4), 4, 2) for member in range(ranks)]
    assert found.sent == [cost.forward + cost.backward for cost in costs]
    borders = tuple(LENGTH * member // ranks for member in range(ranks))
    apart = layout_of(ranks, (borders, borders))
    assert split(apart.cut, tensors((4, 2), torch.float32, LENGTH), apart, True).sent == [0] * ranks


@pytest.mark.parametrize("ranks", [5, 8])
def test_attention_of_more_ranks_is_attention(ranks: int) -> None:
    layout = layout_of(ranks, PACKED)
    for dtype, limit in ((torch.float64, 1e-10), (torch.float32, 2e-5)):
        inputs = tensors((4, 2), dtype, LENGTH)
        for causal in (True, False):
            assert furthest(split(layout.cut, inputs, layout, causal), whole(inputs, layout, causal)) < limit


def test_narrow_parts_are_merged_in_fp32() -> None:
    """Blocks of eight ranks in bf16 are as near to fp64 as one process's attention in bf16 is; merged in bf16 they are
    half as far again."""
    length = 256
    inputs = tensors((4, 2), torch.bfloat16, length, batch=1)
    layouts = layout_of(8, length=length), Layout(Cut(), length, ((0,),))
    expected = whole(inputs, layouts[0], True).out
    ours, alone = (split(each.cut, inputs, each, True).out.double() - expected for each in layouts)
    assert ours.square().mean().sqrt() < 1.2 * alone.square().mean().sqrt()


class Recorded(PretendedLinks):
    """A rank of whom no other exists, and the order of what it does."""

    def __init__(self, count: int, index: int) -> None:
        super().__init__(count)
        self.index, self.events = index, list[str]()

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        self.events.append("exchange")
        return super().exchange(send, to, coming, source)


def test_a_step_is_computed_while_the_next_ones_messages_travel(monkeypatch: pytest.MonkeyPatch) -> None:
    links = Recorded(8, 1)
    attend = blockwise.attend
    monkeypatch.setattr(blockwise, "attend", lambda *args: links.events.append("compute") or attend(*args))
    layout = layout_of(8)
    q, k, v, _ = (x[:, :, : layout.held(1)] for x in tensors((2, 2), torch.float32, LENGTH, batch=1))
    LIGHTSEQ.forward(q, k, v, layout, links, True, 0.3)
    ahead = ["exchange", "compute", "exchange", "compute"]  # loans of 1, the triangle, loans of 2, step 1
    results_and_loans = ["exchange", "exchange", "compute"]  # results of t - 1, loans of t + 1, step t
    assert links.events == [*ahead, *results_and_loans * 2, "exchange", "compute", "exchange"]


class Alive(TorchDispatchMode):
    """Bytes of the storages that came to be inside and live, and the most there were."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.most = 0
        self.sizes: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        out = func(*args, **(kwargs or {}))
        for storage in (x.untyped_storage() for x in tree_leaves(out) if isinstance(x, Tensor)):
            if id(storage) not in known | self.sizes.keys():
                self.sizes[id(storage)] = storage.nbytes()
                self.now += storage.nbytes()
                finalize(storage, self.gone, id(storage))
        self.most = max(self.most, self.now)
        return out

    def gone(self, storage: int) -> None:
        self.now -= self.sizes.pop(storage)


@pytest.mark.parametrize("heads", [(4, 4), (8, 2)], ids=["MHA", "GQA 4"])
@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("method", [RING, LIGHTSEQ], ids=["ring", "lightseq"])
def test_working_memory_is_what_is_told(
    method: Method, ranks: int, heads: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a kernel whose results take nothing; tensors lie in memory as models hand them over."""

    def nothing(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
        return [x.new_zeros(()).expand(x.shape) for x in (q, k, v)]

    monkeypatch.setattr(blockwise, "attend_backward", nothing)
    cut, length = Cut(ring=ranks, zigzag=method is RING), 32 * ranks + 5
    layout, shape = Layout(cut, length, ((0,),)), Shape(1, length, *heads, 16, 4)
    for member in range(ranks):
        q, k, v = (torch.zeros(1, layout.held(member), count, 16).transpose(1, 2) for count in (*heads, heads[1]))
        lse = torch.zeros(q.shape[:3])
        with Alive() as alive:
            method.backward(q, q, k, v, q, lse, layout, Recorded(ranks, member), True, 0.3)
        told = method.cost(cut, member, shape, *heads).working
        # All of lse is sent from where it is, parts of it and everything else from copies.
        assert told - lse.nbytes <= alive.most <= told + 64


def test_a_job_with_nothing_to_compute_asks_for_nothing() -> None:
    layout = layout_of(2, ((0, 30), (0, 30)))
    assert job(layout, 1, 1).tiles == job(layout, 1, 0).tiles == []
    assert loans(layout, 0)[0] == (0, 0, 0, 0)
