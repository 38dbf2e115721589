"""Run a function on several gloo ranks of this machine, as a launcher would start them."""

import os
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def entry(rank: int, ranks: int, port: int, function: Callable[..., Any], args: tuple[Any, ...], found: Any) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))  # fmt: skip
    found[rank] = function(*args)


def on_ranks(ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
    """Return what `function(*args)` returns on each of `ranks` ranks, in their order; it joins the group itself.

    Raises:
        torch.multiprocessing.ProcessRaisedException: with the traceback of the first rank that failed; the others end.
    """
    with mp.get_context("spawn").Manager() as manager:
        found = manager.dict()
        port = 20000 + os.getpid() % 20000
        mp.spawn(entry, (ranks, port, function, args, found), nprocs=ranks)  # type: ignore[no-untyped-call]
        return [found[rank] for rank in range(ranks)]
