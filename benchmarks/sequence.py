"""What attention over split rows costs: each strategy beside DeepSpeed's Ulysses and torch's context_parallel.

    python -m benchmarks.sequence                       # ranks of this machine over gloo: seconds forward and backward
    python -m benchmarks.sequence --blocks 32768 65536  # one device: attention in a ring's blocks against one call

The first asks what a layer's attention takes on 2 and 4 ranks that share a causal row, with the bytes each strategy
says it sends; all ranks share this machine's cores and its memory, so figures compare strategies and nothing else.
`whole` is one process with the whole row and as many threads as ranks, `whole, linear` the same of linear attention.
The second asks what merging by log-sum-exp costs: the tiles of every member of a ring, one after the other on one
device, over torch's attention in one call.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.ranks import on_ranks
from benchmarks.report import print_table, spread, write_result
from parallel.config import ParallelConfig, SequenceKind
from parallel.launch import World, connected
from parallel.sequence.blockwise import see, see_backward
from parallel.sequence.cost import Decay, Shape
from parallel.sequence.group import make_strategy
from parallel.sequence.layout import Cut, Layout
from parallel.sequence.linear import linear_attention
from parallel.sequence.strategy import WithStates

ROUNDS = 5
Step = Callable[[], None]


def inputs(heads: int, keys: int, tokens: int, width: int, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """q, k, v and the output's gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, count, tokens, width) for count in (heads, keys, keys, heads)]
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def timed(step: Step, wait: Step) -> list[float]:
    """Wall seconds of each of some rounds after a first."""
    found = []
    for _ in range(ROUNDS + 1):
        wait()
        began = time.perf_counter()
        step()
        wait()
        found.append(time.perf_counter() - began)
    return found[1:]


def forward_backward(attend: Callable[[Tensor, Tensor, Tensor], Tensor], tensors: list[Tensor]) -> Step:
    q, k, v, grad = tensors

    def step() -> None:
        q.grad = k.grad = v.grad = None
        attend(q, k, v).backward(grad)  # type: ignore[no-untyped-call]

    return step


def ours(kind: SequenceKind, world: World, shape: Shape) -> tuple[Step, dict[str, Any]]:
    cfg = ParallelConfig(sequence=kind, ulysses_degree=2 if kind is SequenceKind.usp else None)
    strategy = make_strategy(world, cfg, heads=shape.heads, key_heads=shape.key_heads)
    assert strategy is not None
    layout, cost = Layout(strategy.cut, shape.length, ((0,),)), strategy.cost(shape)
    tokens = layout.held(strategy.index)
    tensors = inputs(shape.heads, shape.key_heads, tokens, shape.width, world.device, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return strategy.attend(q, k, v, layout, causal=True, scale=shape.width**-0.5)

    return forward_backward(attend, tensors), {"sent_forward": cost.forward, "sent_backward": cost.backward}


def deepspeed_ulysses(world: World, shape: Shape) -> tuple[Step, dict[str, Any]]:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.sequence.layer import DistributedAttention

    deepspeed.init_distributed(dist_backend="gloo")

    def local(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    layer: Any = DistributedAttention(local, dist.group.WORLD, scatter_idx=2, gather_idx=1)
    tokens = shape.length // world.process_count
    tensors = inputs(shape.heads, shape.key_heads, tokens, shape.width, world.device, torch.float32)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
        out: Tensor = layer(q, k, v, 0)
        return out.transpose(1, 2)

    return forward_backward(attend, tensors), {}


def torch_context_parallel(world: World, shape: Shape) -> tuple[Step, dict[str, Any]]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel

    mesh = init_device_mesh(world.device.type, (world.process_count,))

    def step() -> None:
        q, k, v, _ = inputs(shape.heads, shape.heads, shape.length, shape.width, world.device, torch.float32)
        with context_parallel(mesh, buffers=[q, k, v], buffer_seq_dims=[2, 2, 2], no_restore_buffers={q, k, v}):
            scaled_dot_product_attention(q, k, v, is_causal=True).sum().backward()  # type: ignore[no-untyped-call]

    step()  # raises where it does not run
    return step, {}


def states(world: World, shape: Shape) -> tuple[Step, dict[str, Any]]:
    """Linear attention of the same heads, by LASP-2's gather of states."""
    cfg = ParallelConfig(sequence=SequenceKind.lasp2)
    strategy = make_strategy(world, cfg, heads=shape.heads, key_heads=shape.key_heads, linear=True)
    assert isinstance(strategy, WithStates)
    layout, cost = Layout(strategy.cut, shape.length, ((0,),)), strategy.state_cost(shape, Decay.none)
    tensors = inputs(
        shape.heads, shape.key_heads, layout.held(strategy.index), shape.width, world.device, torch.float32
    )
    positions = layout.take(torch.arange(shape.length)[None], strategy.index)

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return strategy.recur(q, k, v, positions, None, layout, causal=True)

    return forward_backward(attend, tensors), {"sent_forward": cost.forward, "sent_backward": cost.backward}


ARMS: dict[str, Callable[[World, Shape], tuple[Step, dict[str, Any]]]] = {
    "ulysses": lambda world, shape: ours(SequenceKind.ulysses, world, shape),
    "ring": lambda world, shape: ours(SequenceKind.ring, world, shape),
    "usp": lambda world, shape: ours(SequenceKind.usp, world, shape),
    "lightseq": lambda world, shape: ours(SequenceKind.lightseq, world, shape),
    "lasp2, softmax layer": lambda world, shape: ours(SequenceKind.lasp2, world, shape),
    "lasp2, linear layer": states,
    "deepspeed ulysses": deepspeed_ulysses,
    "torch context_parallel": torch_context_parallel,
}


def on_rank(shape: Shape) -> dict[str, Any]:
    """Seconds of each arm on this rank; of one that does not run here, why."""
    found: dict[str, Any] = {}
    with connected(ParallelConfig(sequence=SequenceKind.ring), "cpu", threads=1) as world:
        for name, make in ARMS.items():
            try:
                step, told = make(world, shape)
            except Exception as error:  # another package's, of any kind
                found[name] = {"left_out": f"{type(error).__name__}: {str(error).splitlines()[0][:160]}"}
                continue
            found[name] = {"seconds": timed(step, world.barrier), **told}
    return found


def strategies(ranks: int, shape: Shape) -> dict[str, Any]:
    """Each arm on `ranks` gloo ranks; of each round the slowest rank's seconds."""
    found = on_ranks(ranks, on_rank, shape)
    arms: dict[str, Any] = {
        "whole": {"seconds": spread(whole(ranks, shape, softmax))},
        "whole, linear": {"seconds": spread(whole(ranks, shape, linear))},
    }
    for name, first in found[0].items():
        if "left_out" in first:
            arms[name] = first
            continue
        slowest = [max(each) for each in zip(*(report[name]["seconds"] for report in found), strict=True)]
        arms[name] = first | {"seconds": spread(slowest)}
    return arms


def softmax(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)


def linear(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return linear_attention(q, k, v, torch.arange(q.shape[2])[None])


def whole(threads: int, shape: Shape, attend: Callable[[Tensor, Tensor, Tensor], Tensor]) -> list[float]:
    torch.set_num_threads(threads)
    tensors = inputs(shape.heads, shape.key_heads, shape.length, shape.width, torch.device("cpu"), torch.float32)
    return timed(forward_backward(attend, tensors), lambda: None)


def blocks(length: int, members: int, heads: int, keys: int, width: int, device: torch.device) -> dict[str, Any]:
    """Forward and backward of one causal row: in one call, and in the tiles of all members of a ring."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    q, k, v, grad = inputs(heads, keys, length, width, device, dtype)
    layout, scale = Layout(Cut(ring=members), length, ((0,),)), width**-0.5
    parts = [
        [layout.take(x.detach().transpose(1, 2), member).transpose(1, 2).contiguous() for x in (q, k, v, grad)]
        for member in range(members)
    ]

    def ring() -> None:
        for asking, (mine, _, _, d_out) in enumerate(parts):
            out = torch.zeros_like(mine, dtype=torch.float32)
            lse = torch.full(mine.shape[:-1], float("-inf"), device=device)
            tiles = [layout.tiles(asking, (asking - hop) % members, True) for hop in range(members)]
            others = [parts[(asking - hop) % members] for hop in range(members)]
            for some, (_, keys_there, values_there, _) in zip(tiles, others, strict=True):
                see(mine, keys_there, values_there, some, out, lse, scale)
            narrow = out.to(dtype)
            dq = torch.zeros_like(out)
            for some, (_, keys_there, values_there, _) in zip(tiles, others, strict=True):
                dk, dv = (torch.zeros_like(x, dtype=torch.float32) for x in (keys_there, values_there))
                see_backward(d_out, mine, keys_there, values_there, narrow, lse, some, dq, dk, dv, scale)

    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    once, split = timed(forward_backward(softmax, [q, k, v, grad]), wait), timed(ring, wait)
    over = statistics.median(split) / statistics.median(once) - 1
    return {
        "length": length,
        "one_call": spread(once),
        "blocks": spread(split),
        "overhead_percent": round(100 * over, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="*", default=[2, 4])
    parser.add_argument("--length", type=int, default=4096, help="tokens of a row (default 4096)")
    parser.add_argument("--blocks", type=int, nargs="*", metavar="LENGTH", help="one device: these lengths")
    parser.add_argument("--members", type=int, default=4, help="of the ring that --blocks takes apart")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.blocks is not None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        sizes = (32, 8, 128) if device.type == "cuda" else (8, 2, 64)
        rows = [blocks(length, args.members, *sizes, device) for length in args.blocks or [1024]]
        print_table(
            ["tokens", "one call, s", "blocks, s", "over, %"],
            [
                [
                    str(r["length"]),
                    f"{r['one_call']['median']:.4f}",
                    f"{r['blocks']['median']:.4f}",
                    str(r["overhead_percent"]),
                ]
                for r in rows
            ],
        )
        print("written to", write_result("sequence_blocks", {"members": args.members, "rows": rows}, args.out))
        return
    shape = Shape(1, args.length, 8, 4, 64, 4)
    found = {str(ranks): strategies(ranks, shape) for ranks in args.ranks}
    print_table(
        ["ranks", "arm", "median s", "MiB sent", ""],
        [
            [
                ranks,
                name,
                f"{arm['seconds']['median']:.3f}" if "seconds" in arm else "-",
                f"{(arm['sent_forward'] + arm['sent_backward']) / 2**20:.1f}" if "sent_forward" in arm else "",
                arm.get("left_out", ""),
            ]
            for ranks, arms in found.items()
            for name, arm in arms.items()
        ],
    )
    print("written to", write_result("sequence", {"shape": vars(shape), "ranks": found}, args.out))


if __name__ == "__main__":
    main()
