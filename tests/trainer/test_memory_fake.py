"""The same counter on fake tensors, and torch's own tracker on the same step."""

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from transformers import LlamaConfig, LlamaForCausalLM

from optim import registry
from optim.config import AdamWConfig, GaLoreConfig, OptimConfig
from trainer.memory import MemoryMeter, Timeline

CPU = torch.device("cpu")
BATCH, LENGTH = 3, 24


def llama(attention: str = "sdpa", layers: int = 2) -> LlamaForCausalLM:
    return LlamaForCausalLM(
        LlamaConfig(
            hidden_size=32,
            intermediate_size=56,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=96,
            max_position_embeddings=64,
            attn_implementation=attention,
        )
    ).train()


def loss_of(model: nn.Module, tokens: Tensor) -> Tensor:
    """Loss of rows that each hold several documents: positions restart, so the block-diagonal mask is built."""
    positions = (torch.arange(LENGTH) % 7).expand(BATCH, LENGTH)
    logits = model(input_ids=tokens, position_ids=positions, use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def step(model: nn.Module, optimizer: torch.optim.Optimizer, meter: MemoryMeter, tokens: Tensor, bf16: bool) -> None:
    with meter.phase("forward"), torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = loss_of(model, tokens)
    with meter.phase("backward"):
        loss.backward()
    with meter.phase("clip"):
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    with meter.phase("step"):
        optimizer.step()
    optimizer.zero_grad()


def timelines(fake: bool, cfg: OptimConfig, attention: str, recompute: bool, bf16: bool) -> list[Timeline]:
    torch.manual_seed(0)
    found = []
    with FakeTensorMode() if fake else nullcontext():
        model = llama(attention)
        if recompute:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        optimizer = registry.build(cfg, model.named_parameters())
        meter = MemoryMeter(model, optimizer, CPU)
        tokens = torch.randint(0, 96, (BATCH, LENGTH))
        for _ in range(2):
            with meter.count_step() as timeline:
                step(model, optimizer, meter, tokens, bf16)
            found.append(timeline)
    return found


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize("bf16", [False, True], ids=["fp32", "autocast"])
@pytest.mark.parametrize("cfg", [AdamWConfig(), GaLoreConfig(rank=4, update_proj_gap=4)], ids=lambda cfg: str(cfg.name))
def test_a_step_on_fake_tensors_holds_the_very_bytes_of_the_real_one(
    cfg: OptimConfig, attention: str, recompute: bool, bf16: bool
) -> None:
    real = timelines(False, cfg, attention, recompute, bf16)
    fake = timelines(True, cfg, attention, recompute, bf16)
    for one, other in zip(real, fake, strict=True):
        assert one.peak == other.peak
        assert one.peak_by_phase == other.peak_by_phase
        for phase in ("forward", "backward", "clip", "step"):
            assert one.ends(phase) == other.ends(phase)


def test_fake_tensors_inside_a_real_step_are_not_counted() -> None:
    model = nn.Linear(4, 4, bias=False)
    meter = MemoryMeter(model, torch.optim.SGD(model.parameters()), CPU)
    with meter.count_step() as timeline, FakeTensorMode():
        torch.zeros(1000).add(1)
    assert timeline.peak.total == 4 * 4 * 4


class Shared(nn.Module):
    """One activation with three uses, and the peak on a sum of its gradients."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(24, 24)

    def forward(self, x: Tensor) -> Tensor:
        h = self.linear(x)
        return h.sum() + h.neg().sum() + h.neg().sum()


def tracker_and_meter(
    model: nn.Module, batch: Tensor, loss_of: Callable[[nn.Module, Tensor], Tensor]
) -> tuple[int, int]:
    """Peaks of the same step by torch's tracker and by ours, each with an optimizer that has no states yet."""

    def run(optimizer: torch.optim.Optimizer) -> None:
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()

    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    with MemoryMeter(model, optimizer, CPU).count_step() as timeline:
        run(optimizer)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    tracker = MemTracker()
    tracker.track_external(model, optimizer, batch)  # it sees what was there before only if told
    with tracker:
        run(optimizer)
    return tracker.get_tracker_snapshot("peak")[CPU]["Total"], timeline.peak.total


@pytest.mark.parametrize("layers", [1, 8])
def test_our_peak_of_a_llama_is_that_of_torchs_tracker(layers: int) -> None:
    torch.manual_seed(0)
    theirs, ours = tracker_and_meter(llama(layers=layers), torch.randint(0, 96, (BATCH, LENGTH)), loss_of)
    assert theirs == ours


def test_torchs_tracker_counts_what_its_own_presence_costs_and_ours_does_not() -> None:
    """Under any dispatch mode autograd adds the gradients of one activation into a new tensor, else into the first.
    Where the peak falls on such a sum, their figure is one activation higher than what is allocated without them
    (test_memory_exact holds ours to the allocator, on this very model).
    """
    torch.manual_seed(0)
    x = torch.randn(64, 24)
    theirs, ours = tracker_and_meter(Shared(), x, lambda model, x: model(x))
    assert theirs - ours == x.nbytes
