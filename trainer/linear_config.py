"""What a LLaMA with linear attention is made of: which layers are linear, and how their states fade.

Kinds, by the names of LASP-2's table (arXiv:2502.07563), differ in what is left of a state at each token:

| kind | a |
|---|---|
| basic | 1: Katharopoulos et al. 2020, arXiv:2006.16236 |
| lightning | exp(-2^(-8 h / n) (1 - l / L)) of head h = 1..n in layer l of L: as MiniMax-01 has it, arXiv:2501.08313 |
| retention | 1 - 2^(-5 - h) of head h = 0..n-1: Sun et al. 2023, arXiv:2307.08621 |
| gated | sigmoid(x W + b)^(1/16) of each token and head: Yang et al. 2024, arXiv:2312.06635, a head at a time |

An exported model takes this file along.
"""

from typing import Any

import torch
from huggingface_hub.dataclasses import strict
from torch import Tensor
from transformers.models.llama.configuration_llama import LlamaConfig

KINDS = ("basic", "lightning", "retention", "gated")
LINEAR, SOFTMAX = "linear_attention", "full_attention"
"""transformers' names of the layers."""


@strict
class LinearLlamaConfig(LlamaConfig):  # type: ignore[misc]
    """LLaMA's, and what its linear layers are."""

    model_type = "linear_llama"

    linear_attention: str = "basic"
    """One of KINDS."""
    layer_types: list[str] | None = None
    """Of each layer, linear_attention or full_attention; default: all linear."""

    def __post_init__(self, **kwargs: Any) -> None:
        if self.layer_types is None:
            self.layer_types = [LINEAR] * self.num_hidden_layers
        super().__post_init__(**kwargs)

    def validate_architecture(self) -> None:
        super().validate_architecture()
        if self.linear_attention not in KINDS:
            raise ValueError(f"linear_attention={self.linear_attention!r}: must be one of {', '.join(KINDS)}")
        others = sorted(set(self.layer_types or ()) - {LINEAR, SOFTMAX})
        if others:
            raise ValueError(f"layer_types: {', '.join(others)} are not known; use {LINEAR} and {SOFTMAX}")


def kinds(config: LinearLlamaConfig) -> list[str]:
    """LINEAR or SOFTMAX for each layer."""
    return config.layer_types or []


def head_decays(kind: str, heads: int, layer: int, layers: int, device: torch.device) -> Tensor | None:
    """Logarithms of the decays of key heads, (heads,) fp64; None where there is none, or one of each token."""
    head = torch.arange(heads, dtype=torch.float64, device=device)
    if kind == "retention":
        return torch.log1p(-torch.exp2(-5 - head))
    if kind == "lightning":
        return -torch.exp2(-8 * (head + 1) / heads) * (1 - layer / layers)
    return None
