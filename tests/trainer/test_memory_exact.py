"""Bytes by kind against hand counts, and against what the CPU allocator itself reports."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM

from optim import registry
from optim.config import AdamWConfig, GaLoreConfig
from trainer.memory import MemoryMeter, Timeline

CPU = torch.device("cpu")
FLOAT, INT = 4, 8

# x (32, 8) -> Linear(8, 16) -> ReLU -> Linear(16, 4) -> sum
ROWS, INPUT, HIDDEN, OUTPUT = 32, 8, 16, 4
X = ROWS * INPUT * FLOAT
H = ROWS * HIDDEN * FLOAT
Y = ROWS * OUTPUT * FLOAT
LOSS = FLOAT
W1, B1, W2, B2 = HIDDEN * INPUT * FLOAT, HIDDEN * FLOAT, OUTPUT * HIDDEN * FLOAT, OUTPUT * FLOAT
WEIGHTS = W1 + B1 + W2 + B2


def stack() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(INPUT, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, OUTPUT))


def stack_step(model: nn.Module, optimizer: Optimizer, meter: MemoryMeter, x: Tensor) -> None:
    with meter.phase("forward"):
        loss = model(x).sum()
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("step"):
        optimizer.step()
    optimizer.zero_grad()


def counted(model: nn.Module, optimizer: Optimizer, step: Callable[..., None], batch: Tensor) -> Timeline:
    meter = MemoryMeter(model, optimizer, CPU)
    with meter.count_step() as timeline:
        step(model, optimizer, meter, batch)
    return timeline


def kinds(weights: int, gradients: int, states: int, activations: int, workspace: int) -> dict[str, int]:
    return {
        "weights": weights,
        "gradients": gradients,
        "states": states,
        "activations": activations,
        "workspace": workspace,
    }


def check_stack(timeline: Timeline, before: int, states: int, in_step: int) -> None:
    """Compare a counted step with the hand count; states are `before` bytes at first and `states` after the step.

    forward   the first Linear holds x; ReLU holds its own result, not h; the second Linear holds that same result.
              Most is alive at ReLU: x and r held, h about to go.
    backward  autograd's caller keeps the loss and its gradient, one value each. The second Linear's gradients come
              first, then ReLU turns dr into dh while r is still held: that is the most.
    step      `in_step` bytes of temporaries.
    """
    assert timeline.ends("forward") == [kinds(WEIGHTS, 0, before, X + H, LOSS)]
    assert timeline.ends("backward") == [kinds(WEIGHTS, WEIGHTS, before, 0, X + LOSS)]
    assert timeline.ends("step") == [kinds(WEIGHTS, WEIGHTS, states, 0, X + LOSS)]
    forward, backward, step = (timeline.peak_by_phase[name] for name in ("forward", "backward", "step"))
    assert forward.by_kind == kinds(WEIGHTS, 0, before, X + H, H)
    assert backward.by_kind == kinds(WEIGHTS, W2 + B2, before, X + H, 2 * H + 2 * LOSS)
    assert step.by_kind == kinds(WEIGHTS, WEIGHTS, states, 0, X + LOSS + in_step)
    highest = max((forward, backward, step), key=lambda peak: peak.total)
    assert timeline.peak == highest and highest.total == sum(highest.by_kind.values())


def test_a_linear_stack_with_adamw_holds_what_a_hand_count_says() -> None:
    model = stack()
    optimizer = registry.build(AdamWConfig(lr=1e-3), model.named_parameters())
    x = torch.randn(ROWS, INPUT)
    for _ in range(2):
        timeline = counted(model, optimizer, stack_step, x)
        check_stack(timeline, before=2 * WEIGHTS, states=2 * WEIGHTS, in_step=FLOAT)  # the kernel's step count


def test_states_born_in_the_first_step_are_states_from_their_birth() -> None:
    model = stack()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    states = 2 * WEIGHTS + 4 * FLOAT  # and a step count a tensor
    x = torch.randn(ROWS, INPUT)
    check_stack(counted(model, optimizer, stack_step, x), before=0, states=states, in_step=0)
    check_stack(counted(model, optimizer, stack_step, x), before=states, states=states, in_step=0)


def test_a_linear_stack_with_galore_holds_what_a_hand_count_says() -> None:
    model = stack()
    rank = 2
    cfg = GaLoreConfig(lr=1e-3, rank=rank, update_proj_gap=10, targets=r"weight$")
    optimizer = registry.build(cfg, model.named_parameters())
    right = rank * INPUT + 2 * HIDDEN * rank  # (16, 8) is projected on its right: basis (2, 8), moments (16, 2)
    left = rank * OUTPUT + 2 * rank * HIDDEN  # (4, 16) on its left: basis (2, 4), moments (2, 16)
    states = (right + left) * FLOAT + 2 * (B1 + B2)
    low = HIDDEN * rank * FLOAT
    x = torch.randn(ROWS, INPUT)
    first = counted(model, optimizer, stack_step, x)
    assert first.ends("step") == [kinds(WEIGHTS, WEIGHTS, states, 0, X + LOSS)]
    # Without a refresh a step takes the projected gradients of both, their updates, and the kernel's step count.
    steady = counted(model, optimizer, stack_step, x)
    check_stack(steady, before=states, states=states, in_step=2 * 2 * low + FLOAT)


def llama(tied: bool = False, **changed: object) -> LlamaForCausalLM:
    torch.manual_seed(0)
    settings = {
        "hidden_size": 32,
        "intermediate_size": 56,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 96,
        "max_position_embeddings": 64,
        "tie_word_embeddings": tied,
    }
    return LlamaForCausalLM(LlamaConfig(**settings | changed))


def llama_step(model: nn.Module, optimizer: Optimizer, meter: MemoryMeter, tokens: Tensor) -> None:
    with meter.phase("forward"):
        logits = model(input_ids=tokens, use_cache=False).logits
        loss = F.cross_entropy(logits.flatten(0, 1), tokens.flatten())
    del logits
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("clip"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with meter.phase("step"):
        optimizer.step()
    optimizer.zero_grad()


def test_a_tied_llama_holds_what_a_hand_count_says() -> None:
    batch, length, hidden, wide, layers, heads, vocab = 3, 16, 32, 56, 2, 4, 96
    key_value = hidden // 2
    model = llama(tied=True)
    optimizer = registry.build(AdamWConfig(lr=1e-3), model.named_parameters())
    tokens = torch.randint(0, vocab, (batch, length))
    timeline = counted(model, optimizer, llama_step, tokens)

    matrices = 2 * hidden * hidden + 2 * key_value * hidden + 3 * hidden * wide
    parameters = vocab * hidden + layers * (matrices + 2 * hidden) + hidden  # embedding and head are one
    frequencies = 2 * (hidden // heads // 2)  # rotary buffers: in use, and as they were
    weights = (parameters + frequencies) * FLOAT

    t = batch * length
    norm = 2 * t * hidden + t  # scaled input and output are t x hidden each, and one number a token
    attention = 2 * t * hidden + 2 * t * key_value + t * heads  # q and output; k, v; log-sum-exp
    mlp = 4 * t * wide  # gate, silu(gate), up, and their product
    layer = (t * hidden + norm) * 2 + attention + mlp  # both norms hold their input, the residual stream
    final = t * hidden + norm
    loss = t * vocab + 1  # log-softmax, and the sum of the targets' weights
    rotary = 2 * length * (hidden // heads)  # cosine and sine, once for all layers
    held = (layers * layer + final + loss + rotary) * FLOAT + t * INT  # and the tokens, for embedding and loss
    (forward,) = timeline.ends("forward")
    assert {kind: forward[kind] for kind in ("weights", "gradients", "states", "activations")} == {
        "weights": weights,
        "gradients": 0,
        "states": 2 * parameters * FLOAT,
        "activations": held,
    }
    (backward,) = timeline.ends("backward")
    assert (backward["gradients"], backward["activations"]) == (parameters * FLOAT, 0)
    assert MemoryMeter(model, optimizer, CPU).held() == {
        "weights": weights,
        "gradients": 0,
        "states": 2 * parameters * FLOAT,
    }


def allocator_peak(run: Callable[[], None]) -> int:
    """The most bytes torch's CPU allocator had handed out beyond those at the start, from its own reports."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = sorted((e.start_ns(), i, e.nbytes()) for i, e in enumerate(events) if e.name() == "[memory]")
    held = peak = 0
    for _, _, change in changes:
        held += change
        peak = max(peak, held)
    return peak


class Shared(nn.Module):
    """One activation with three uses, and the peak on a sum of its gradients, which autograd makes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h.sum() + h.neg().sum() + h.neg().sum()


def shared() -> tuple[nn.Module, Callable[..., None], Tensor]:
    torch.manual_seed(0)
    return Shared(), stack_step, torch.randn(64, 24)


class OwnSum(torch.autograd.Function):
    """Its backward has the peak on a sum of its own, which is made out of place and so counted with both terms."""

    @staticmethod
    def forward(ctx: Any, h: Tensor) -> Tensor:
        ctx.shape = h.shape
        return h.sum()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        kept = grad.expand(ctx.shape).neg()
        return kept.exp() + kept.neg()


class SumsItself(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        loss: Tensor = OwnSum.apply(super().forward(x))
        return loss


def sums_itself() -> tuple[nn.Module, Callable[..., None], Tensor]:
    torch.manual_seed(0)
    return SumsItself(24, 24), stack_step, torch.randn(64, 24)


def language_model(**changed: object) -> tuple[nn.Module, Callable[..., None], Tensor]:
    return llama(**changed), llama_step, torch.randint(0, 96, (3, 16))


CASES = {
    "shared": shared,
    "sums itself": sums_itself,
    "llama": language_model,
    "llama, deep": lambda: language_model(num_hidden_layers=8),
    "llama, tied": lambda: language_model(tied=True),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("foreach", [False, True], ids=["fused", "foreach"])
def test_the_peak_is_to_the_byte_what_the_allocator_reports_of_an_uncounted_step(case: str, foreach: bool) -> None:
    model, step, batch = CASES[case]()
    optimizer = torch.optim.AdamW(model.parameters(), foreach=foreach, fused=not foreach)
    meter = MemoryMeter(model, optimizer, CPU)
    for _ in range(2):
        step(model, optimizer, meter, batch)
    timeline = counted(model, optimizer, step, batch)
    assert timeline.peak.total - timeline.total[0] == allocator_peak(lambda: step(model, optimizer, meter, batch))
