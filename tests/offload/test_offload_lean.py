"""Blocks that save the least: the same function, and exactly the bytes that the table of its module says."""

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

from offload.config import Fate
from offload.lean import lean_mlp, lean_norm, make_lean, rms_norm, swiglu
from tests.offload.models import llama, managed, rows, step

HIDDEN, HEADS, BATCH, LENGTH = 256, 4, 4, 64
UNIT = BATCH * LENGTH * HIDDEN * 2
"""Bytes of one bf16 hidden state."""
SMALL = 4 * BATCH * LENGTH * HEADS + 1
"""Numbers a token (roots, log-sum-exp of a head) are not counted."""


def block(ratio: float, key_share: float, lean: str) -> Any:
    model = llama(
        torch.bfloat16, hidden_size=HIDDEN, intermediate_size=int(HIDDEN * ratio), num_attention_heads=HEADS,
        num_key_value_heads=int(HEADS * key_share), attention_dropout=0.0,
    )  # fmt: skip
    if lean == "norms":
        assert all(lean_norm(m) for m in model.modules() if "RMSNorm" in type(m).__name__)
    elif lean == "all":
        assert make_lean(model)
    return model


@pytest.mark.parametrize("ratio, key_share", [(2.6875, 1.0), (3.5, 0.25)])
@pytest.mark.parametrize("lean, fixed, wide", [("none", 10, 4), ("norms", 6, 4), ("all", 6, 3)])
def test_a_block_saves_what_the_table_says(ratio: float, key_share: float, lean: str, fixed: int, wide: int) -> None:
    """22.75, 18.75 and 16.06 units for LLaMA's ratio, 24.5, 20.5 and 17 for a wider one with grouped keys."""
    model = block(ratio, key_share, lean)
    policy = managed(model, fate=Fate.host, keep_last=0, min_bytes=SMALL)
    step(model, rows(BATCH, LENGTH))
    expected = fixed + 2 * key_share + wide * ratio
    assert [frame.moved / UNIT for frame in policy.frames] == [expected] * 4


@pytest.mark.parametrize("ratio, key_share", [(2.6875, 1.0), (3.5, 0.25)])
def test_the_other_rows_of_the_table_are_torchs(ratio: float, key_share: float) -> None:
    """torch's rms_norm in bf16, which is composite on a CPU: 12 + 2k + 4r. A block that is recomputed: its input."""
    model = block(ratio, key_share, "none")
    for module in model.modules():
        if "RMSNorm" in type(module).__name__:
            module.forward = lambda x, m=module: nn.functional.rms_norm(x, m.weight.shape, m.weight, m.variance_epsilon)
    policy = managed(model, fate=Fate.host, keep_last=0, min_bytes=SMALL)
    step(model, rows(BATCH, LENGTH))
    assert [frame.moved / UNIT for frame in policy.frames] == [12 + 2 * key_share + 4 * ratio] * 4
    recomputed = block(ratio, key_share, "none")
    policy = managed(recomputed, fate=Fate.recompute, inputs=Fate.host, keep_last=0, min_bytes=SMALL)
    recomputed.model(input_ids=rows(BATCH, LENGTH), use_cache=False)
    assert [frame.moved / UNIT for frame in policy.frames] == [1] * 4


def test_fp8_holds_what_coat_counts_less_its_rotary_copies() -> None:
    """COAT counts 13.96 units at r = 8/3, with scales; 2 of them for rotary tables, where torch saves nothing."""
    held = {}
    for lean in ("none", "norms", "all"):
        model = block(8 / 3, 1.0, lean)
        policy = managed(model, fate=Fate.fp8, min_bytes=SMALL)
        model.model(input_ids=rows(BATCH, LENGTH), use_cache=False)
        held[lean] = (policy.ledger.codes / 4 + policy.frames[1].kept) / UNIT
    assert held["norms"] == pytest.approx(13.96 - 2, rel=0.02)
    assert held["all"] < 10.7 and 22.67 / held["all"] > 2.1
    assert held["none"] < 13.3


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-6), (torch.bfloat16, 6e-3)])
def test_a_lean_model_has_the_same_loss_and_nearly_the_same_gradients(dtype: torch.dtype, bound: float) -> None:
    """bf16: transformers' own backward rounds the norm's factors to bf16, ours sums in fp32."""
    expected = step(llama(dtype))
    model = llama(dtype)
    assert make_lean(model) == {"norms": 9, "gated MLPs": 4, "grouped attentions": 4}
    found = step(model)
    assert torch.equal(found[0], expected[0])
    for one, other in zip(found[1:], expected[1:], strict=True):
        assert (one - other).norm() <= bound * other.norm()


def reference_norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * (weight + 1 if plus_one else weight)


@pytest.mark.parametrize("plus_one", [False, True])
def test_the_norms_derivative_is_the_derivative(plus_one: bool) -> None:
    x = torch.randn(3, 5, 8, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, w: rms_norm(x, w, 1e-6, plus_one), (x, weight))
    assert torch.allclose(rms_norm(x, weight, 1e-6, plus_one), reference_norm(x, weight, 1e-6, plus_one))


@pytest.mark.parametrize("kind", ["silu", "gelu", "gelu_tanh"])
def test_the_gates_derivative_is_the_derivative(kind: str) -> None:
    gate, up = (torch.randn(4, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.autograd.gradcheck(lambda g, u: swiglu(g, u, kind), (gate, up))


SIZES: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64,
}  # fmt: skip
FAMILIES = {
    "mistral": lambda: transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES)),
    "qwen2": lambda: transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**SIZES)),
    "qwen3": lambda: transformers.Qwen3ForCausalLM(transformers.Qwen3Config(**SIZES, head_dim=8)),
    "gemma": lambda: transformers.GemmaForCausalLM(transformers.GemmaConfig(**SIZES, head_dim=8)),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("packed", [False, True], ids=["one-document", "packed"])
def test_other_families_are_lean_too_and_keep_documents_apart(family: str, packed: bool) -> None:
    ids = rows(2, 16) % 60 + 2
    positions = (torch.arange(16) % (7 if packed else 16)).expand(2, 16)
    losses = []
    for lean in (False, True):
        torch.manual_seed(0)
        model = FAMILIES[family]().train()
        if lean:
            assert {"norms", "gated MLPs", "grouped attentions"} == make_lean(model).keys()
        loss = model(input_ids=ids, position_ids=positions, labels=ids, use_cache=False).loss
        loss.backward()
        losses.append([loss.detach(), *(p.grad for p in model.parameters())])
    for one, other in zip(*losses, strict=True):
        assert (one - other).norm() <= 2e-6 * other.norm()


def test_what_computes_something_else_is_left_as_it_is() -> None:
    class OddRMSNorm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.eps = nn.Parameter(torch.ones(8)), 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.abs().mean(-1, keepdim=True) + self.eps)

    class OddMLP(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate_proj, self.up_proj, self.down_proj = (nn.Linear(8, 8) for _ in range(3))
            self.act_fn = nn.SiLU()

        def forward(self, x: Tensor) -> Tensor:
            return self.down_proj(self.act_fn(self.gate_proj(x)) + self.up_proj(x))

    assert not lean_norm(OddRMSNorm()) and not lean_mlp(OddMLP())
