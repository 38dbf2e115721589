"""The same bits every time on CUDA, as far as a model's kernels allow it. (On CPU they are the same anyway.)"""

import torch
from torch import nn


def make_deterministic(model: nn.Module, vocab_size: int) -> str | None:
    """Ask torch for deterministic kernels, and try them on `model` with one forward and backward of 12 tokens.

    Strictly, since the memory-efficient attention kernel heeds nothing less. A model with an operator that has no
    deterministic kernel still trains, with a warning instead: a resumed run then equals the uninterrupted one up to
    rounding. Gradients and the random state are left as they were.

    Returns:
        What to tell the user where it could not be had, else None.
    """
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # a debugging aid that costs bandwidth
    torch.use_deterministic_algorithms(True)
    device = next(model.parameters()).device
    ids = (torch.arange(12, device=device) % vocab_size)[None]
    positions = torch.cat([torch.arange(7, device=device), torch.arange(5, device=device)])[None]  # packed: with a mask
    try:
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            model(input_ids=ids, position_ids=positions, use_cache=False).logits.float().sum().backward()
    except RuntimeError as error:
        if "deterministic" not in str(error):
            raise
        torch.use_deterministic_algorithms(True, warn_only=True)
        reason = str(error).splitlines()[0][:160]
        return f"a resumed run will equal an uninterrupted one only up to rounding: {reason}"
    finally:
        model.zero_grad(set_to_none=True)
    return None
