"""Modules that run again in backward: whole, but for chosen results, or a piece of the tokens at a time."""

import functools
from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from offload.attention import FirstRun, Results, SecondRun
from offload.policy import Region

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]


def recompute(
    region: Region, around: Callable[[], AbstractContextManager[None]], results: Callable[[], Results]
) -> None:
    """Make a module keep its inputs (and the results that its region names) and run again in backward.

    The random numbers of its dropout are drawn again. Hooks on the module stay outside: FSDP gathers its weights for
    backward as it does without.

    Args:
        around: makes a context in which the inputs are saved.
        results: makes what holds the results of attention over rows that ranks share, where the region keeps them.
    """
    inner = region.module.forward
    options: dict[str, Any] = {}
    if region.keep or region.alternate or region.shared_attention:
        options["context_fn"] = functools.partial(contexts, region, results)

    @functools.wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return inner(*args, **kwargs)
        with around():
            return checkpoint(inner, *args, use_reentrant=False, preserve_rng_state=True, **options, **kwargs)

    region.module.forward = forward


def contexts(region: Region, results: Callable[[], Results]) -> Contexts:
    """Contexts of forward and recomputation that keep what `region` names."""
    selective = selective_contexts(region) if region.keep or region.alternate else (nullcontext(), nullcontext())
    if not region.shared_attention:
        return selective
    held = results()
    return FirstRun(held, selective[0]), SecondRun(held, selective[1])


def selective_contexts(region: Region) -> Contexts:
    """Those of torch, for results of single kernels."""
    seen: dict[tuple[bool, str], int] = defaultdict(int)
    keep, alternate = set(region.keep), set(region.alternate)

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        packet = getattr(operator, "overloadpacket", None)
        name = packet.__name__ if packet is not None else ""
        # Batched products of a function with a backward of its own are steps inside it, as linear attention's blocks.
        inner = name == "bmm" and not torch.is_grad_enabled()
        if name in alternate and not inner:
            key = (context.is_recompute, name)
            seen[key] += 1
            kept = seen[key] % 2 == 1
        else:
            kept = name in keep
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    found: Contexts = create_selective_checkpoint_contexts(policy)  # type: ignore[no-untyped-call]
    return found


def tile_mlps(blocks: Sequence[tuple[str, nn.Module]], pieces: int) -> None:
    """Make the MLP of every block run in `pieces`.

    Raises:
        ValueError: there is none.
    """
    found = False
    for name, block in blocks:
        for inner, module in block.named_modules():
            if inner.rpartition(".")[2] in ("mlp", "feed_forward", "ffn"):
                tile(f"{name}.{inner}", module, pieces)
                found = True
    if not found:
        raise ValueError(
            f"activations.tile_mlp={pieces}: no module of a block is called mlp, feed_forward or ffn. "
            "Use activations.tile_mlp=1."
        )


def tile(name: str, module: nn.Module, pieces: int) -> None:
    """Make a module that treats each token alike run in `pieces` along the tokens, each again in backward.

    Then no more than one piece of what is wide inside it is alive at once. Results and gradients are the same but for
    the order in which weight gradients are summed.
    """
    inner = module.forward

    def check(out: Any, piece: Tensor) -> Tensor:
        if not isinstance(out, Tensor) or out.shape[:-1] != piece.shape[:-1]:
            raise ValueError(
                f"activations.tile_mlp={pieces}: {name} ({type(module).__name__}) does not give one row for each "
                "token, so its tokens cannot be taken apart. Use activations.tile_mlp=1."
            )
        return out

    @functools.wraps(inner)
    def forward(x: Tensor) -> Tensor:
        parts = x.tensor_split(pieces, dim=-2)
        if not torch.is_grad_enabled():
            return torch.cat([check(inner(part), part) for part in parts], dim=-2)
        outs = [check(checkpoint(inner, part, use_reentrant=False), part) for part in parts]
        return torch.cat(outs, dim=-2)

    module.forward = forward
