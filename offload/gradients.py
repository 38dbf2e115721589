"""Gradients that leave the device in backward, as soon as each is complete, and come back with their states to step.

    backward   ...| makes g3 | makes g2 | makes g1 |      step, window 1     |  window 2
    leaving              g4  |    g3    |    g2    | g1
    coming                                           window 1 | window 2 |

A hook on each parameter copies its gradient to host memory on the stream that goes out (`streams.py`) and frees it two
gradients later; over micro-steps they add up on the host, on a thread, in their own dtype: the same additions that
autograd makes, so the same bits. Norms are taken there; the factor that clips is multiplied in on arrival.
Of a model alone, or of FSDP2's shards; DDP keeps gradients in buckets, which nothing frees.
Specification: ZeRO-Offload; Deep Optimizer States' asynchronous flush (specs: where all of its gain comes from).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import _disable_current_modes

from offload.pool import Buffer, HostPool, Ledger
from offload.streams import DONE, Copies, Ticket
from parallel.dtensor import local, with_part
from parallel.spread import norms_of

FLYING = 2
"""Gradients whose copy out may be under way while backward makes the next."""


@dataclass
class Flying:
    """A gradient between its backward and its host memory."""

    p: Tensor
    near: Tensor | None
    ticket: Ticket
    added: Buffer | None
    """Where it arrives, if it is to be added to one that came before."""


class GradientsAway:
    """The gradients of some parameters, in host memory between backward and step.

    Args:
        parameters: trainable ones, in the order in which norms are told.
        device: where they are made and stepped with.
    """

    def __init__(self, parameters: Sequence[Tensor], device: torch.device, copies: Copies) -> None:
        self.ledger = Ledger()
        self._parameters, self._device, self._copies = list(parameters), device, copies
        self._pool = HostPool(pinned=device.type == "cuda")
        self._away: dict[Tensor, Buffer] = {}
        self._like: dict[Tensor, tuple[torch.Size, torch.dtype]] = {}
        self._flying: deque[Flying] = deque()
        self._adding: deque[tuple[Ticket, Buffer]] = deque()
        self._coming: dict[Tensor, tuple[Tensor, Ticket]] = {}
        self._factor: Tensor | None = None
        self._factors: dict[Tensor, Tensor] = {}
        for p in self._parameters:
            p.register_post_accumulate_grad_hook(self._leave)  # type: ignore[no-untyped-call]

    def __contains__(self, p: Tensor) -> bool:
        return p in self._away

    @torch.no_grad()
    def _leave(self, p: Tensor) -> None:
        """Send a complete gradient on its way, and free the one before the last."""
        assert p.grad is not None
        grad = local(p.grad)
        if grad.layout is not torch.strided or not grad.is_contiguous() or not grad.numel():
            return  # it stays, and steps from where it is
        near = grad.detach().view(-1).view(torch.uint8)
        buffer = self._pool.take(near.numel(), fake=isinstance(near, FakeTensor))
        assert buffer is not None, "the pool has no budget"
        ticket = DONE if buffer.memory is None else self._copies.out(near, buffer.memory)
        self.ledger.hold("host", near.numel())
        self.ledger.out["host"] += near.numel()
        before = self._away.setdefault(p, buffer)
        self._like[p] = (grad.shape, grad.dtype)
        self._flying.append(Flying(p, near, ticket, None if before is buffer else buffer))
        p.grad = None
        del grad, near
        self._land(FLYING)

    def settle(self) -> None:
        """Free the last gradients here: backward is done."""
        self._land()

    def _land(self, but: int = 0) -> None:
        while len(self._flying) > but:
            flying = self._flying.popleft()
            flying.ticket.wait()
            flying.near = None
            if flying.added is not None:
                self._add(flying.p, flying.added, flying.ticket)

    def _add(self, p: Tensor, buffer: Buffer, copied: Ticket) -> None:
        total, dtype = self._away[p], self._like[p][1]
        ticket = DONE
        if buffer.memory is not None:

            def add() -> None:
                copied.finish()
                values(total, dtype).add_(values(buffer, dtype))

            ticket = self._copies.beside(add)
        self._adding.append((ticket, buffer))
        self._sum_up(FLYING)

    def _sum_up(self, but: int = 0) -> None:
        while len(self._adding) > but:
            ticket, buffer = self._adding.popleft()
            ticket.wait()
            self._give(buffer)

    def _give(self, buffer: Buffer) -> None:
        self._pool.give(buffer)
        self.ledger.hold("host", -buffer.nbytes)

    # --- between backward and step ---

    @torch.no_grad()
    def norms(self) -> Tensor:
        """2-norm of this rank's part of each gradient there is, here or away; (count,) on the device."""
        self.arrive_all()
        held = [p for p in self._parameters if p in self._away or p.grad is not None]
        if any(self._away[p].memory is None for p in held if p in self._away):  # on fake tensors
            return torch.ones(len(held), device=self._device)
        with _disable_current_modes():  # of the host: no part of what is counted on the device
            parts = [self._part(p) for p in held]
            if all(part.device == parts[0].device for part in parts):
                found = norms_of(parts) if parts else torch.zeros(1)
            else:
                found = torch.cat([norms_of([part]).cpu() for part in parts])
            dtype, numbers = found.dtype, found.tolist()
        return torch.tensor(numbers, dtype=dtype, device=self._device)

    def _part(self, p: Tensor) -> Tensor:
        """This rank's part of a gradient, wherever it is."""
        if p in self._away:
            shape, dtype = self._like[p]
            return values(self._away[p], dtype).view(shape)
        assert p.grad is not None
        return local(p.grad)

    @torch.no_grad()
    def scale(self, factors: Tensor) -> None:
        """Multiply all gradients by a scalar, or each by its own of (count,), in the order of `norms`."""
        held = [p for p in self._parameters if p in self._away or p.grad is not None]
        for index, p in enumerate(held):
            factor = factors if factors.dim() == 0 else factors[index]
            if p in self._away:
                self._factors[p] = factor
            else:
                local(p.grad).mul_(factor)  # type: ignore[arg-type]

    def clear(self) -> None:
        """Forget all gradients that are away."""
        self.arrive_all()
        for p in list(self._away):
            self.release(p)

    def arrive_all(self) -> None:
        """Wait, on the host, until all that left is in host memory and added up."""
        self._land()
        self._sum_up()
        if self._device.type == "cuda" and self._away:
            torch.cuda.synchronize(self._device)  # the reader is the host, which waits for no copy so far

    # --- the step ---

    def fetch(self, p: Tensor) -> None:
        """Begin to bring a gradient back."""
        buffer = self._away.get(p)
        if buffer is None or p in self._coming:
            return
        shape, dtype = self._like[p]
        near = torch.empty(shape, dtype=dtype, device=self._device)
        raw = near.view(-1).view(torch.uint8)
        self._coming[p] = (near, DONE if buffer.memory is None else self._copies.back(buffer.memory, raw))
        self.ledger.back["host"] += buffer.nbytes

    @torch.no_grad()
    def arrive(self, p: Tensor) -> None:
        """Make it `p.grad` again, for all that follows."""
        if p not in self._coming:
            return
        near, ticket = self._coming.pop(p)
        ticket.wait()
        if p in self._factors:
            near.mul_(self._factors.pop(p))
        p.grad = with_part(p, near) if isinstance(p, DTensor) else near

    @torch.no_grad()
    def there(self, p: Tensor) -> Tensor:
        """This rank's part of a gradient that is away, where it lies, as it is to be stepped with; once all arrived."""
        part = self._part(p)
        if p in self._factors:
            part.mul_(self._factors.pop(p).cpu())
        return part

    def release(self, p: Tensor) -> None:
        """Free a gradient, here and there."""
        if p in self._away:
            self._coming.pop(p, None)
            self._factors.pop(p, None)
            p.grad = None
            self._give(self._away.pop(p))


def values(buffer: Buffer, dtype: torch.dtype) -> Tensor:
    """Host memory as numbers, (count,)."""
    memory = buffer.memory
    assert memory is not None
    flat = memory if isinstance(memory, Tensor) else torch.from_numpy(memory)
    return flat.view(dtype)
