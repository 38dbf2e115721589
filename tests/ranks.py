"""Run a function on several gloo ranks of this machine, as a launcher would start them."""

import os
import socket
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.multiprocessing as mp

NEEDED = (
    *("tests.composition.case", "trainer.cli.train", "transformers.models.llama.modeling_llama"),
    *("datasets", "matplotlib.backends.backend_agg", "matplotlib.figure"),
)
"""What a run imports."""


def fork_server() -> Any:
    """Return a context whose processes are forked from one that has imported what all of them need.

    Each process's own imports would take 5 s of processor, which is more than most of them work. They get the
    environment the server began with: give them yours. On a machine with a GPU they do import for themselves: what has
    once asked for devices, as some packages do when imported, cannot use them in a fork.
    """
    if torch.cuda.is_available():
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(list(NEEDED))
    return context


def enter(environment: Mapping[str, str], rank: int, count: int, port: int) -> None:
    """Take an environment, and a place in it as torchrun would set it."""
    os.environ.clear()
    os.environ.update(environment)
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(count),
        LOCAL_WORLD_SIZE=str(count),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
    )


def free_port() -> int:
    """Return a TCP port nobody listens on just now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _entry(place: tuple[Any, ...], function: Callable[..., Any], args: tuple[Any, ...], results: Any) -> None:
    enter(*place)
    rank = place[1]
    try:
        results.put((rank, function(*args), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))
        raise


def on_ranks(count: int, function: Callable[..., Any], *args: Any, timeout: float = 240.0) -> list[Any]:
    """Return what `function(*args)` returns on each of `count` ranks, in rank order.

    The environment is as torchrun sets it; the function itself joins the process group. Results are pickled.

    Raises:
        RuntimeError: with the traceback of the first rank that failed.
    """
    context = fork_server()
    results = context.SimpleQueue()
    port = free_port()
    processes = [
        context.Process(
            target=_entry, args=((dict(os.environ), rank, count, port), function, args, results), daemon=True
        )
        for rank in range(count)
    ]
    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout
    found: dict[int, Any] = {}
    errors: list[str] = []
    try:
        while len(found) + len(errors) < count and not errors:
            if results.empty():
                if not any(process.is_alive() for process in processes):
                    break
                time.sleep(0.02)
                if time.monotonic() > deadline:
                    raise TimeoutError(f"ranks {sorted(set(range(count)) - found.keys())} did not finish")
                continue
            rank, value, error = results.get()
            if error:
                errors.append(f"rank {rank}:\n{error}")
            else:
                found[rank] = value
    finally:
        for process in processes:
            process.join(10 if not errors else 1)
            if process.is_alive():
                process.terminate()
    if errors or len(found) < count:
        raise RuntimeError("\n".join(errors) or f"a rank died; finished: {sorted(found)}")
    return [found[rank] for rank in range(count)]
