"""Where a block that runs again in backward takes attention's results from its first run.

Attention is most of the work of a long row, and its backward needs nothing of a second forward but the output and the
log-sum-exp that the first one had. Who recomputes a block keeps both (`offload.attention`): the rematerialisation-aware
checkpointing of DistFlashAttn, Li et al. 2023, arXiv:2310.03294.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar

from torch import Tensor

Attended = tuple[Tensor, Tensor]
"""Output and log-sum-exp."""
Keeper = Callable[[Callable[[], Attended]], Attended]
"""Given what computes them, has them computed or has them already."""
_keeper: ContextVar[Keeper | None] = ContextVar("keeper", default=None)


def once(compute: Callable[[], Attended]) -> Attended:
    """Return what `compute` returns, or what it returned when this very attention ran before."""
    keeper = _keeper.get()
    return compute() if keeper is None else keeper(compute)


@contextmanager
def kept_by(keeper: Keeper) -> Iterator[None]:
    """Ask `keeper` for every attention inside; in this thread, as each runs its own backward."""
    token = _keeper.set(keeper)
    try:
        yield
    finally:
        _keeper.reset(token)
