"""The command line, with something that goes wrong on rank 1; `-m tests.trainer.sabotage KIND ...` under a launcher."""

import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from tests.ranks import enter
from trainer.cli.main import main


def die(*_: Any, **__: Any) -> None:
    """As the kernel ends a process that takes too much memory."""
    os.kill(os.getpid(), signal.SIGKILL)


def stall(*_: Any, **__: Any) -> None:
    time.sleep(600)


def fail(*_: Any, **__: Any) -> None:
    raise ValueError("the third row is broken")


def nth(call: int, then: Callable[..., Any], real: Callable[..., Any]) -> Callable[..., Any]:
    """`real`, but for the `call`-th time, which does `then` first."""
    count = 0

    def either(*args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == call:
            then(*args, **kwargs)
        return real(*args, **kwargs)

    return either


def sabotage(kind: str) -> None:
    from trainer.checkpoint.storage import HashingFile, VerifiedReader
    from trainer.data.stream import TrainStream
    from trainer.engines.torch_engine import TorchEngine

    if kind == "nan":
        real, factors = TorchEngine.backward, iter([1.0, 1.0, float("nan")])
        TorchEngine.backward = lambda engine, loss: real(engine, loss * next(factors, 1.0))  # type: ignore[method-assign]
        return
    where: dict[str, tuple[Any, str, int, Callable[..., Any]]] = {
        "killed_in_step": (TorchEngine, "backward", 3, die),
        "killed_in_save": (HashingFile, "close", 1, die),
        "killed_in_load": (VerifiedReader, "read_data", 1, die),
        "stalls": (TorchEngine, "backward", 3, stall),
        "fails": (TrainStream, "__next__", 3, fail),
    }
    owner, name, call, then = where[kind]
    setattr(owner, name, nth(call, then, getattr(owner, name)))


def launched(kind: str, arguments: list[str]) -> NoReturn:
    if os.environ["RANK"] == "1" and kind != "nothing":
        sabotage(kind)
    sys.exit(main(arguments, default="train"))


def command(place: tuple[Any, ...], kind: str, arguments: list[str], log: Path) -> NoReturn:
    """The command line in a process of its own, which goes to `place` (of `tests.ranks.enter`) and writes to `log`."""
    enter(*place)
    for descriptor, path in ((1, os.devnull), (2, log)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), descriptor)
    launched(kind, arguments)


if __name__ == "__main__":
    launched(sys.argv[1], sys.argv[2:])
