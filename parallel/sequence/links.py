"""How the ranks of a sequence group hand tensors to each other, and how many bytes that was.

Everybody knows what comes and how large it is (`Layout`), so nothing but the tensors is sent. `Alone` is a group of
one; `Links` a real one; `PretendedLinks` one of which no other rank exists, for predictions: what comes is empty.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.dtensor import all_gather, reduce_scatter

Shape = Sequence[int]


class Pending:
    """Tensors on their way. Their buffers, and those sent, are kept until they are waited for."""

    def __init__(self, tensors: list[Tensor], works: Sequence[dist.Work] = (), sent: Sequence[Tensor] = ()) -> None:
        self._tensors, self._works, self._sent = tensors, works, sent

    def wait(self) -> list[Tensor]:
        """Return what has come; on CUDA the current stream waits, not the host."""
        for work in self._works:
            work.wait()
        self._works = self._sent = ()
        return self._tensors


class Connection(Protocol):
    """One rank's way to the others of its group."""

    count: int
    index: int
    sent: int
    """Bytes this rank has sent to others so far."""

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        """Begin to send tensors to rank `to`, and to fill the tensors `coming` with what `source` sends; None: nothing
        to send, or to receive."""
        ...

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        """Send flat part i to rank i; return the flat parts that all ranks sent here, `lengths` values each."""
        ...

    def all_gather(self, tensor: Tensor) -> Pending:
        """Begin to send a tensor, as large on every rank, to all others; what comes is one (count, *shape)."""
        ...

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        """Send part i of (count, *shape) to rank i; return the sum (*shape) of the parts that all ranks sent here."""
        ...


class Alone:
    """A group of one, which never sends."""

    count, index, sent = 1, 0, 0

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        raise AssertionError("a rank alone has nobody to send to")

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        return list(parts)

    def all_gather(self, tensor: Tensor) -> Pending:
        return Pending([tensor[None]])

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        return parts[0]


class Links:
    """A process group of torch's."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.count, self.index, self.sent = group.size(), group.rank(), 0

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        sent = [tensor.contiguous() for tensor in send]
        # As one batch: sends and receives that wait for each other in a circle would otherwise deadlock on NCCL.
        group, operations = self._group, []
        if to is not None:
            operations += [dist.P2POp(dist.isend, tensor, group=group, group_peer=to) for tensor in sent]
            self.sent += sum(tensor.nbytes for tensor in sent)
        if source is not None:
            operations += [dist.P2POp(dist.irecv, tensor, group=group, group_peer=source) for tensor in coming]
        works = dist.batch_isend_irecv(operations) if operations else []
        return Pending(list(coming), works, sent)

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        sent = torch.cat(list(parts))
        received = sent.new_empty(sum(lengths))
        dist.all_to_all_single(received, sent, list(lengths), [part.numel() for part in parts], group=self._group)
        self.sent += sent.nbytes - parts[self.index].nbytes
        return list(torch.split(received, list(lengths)))

    def all_gather(self, tensor: Tensor) -> Pending:
        sent = tensor.contiguous()
        coming = sent.new_empty(self.count, *sent.shape)
        # flat, as gloo has it
        work = all_gather(coming.view(-1), sent.view(-1), group=self._group, async_op=True)
        self.sent += (self.count - 1) * sent.nbytes
        return Pending([coming], [work], [sent])

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        found = parts.new_empty(parts.shape[1:])
        reduce_scatter(found.view(-1), parts.contiguous().view(-1), group=self._group)
        self.sent += (self.count - 1) * found.nbytes
        return found


class PretendedLinks:
    """Rank 0 of `count`, of which no other exists: what it receives has sizes and lifetimes, and no values."""

    def __init__(self, count: int) -> None:
        self.count, self.index, self.sent = count, 0, 0

    def exchange(self, send: Sequence[Tensor], to: int | None, coming: Sequence[Tensor], source: int | None) -> Pending:
        sent = [tensor.contiguous() for tensor in send]
        self.sent += sum(tensor.nbytes for tensor in sent) if to is not None else 0
        return Pending(list(coming), (), sent)

    def all_to_all(self, parts: Sequence[Tensor], lengths: Sequence[int]) -> list[Tensor]:
        sent = torch.cat(list(parts))
        self.sent += sent.nbytes - parts[self.index].nbytes
        return list(torch.split(sent.new_empty(sum(lengths)), list(lengths)))

    def all_gather(self, tensor: Tensor) -> Pending:
        sent = tensor.contiguous()
        self.sent += (self.count - 1) * sent.nbytes
        return Pending([sent.new_empty(self.count, *sent.shape)], (), [sent])

    def reduce_scatter(self, parts: Tensor) -> Tensor:
        found = parts.new_empty(parts.shape[1:])
        self.sent += (self.count - 1) * found.nbytes
        return found
