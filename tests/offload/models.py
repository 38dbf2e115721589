"""Small models for tests of activations, and one step of them."""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from offload.activations import Activations
from offload.config import ActivationsConfig, Fate
from offload.streams import Copies
from trainer.adapt import blocks

LAYERS, HIDDEN = 4, 32


def llama(dtype: torch.dtype = torch.float32, **changed: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": HIDDEN, "intermediate_size": 80, "num_hidden_layers": LAYERS, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "attention_dropout": 0.2,
    }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**sizes | changed)).to(dtype).train()


def managed(model: Any, *rules: str, delay: float = 0.0, dedupe: bool = True, **options: Any) -> Activations:
    """Put a policy on `model`; copies are held back for `delay` seconds each."""
    options = {"min_bytes": 0, "fate": Fate.keep, "rules": list(rules)} | options
    copies = Copies(model.device, delay=delay)
    return Activations(ActivationsConfig(**options), blocks(model), model.device, copies=copies, dedupe=dedupe)


def rows(count: int = 2, length: int = 24) -> Tensor:
    return torch.randint(0, 64, (count, length), generator=torch.Generator().manual_seed(7))


def step(model: Any, ids: Tensor | None = None) -> list[Tensor]:
    """Loss and gradients of one forward and backward, dropout as seeded."""
    ids = (rows() if ids is None else ids).to(model.device)
    torch.manual_seed(1)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
