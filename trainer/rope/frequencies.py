"""The frequencies that a model turns its queries and keys by: what they have to be, and that they are.

Two of transformers' types choose them by the largest position of whatever batch they see (`dynamic`, `longrope`), and
`dynamic` by that of batches before it too. So what a row gives would depend on the rows beside it, on a resumption, and
on which of a row's tokens a rank holds. Here the length of a row decides, which is the same for all.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from trainer.errors import UserError
from trainer.rope.config import RopeConfig, RopeType, kind_of

BY_LENGTH = ("dynamic", "longrope")
"""Types whose frequencies depend on how long a text is."""


def frequencies(config: Any, label: str | None, length: int | None = None) -> tuple[Tensor, float]:
    """Return the frequencies (pairs,) fp32, and what cosines and sines are multiplied by.

    Args:
        config: of transformers, of the part that reads text.
        label: kind of layer, where each has parameters of its own.
        length: tokens in a row; default: so few that nothing is scaled by length.
    """
    held = config.rope_parameters[label] if label else config.rope_parameters
    if kind_of(held) != "default":
        return ROPE_INIT_FUNCTIONS[kind_of(held)](config, seq_len=length, layer_type=label)  # type: ignore[no-any-return]
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    width = int(head * held.get("partial_rotary_factor", 1.0))
    return 1.0 / (held["rope_theta"] ** (torch.arange(0, width, 2, dtype=torch.float) / width)), 1.0


def rotary(model: nn.Module) -> Iterator[tuple[nn.Module, str | None, Tensor]]:
    """Yield every module that makes angles for text, the kind of layer it makes them for, and its frequencies."""
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        if kinds is None or getattr(module, "config", None) is not text:
            continue
        for label in kinds if isinstance(kinds, dict) else (None,):
            held = getattr(module, f"{label}_inv_freq" if label else "inv_freq", None)
            if isinstance(held, Tensor):
                yield module, label, held


@torch.no_grad()
def pin_length(model: nn.Module, length: int) -> None:
    """Have frequencies that depend on a length be those of rows of `length` tokens, for good.

    Raises:
        UserError: the model takes no notice, and goes on asking how long the batch before it is.
    """
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    for module, label, held in rotary(model):
        kind = module.rope_type[label] if label else module.rope_type  # type: ignore[index]
        if kind not in BY_LENGTH:
            continue
        held.copy_(frequencies(text, label, length)[0])
        # what is said to be unscaled, transformers leaves as it is
        module.rope_type = {**module.rope_type, label: "default"} if label else "default"  # type: ignore[assignment, dict-item]
        if has_values(held) and not is_pinned(module, label, length):
            raise UserError(
                f"{type(model).__name__}: its rotary positions ({kind}) depend on the longest text in a batch, so that "
                "results would change with how rows are split into batches; give model.rope.type=yarn, or another model"
            )


def is_pinned(module: nn.Module, label: str | None, length: int) -> bool:
    """Whether angles of the first positions are the same beside a far one."""
    few = torch.arange(2)[None]
    far = torch.tensor([[0, 1, length - 1]])
    device = next(module.buffers()).device
    x = torch.zeros(1, 1, 1, device=device)
    kind = {} if label is None else {"layer_type": label}
    alone, beside = (module(x, positions.to(device), **kind)[0] for positions in (few, far))
    return torch.equal(alone, beside[:, :2])


def check_heeded(model: nn.Module, rope: RopeConfig) -> None:
    """Hold the model's frequencies against what was asked for.

    Raises:
        UserError: its code does not read `rope_parameters`.
    """
    found = list(rotary(model))
    for _, _, held in found:
        assert held.dtype in (torch.float32, torch.float64), f"frequencies in {held.dtype}: angles would be rounded"
    if rope.type is RopeType.keep or not all(has_values(held) for _, _, held in found):
        return
    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    expected = [(held, frequencies(text, label)[0].to(held)) for _, label, held in found]
    if not found or not all(same(*pair) for pair in expected):
        raise UserError(
            f"model.rope.type={rope.type.value}: {type(model).__name__} does not compute its positions by it; leave "
            "model.rope out, or choose another type"
        )


def same(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.allclose(one, other, rtol=1e-6, atol=0)


def has_values(tensor: Tensor) -> bool:
    return not tensor.is_meta and not isinstance(tensor, FakeTensor)
