"""Linear attention in blocks, and by LASP-2 over ranks (as threads), is the recurrence token by token."""

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from parallel.config import ParallelConfig, SequenceKind
from parallel.launch import connected
from parallel.sequence import fused, states
from parallel.sequence.cost import Decay, Shape, StateCost
from parallel.sequence.group import make_strategy
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.linear import linear_attention, linear_attention_step
from parallel.sequence.links import Pending
from parallel.sequence.states import shared_linear_attention
from parallel.sequence.strategy import WithStates
from parallel.traffic import Traffic
from tests.parallel.simulated import ThreadLinks, Wire, on_threads
from tests.ranks import on_ranks
from tests.reference.linear_attention import positions_of, recurrent

CUTS = {
    "1": Cut(),
    "2": Cut(ring=2, zigzag=False),
    "3": Cut(ring=3, zigzag=False),
    "4": Cut(ring=4, zigzag=False),
    "zigzag 2": Cut(ring=2),
    "zigzag 3": Cut(ring=3),
    "ulysses 3": Cut(ulysses=3),
    "usp 2 x 2": Cut(ring=2, ulysses=2),
}
HEADS = {"as many": (4, 4), "GQA": (4, 2), "MQA": (4, 1)}
DOCUMENTS = {
    "one document": ((0,), (0,)),
    "packed": ((0, 5, 6, 17), (0, 9, 10, 11, 20)),
    "borders at the edges of ranks": ((0, 8, 16), (0, 10, 19)),
}
LENGTH = 29
"""Not a multiple of anything."""
KINDS = ("no decay", "of heads", "of tokens", "no mask")
LIMITS = {torch.float64: 1e-12, torch.float32: 2e-5}


@pytest.fixture(autouse=True, params=[5], ids=["blocks of 5"])
def short_blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, of which the last is not full and documents end within."""
    monkeypatch.setattr("parallel.sequence.recurrence.BLOCK", request.param)


@dataclass
class Inputs:
    tensors: list[Tensor]
    """q, k, v."""
    grad: Tensor
    decay: Tensor | None
    positions: Tensor
    starts: tuple[tuple[int, ...], ...]
    causal: bool

    def to(self, dtype: torch.dtype) -> "Inputs":
        decay = None if self.decay is None else self.decay.to(dtype)
        tensors = [x.to(dtype) for x in self.tensors]
        return Inputs(tensors, self.grad.to(dtype), decay, self.positions, self.starts, self.causal)


Attention = Callable[[list[Tensor], Tensor | None], Tensor]


def made(kind: str, heads: str, documents: str, length: int = LENGTH) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    queries, keys = HEADS[heads]

    def draw(*shape: int) -> Tensor:
        return torch.randn(2, *shape, generator=generator, dtype=torch.float64)

    q, k, v, grad = draw(queries, length, 8), draw(keys, length, 8), draw(keys, length, 6), draw(queries, length, 6)
    decays = {
        "of heads": -torch.linspace(0.03, 1.0, keys, dtype=torch.float64),
        "of tokens": logsigmoid(draw(keys, length)),
    }
    starts = DOCUMENTS[documents]
    return Inputs([q, k, v], grad, decays.get(kind), positions_of(starts, length), starts, kind != "no mask")


def results(inputs: Inputs, attend: Attention) -> list[Tensor]:
    """Output, gradients of q, k and v, and of decays that tokens have, (batch, heads, tokens, width) each."""
    leaves = [x.clone().requires_grad_() for x in inputs.tensors]
    decay = inputs.decay
    if decay is not None and decay.dim() == 3:
        decay = decay.clone().requires_grad_()
    out = attend(leaves, decay)
    out.backward(inputs.grad)
    found = [out.detach(), *(x.grad for x in leaves)]
    return found + ([decay.grad[..., None]] if decay is not None and decay.requires_grad else [])  # type: ignore[return-value,index]


def in_blocks(inputs: Inputs) -> list[Tensor]:
    def attend(x: list[Tensor], decay: Tensor | None) -> Tensor:
        return linear_attention(x[0], x[1], x[2], inputs.positions, decay=decay, causal=inputs.causal)

    return results(inputs, attend)


def token_by_token(inputs: Inputs) -> list[Tensor]:
    def attend(x: list[Tensor], decay: Tensor | None) -> Tensor:
        return recurrent(x[0], x[1], x[2], inputs.starts, decay, causal=inputs.causal)

    return results(inputs, attend)


def over_ranks(cut: Cut, inputs: Inputs, links: type[ThreadLinks] = ThreadLinks) -> tuple[list[Tensor], list[int]]:
    """The same from all ranks put together, and the bytes that each has sent."""
    layout = Layout(cut, inputs.positions.shape[1], inputs.starts)
    wire = Wire(cut.degree)
    connections = [links(wire, rank) for rank in range(cut.degree)]

    def part(x: Tensor, rank: int) -> Tensor:
        return layout.take(x.transpose(1, 2), rank).transpose(1, 2)

    def run(rank: int) -> list[Tensor]:
        decay = inputs.decay
        if decay is not None and decay.dim() == 3:
            decay = part(decay, rank)
        mine = Inputs(
            [part(x, rank) for x in inputs.tensors], part(inputs.grad, rank), decay,
            layout.take(inputs.positions, rank), inputs.starts, inputs.causal,
        )  # fmt: skip

        def attend(x: list[Tensor], decay: Tensor | None) -> Tensor:
            return shared_linear_attention(
                x[0], x[1], x[2], mine.positions, decay, layout, rank, connections[rank], causal=inputs.causal
            )

        return results(mine, attend)

    found = on_threads(cut.degree, run)
    whole = [layout.put([x.transpose(1, 2) for x in parts]).transpose(1, 2) for parts in zip(*found, strict=True)]
    return whole, [each.sent for each in connections]


def furthest(found: list[Tensor], expected: list[Tensor]) -> float:
    """Largest difference beside the largest value, over output and gradients."""
    pairs = zip(found, expected, strict=True)
    return max(float((one.double() - other).abs().max() / other.abs().max()) for one, other in pairs)


@pytest.mark.parametrize("short_blocks", [5, 64], ids=["blocks of 5", "one block"], indirect=True)
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_the_recurrence(kind: str, short_blocks: None) -> None:
    inputs = made(kind, "GQA", "packed")
    expected = token_by_token(inputs)
    for dtype, limit in LIMITS.items():
        assert furthest(in_blocks(inputs.to(dtype)), expected) < limit


SMALLEST = [
    ("3", "no decay", "GQA", "packed"),
    ("2", "of heads", "as many", "one document"),
    ("4", "of tokens", "MQA", "borders at the edges of ranks"),
    ("3", "no mask", "GQA", "packed"),
    ("4", "no mask", "as many", "one document"),
    ("zigzag 3", "of tokens", "GQA", "packed"),
    ("usp 2 x 2", "of heads", "GQA", "packed"),
]
"""The quick suite's; the slow one takes all."""


@pytest.mark.parametrize(("cut", "kind", "heads", "documents"), SMALLEST)
def test_lasp2_is_the_recurrence(cut: str, kind: str, heads: str, documents: str) -> None:
    inputs = made(kind, heads, documents)
    expected = token_by_token(inputs)
    for dtype, limit in LIMITS.items():
        assert furthest(over_ranks(CUTS[cut], inputs.to(dtype))[0], expected) < limit


@pytest.mark.slow
@pytest.mark.parametrize("short_blocks", [5, 64], ids=["blocks of 5", "one block"], indirect=True)
@pytest.mark.parametrize("documents", DOCUMENTS)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS)
def test_lasp2_is_the_recurrence_in_every_case(
    cut: str, kind: str, heads: str, documents: str, short_blocks: None
) -> None:
    test_lasp2_is_the_recurrence(cut, kind, heads, documents)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", ["1", "3"])
def test_a_changed_document_leaves_the_others_bit_equal(cut: str, kind: str) -> None:
    inputs = made(kind, "GQA", "packed").to(torch.float32)
    before = over_ranks(CUTS[cut], inputs)[0]
    for x in (*inputs.tensors, inputs.grad):
        x[0, :, 6:17] += 1
    if kind == "of tokens":
        assert inputs.decay is not None
        inputs.decay[0, :, 6:17] *= 0.7
    for one, other in zip(before, over_ranks(CUTS[cut], inputs)[0], strict=True):
        assert not torch.equal(one[0, :, 6:17], other[0, :, 6:17])
        for same in (one[0, :, :6] - other[0, :, :6], one[0, :, 17:] - other[0, :, 17:], one[1] - other[1]):
            assert not same.any()


def test_decays_far_from_one_neither_overflow_nor_vanish_together() -> None:
    """Sums of logarithms of -2000 and more; neighbours still see each other."""
    inputs = made("of heads", "GQA", "one document")
    inputs.decay = torch.tensor([-100.0, -1e-9], dtype=torch.float64)
    assert furthest(in_blocks(inputs.to(torch.float32)), token_by_token(inputs)) < LIMITS[torch.float32]


@pytest.mark.parametrize("kind", ["no decay", "of heads", "of tokens"])
def test_a_state_goes_on_where_tokens_stopped(kind: str) -> None:
    """In pieces of several tokens and of one, across the borders of documents."""
    inputs = made(kind, "GQA", "packed")
    (q, k, v), decay = inputs.tensors, inputs.decay
    outs, state = [], None
    for part in (slice(0, 11), slice(11, 12), slice(12, LENGTH)):
        own = decay if decay is None or decay.dim() == 1 else decay[..., part]
        pieces = q[:, :, part], k[:, :, part], v[:, :, part], inputs.positions[:, part]
        out, state = linear_attention_step(*pieces, state, decay=own)
        outs.append(out)
    expected = recurrent(q, k, v, inputs.starts, decay)
    assert furthest([torch.cat(outs, 2)], [expected]) < LIMITS[torch.float64]
    with pytest.raises(ValueError, match="use_cache=False"):
        linear_attention_step(q.requires_grad_(), k, v, inputs.positions, state, decay=decay)


DECAYS = {"no decay": Decay.none, "of heads": Decay.of_heads, "of tokens": Decay.of_tokens}


@pytest.mark.parametrize(("cut", "kind"), [("1", "no decay"), ("3", "of tokens"), ("zigzag 3", "of heads")])
def test_bytes_sent_are_those_that_are_told_however_long_the_rows(cut: str, kind: str) -> None:
    found = []
    for length in (LENGTH, 61):
        inputs = made(kind, "GQA", "packed", length).to(torch.float32)
        inputs.tensors[2], inputs.grad = inputs.tensors[1].clone(), inputs.tensors[0].clone()  # heads as wide as keys
        shape = Shape(2, length, *HEADS["GQA"], 8, 4)
        costs = [StateCost(CUTS[cut], rank, shape, DECAYS[kind]).of() for rank in range(CUTS[cut].degree)]
        sent = over_ranks(CUTS[cut], inputs)[1]
        assert sent == [cost.forward + cost.backward for cost in costs]
        found.append(sent)
    assert found[0] == found[1]


def test_bytes_sent_are_those_of_the_paper() -> None:
    """(P - 1) n d^2 values forward and backward, with a mask or without one."""
    ranks, batch, keys, width = 4, 2, 4, 8
    cost = StateCost(CUTS["4"], 1, Shape(batch, 1000, keys, keys, width, 2)).of()
    assert cost.forward == cost.backward == (ranks - 1) * batch * keys * width**2 * 4
    for kind in ("no decay", "no mask"):
        inputs = made(kind, "as many", "one document").to(torch.float32)
        assert over_ranks(CUTS["4"], inputs)[1] == [2 * (ranks - 1) * batch * keys * width * 6 * 4] * ranks


def sent_as_torch_sees_it(length: int) -> list[list[int]]:
    """Bytes of forward and backward of a linear and of a softmax layer on this rank, and what its strategy says."""
    cfg, shape = ParallelConfig(sequence=SequenceKind.lasp2), Shape(2, length, *HEADS["GQA"], 8, 4)
    with connected(cfg, "cpu", threads=1) as world:
        strategy = make_strategy(world, cfg, heads=shape.heads, key_heads=shape.key_heads, linear=True)
        assert isinstance(strategy, WithStates)
        layout, positions = Layout(strategy.cut, length, ((0,), (0, 5))), positions_of(((0,), (0, 5)), length)
        tokens, mine = layout.held(strategy.index), layout.take(positions, strategy.index)
        q, k, v = (torch.ones(2, heads, tokens, 8, requires_grad=True) for heads in (4, 2, 2))
        found = []
        for attend, cost in (
            (lambda: strategy.recur(q, k, v, mine, None, layout, causal=True), strategy.state_cost(shape, Decay.none)),
            (lambda: strategy.attend(q, k, v, layout, causal=True, scale=1.0), strategy.cost(shape)),
        ):
            with Traffic() as seen:
                attend().sum().backward()  # type: ignore[no-untyped-call]
            found.append([sum(seen.sent.values()), cost.forward + cost.backward])
    return found


def test_processes_send_what_is_told() -> None:
    short, long = (on_ranks(2, sent_as_torch_sees_it, length)[0] for length in (12, 24))
    for seen, told in (*short, *long):
        assert seen == told
    assert short[0] == long[0] and long[1][0] == 2 * short[1][0]  # states as ever, keys and values by the length


class Slow(ThreadLinks):
    """What comes is not looked at before this rank has computed its own tokens."""

    events: list[str] = []

    def all_gather(self, tensor: Tensor) -> Pending:
        self.events.append("sent")
        inner = super().all_gather(tensor)
        wait, inner.wait = inner.wait, lambda: self.events.append("waited") or wait()  # type: ignore[method-assign]
        return inner


def test_states_travel_while_a_rank_computes_its_own_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    Slow.events = []
    for name in ("within", "within_backward"):
        inner = getattr(states, name)

        def noted(*args: Any, inner: Any = inner) -> Any:
            Slow.events.append("computed")
            return inner(*args)

        monkeypatch.setattr(states, name, noted)
    over_ranks(CUTS["1"], made("of heads", "GQA", "packed"), Slow)
    assert Slow.events == ["sent", "computed", "waited"] * 2


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """A package that looks like fla, whose kernel notes what it is given; every tensor passes for CUDA's."""
    calls: list[dict[str, Any]] = []

    def chunk_simple_gla(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, None]:
        calls.append({"shapes": [x.shape for x in (q, k, v)], **options})
        starts = [tuple(options["cu_seqlens"][:-1].tolist())]
        decay = options.get("g_gamma", options["g"].transpose(1, 2) if "g" in options else None)
        out = recurrent(*(x.transpose(1, 2) for x in (q, k, v)), starts, decay)  # type: ignore[misc]
        return out.transpose(1, 2), None

    module = SimpleNamespace(chunk_simple_gla=chunk_simple_gla)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(fused.importlib, "import_module", lambda name: module)
    monkeypatch.setattr(fused, "takes", lambda *tensors: True)
    fused.function.cache_clear()
    yield calls  # type: ignore[misc]
    fused.function.cache_clear()


@pytest.mark.parametrize("kind", KINDS)
def test_the_kernel_is_given_documents_decays_and_a_key_for_each_query(
    kind: str, installed: list[dict[str, Any]]
) -> None:
    inputs = made(kind, "GQA", "packed")
    assert furthest(in_blocks(inputs), token_by_token(inputs)) < LIMITS[torch.float64] * 1e6  # decays go in fp32
    if kind == "no mask":
        assert installed == []
        return
    for call in installed:
        assert call["shapes"] == [(1, 2 * LENGTH, 4, 8), (1, 2 * LENGTH, 4, 8), (1, 2 * LENGTH, 4, 6)]
        assert call["scale"] == 1.0
        assert call["cu_seqlens"].tolist() == [0, 5, 6, 17, 29, 38, 39, 40, 49, 58]
    assert len(installed) == 2  # backward runs it again
    assert furthest(over_ranks(CUTS["zigzag 3"], inputs)[0], token_by_token(inputs)) < LIMITS[torch.float64] * 1e6


def test_where_the_kernel_cannot_run_ours_do(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(1, 2, 8, 4)
    assert not fused.takes(x)
    monkeypatch.setattr(fused, "takes", lambda *tensors: True)
    monkeypatch.setattr(fused.importlib.util, "find_spec", lambda name: None)
    fused.function.cache_clear()
    assert fused.kernel_for(x, x, x, True) is None
    fused.function.cache_clear()


@pytest.mark.gpu
@pytest.mark.skipif(fused.function() is None, reason="needs flash-linear-attention")
@pytest.mark.parametrize("kind", ["no decay", "of heads", "of tokens"])
def test_the_kernel_of_a_gpu_is_the_recurrence(kind: str) -> None:
    inputs = made(kind, "GQA", "packed", 200)
    inputs.tensors = [torch.nn.functional.pad(x, (0, 32 - x.shape[-1])) for x in inputs.tensors]
    inputs.grad = torch.nn.functional.pad(inputs.grad, (0, 32 - inputs.grad.shape[-1]))
    expected = token_by_token(inputs)
    on_gpu = inputs.to(torch.bfloat16)
    on_gpu.tensors = [x.cuda() for x in on_gpu.tensors]
    on_gpu.grad, on_gpu.positions = on_gpu.grad.cuda(), inputs.positions.cuda()
    on_gpu.decay = None if inputs.decay is None else inputs.decay.float().cuda()
    assert furthest([x.cpu() for x in in_blocks(on_gpu)], expected) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kind", KINDS)
def test_blocks_on_a_gpu_are_the_recurrence(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "takes", lambda *tensors: False)
    inputs = made(kind, "GQA", "packed")
    expected = token_by_token(inputs)
    inputs.tensors = [x.cuda() for x in inputs.tensors]
    inputs.grad, inputs.positions = inputs.grad.cuda(), inputs.positions.cuda()
    inputs.decay = None if inputs.decay is None else inputs.decay.cuda()
    assert furthest([x.cpu() for x in in_blocks(inputs)], expected) < LIMITS[torch.float64]
