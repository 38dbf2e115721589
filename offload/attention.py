"""A recomputed module's attention over rows that several ranks share, which is not computed, or sent, a second time.

What backward needs of attention beside queries, keys and values is its output and a sum a row of scores: one hidden
state. A module's first run holds them, and its second takes them: all else runs again, queries, keys and values too
(DistFlashAttn, arXiv:2310.03294). What other kernels are to keep is torch's selective checkpointing's business, which
counts operators, of which attention has fewer the second time: it does not see those inside.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _pop_mode, _push_mode

from parallel.sequence.once import Attended, kept_by


class Results:
    """Output and log-sum-exp of each attention of a module's first run, in the order they were computed.

    Args:
        pack: takes a tensor into keeping when the run is over.
        unpack: gives back what `pack` was given.
    """

    def __init__(self, pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
        self._pack, self._unpack = pack, unpack
        self._fresh: list[tuple[Tensor, int]] = []
        self._packed: list[Any] = []

    def note(self, out: Tensor, lse: Tensor) -> None:
        self._fresh += [(x.detach(), x._version) for x in (out, lse)]

    def close(self) -> None:
        """The first run is over, and with it whatever could write into its results.

        Raises:
            RuntimeError: something did.
        """
        if any(tensor._version != version for tensor, version in self._fresh):
            raise RuntimeError(
                "the model writes into attention's output, which backward needs as it was; use "
                "activations.attention=recompute"
            )
        self._packed = [self._pack(tensor) for tensor, _ in self._fresh]
        self._fresh = []

    def __getitem__(self, index: int) -> Attended:
        # Not the tensors themselves: autograd notes on what a function returns where it comes from.
        out, lse = (self._unpack(packed).detach() for packed in self._packed[2 * index : 2 * index + 2])
        return out, lse


class Run(AbstractContextManager[None]):
    """One run of the module.

    Args:
        other: what else is to be entered; if a mode, one that shall not see attention's operators.
    """

    def __init__(self, results: Results, other: AbstractContextManager[Any]) -> None:
        self.results, self._other = results, other

    def attend(self, compute: Callable[[], Attended]) -> Attended:
        raise NotImplementedError

    def __enter__(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(self._other)
        self._stack.enter_context(kept_by(self.attend))

    def __exit__(self, *error: Any) -> None:
        self._stack.__exit__(*error)

    def unseen(self) -> AbstractContextManager[None]:
        return without(self._other) if isinstance(self._other, TorchDispatchMode) else nullcontext()


class FirstRun(Run):
    """Holds what attention gives."""

    def attend(self, compute: Callable[[], Attended]) -> Attended:
        with self.unseen():
            out, lse = compute()
            self.results.note(out, lse)
        return out, lse

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        if error[0] is None:
            with torch.no_grad():
                self.results.close()


class SecondRun(Run):
    """Gives what the first one holds; as often as backward asks, each time from the beginning."""

    def __enter__(self) -> None:
        self._next = 0
        super().__enter__()

    def attend(self, compute: Callable[[], Attended]) -> Attended:
        with self.unseen():
            found = self.results[self._next]
        self._next += 1
        return found


@contextmanager
def without(mode: TorchDispatchMode) -> Iterator[None]:
    """Take `mode` from the stack of those that see operators, and leave the others."""
    above: list[TorchDispatchMode] = []
    while (top := _pop_mode()) is not mode:
        above.append(top)
    for each in reversed(above):
        _push_mode(each)
    try:
        yield
    finally:
        for _ in above:
            _pop_mode()
        for each in (mode, *reversed(above)):
            _push_mode(each)
