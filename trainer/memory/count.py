"""Count every storage that is born or freed while a piece of training runs.

A `TorchDispatchMode` sees each operator's inputs and outputs; a weak reference to each storage says when it is freed,
so nothing lives longer for being counted. Time is the number of samples so far: one a storage-making operator, one
at each border of a phase. A storage counts from the sample of the operator that made it up to, not including, the
first sample after it was freed.

What cannot be seen: scratch memory inside one kernel, and allocations of compiled code. On CUDA the allocator knows
them (`trainer.memory`).
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils._python_dispatch import TorchDispatchMode

from offload.saved import watchers
from trainer.memory.operators import aten, makes_nothing, opens_up, patched, sums_gradients
from trainer.memory.record import Record, Saved, unpack
from trainer.memory.storages import (
    GRADIENTS,
    STATES,
    WEIGHTS,
    WORKSPACE,
    gradient_tensors,
    plain_tensors,
    state_tensors,
    weight_tensors,
)


class StorageCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records the life of every storage on one device.

    Args:
        model: its parameters and buffers are weights, their `.grad` gradients.
        optimizer: the tensors in its `.state` are states.
        device: storages elsewhere are not counted. Fake tensors count for the device they claim.
    """

    supports_higher_order_operators = True

    def __init__(self, model: nn.Module, optimizer: Optimizer, device: torch.device):
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        self.records: list[Record] = []
        self._model, self._optimizer, self._device = model, optimizer, device
        self._parameters = list(model.parameters())  # walking the modules takes longer than looking at the tensors
        first = next((plain for p in self._parameters for plain in plain_tensors(p)), None)
        self._fake_mode = getattr(first, "fake_mode", None)
        self._sharded = any(isinstance(parameter, DTensor) for parameter in self._parameters)
        self._cut = any(isinstance(p, DTensor) for group in optimizer.param_groups for p in group["params"])
        self._known: dict[int, Record] = {}
        # Storages are freed on any thread, between any two instructions: the two lists take notice with one atomic
        # append, and the next sample works them off.
        self._freed: list[Record] = []
        self._released: list[list[Record]] = []
        self._sums: list[tuple[Record, Record]] = []

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Leave compiled code compiled: else counting a step would run it eagerly, with other rounding."""
        return True

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count what runs inside."""
        self._class_as(WEIGHTS, weight_tensors(self._model))
        self._class_updated()
        with ExitStack() as stack:
            stack.enter_context(patched(torch.UntypedStorage, "resize_", self._observe_resize()))
            stack.enter_context(torch.autograd.graph.saved_tensors_hooks(self._pack, unpack))
            stack.enter_context(
                patched(torch._C._autograd, "_push_saved_tensors_default_hooks", self._observe_inner_hooks())
            )
            stack.enter_context(patched(torch.utils.checkpoint._VersionWrapper, "__init__", self._observe_selected()))
            watchers.append(self._hold)
            stack.callback(watchers.remove, self._hold)
            for parameter in self._parameters:
                if parameter.requires_grad and parameter.is_leaf:
                    stack.callback(self._watch_gradient(parameter).remove)
            stack.enter_context(self)
            yield
        self.border()
        self._class_as(WEIGHTS, weight_tensors(self._model))
        self._settle_sums()

    def border(self) -> int:
        """Take a sample between two operators; returns its index."""
        self._advance()
        self._class_updated()
        return self.now

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if types and opens_up(types):
            return NotImplemented  # the subclass runs its inner operators, and those come here
        out = func(*args, **kwargs) if kwargs else func(*args)
        if makes_nothing(func):
            return out
        self._advance()
        # An input nobody has seen yet was there before, except a tensor made of Python numbers: that shows here first.
        born = self.now if func is aten.lift_fresh.default else 0
        for arg in args:
            if isinstance(arg, Tensor):
                scratch = self._sharded or (self._cut and arg is not args[0])
                if scratch and func is aten.copy_.default and not self._knows(arg):
                    # Scratch memory of a gloo collective, whose kernel copies by way of the dispatcher. What is copied
                    # to beside whole weights is a bucket of DDP, which is there from the start.
                    continue
                self._see(arg, born)
            elif isinstance(arg, list | tuple):
                for item in arg:
                    if isinstance(item, Tensor):
                        self._see(item, born)
        if isinstance(out, Tensor):
            self._see(out, self.now)
        elif isinstance(out, list | tuple):
            for item in out:
                if isinstance(item, Tensor):
                    self._see(item, self.now)
        if func is aten.add.Tensor and sums_gradients():
            self._note_sum(args[0], out)
        return out

    def _advance(self) -> None:
        """Begin the next sample: note what was released and freed since the last one."""
        self.now += 1
        while self._released:
            for record in self._released.pop():
                record.holds -= 1
                if record.holds == 0:
                    record.spans.append(self.now)
        while self._freed:
            record = self._freed.pop()
            if record.died is None:
                record.died = self.now
            if self._known.get(record.address) is record:
                del self._known[record.address]

    def _knows(self, tensor: Tensor) -> bool:
        """Whether a tensor's storage has been seen, or cannot be."""
        try:
            return id(tensor.untyped_storage()) in self._known
        except (NotImplementedError, RuntimeError):
            return True

    def _see(self, tensor: Tensor, born: int) -> Record | None:
        """The record of `tensor`'s storage, made as born at sample `born` if there is none; None if off the device."""
        try:
            storage = tensor.untyped_storage()
        except (NotImplementedError, RuntimeError):  # sparse, opaque: their parts are seen on their own
            return None
        record = self._known.get(id(storage))
        if record is None or record() is not storage:
            if tensor.device != self._device or getattr(tensor, "fake_mode", None) is not self._fake_mode:
                return None
            return self._enter(storage, born, WORKSPACE)
        if record.size != storage.nbytes():
            return self._resize(record, storage)
        return record

    def _enter(self, storage: torch.UntypedStorage, born: int, kind: int) -> Record:
        record = Record(storage, self._freed.append)  # type: ignore[arg-type]
        record.address = id(storage)
        record.size = storage.nbytes()
        record.kind = kind
        record.born = born
        record.died = None
        record.holds = 0
        record.spans = []
        self._known[record.address] = record
        self.records.append(record)
        return record

    def _resize(self, old: Record, storage: torch.UntypedStorage) -> Record:
        """End the old record and begin one of the new size, held as the old one was."""
        old.died = self.now
        record = self._enter(storage, self.now, old.kind)
        if old.holds:
            record.holds, record.spans = 1, [self.now]
        return record

    def _class_as(self, kind: int, tensors: Iterable[Tensor]) -> None:
        """Class storages that have no kind yet, for the whole of their lives."""
        for tensor in tensors:
            record = self._see(tensor, 0)
            if record is not None and record.kind == WORKSPACE:
                record.kind = kind

    def _class_updated(self) -> None:
        """Class what a step makes and keeps."""
        self._class_as(GRADIENTS, gradient_tensors(self._parameters, self._optimizer))
        self._class_as(STATES, state_tensors(self._optimizer))

    def _hold(self, tensor: Tensor) -> list[Record]:
        """Note that `tensor` is now held for backward; returns the records to release with it."""
        held = []
        for plain in plain_tensors(tensor):
            record = self._see(plain, 0)
            if record is not None and record.kind == WORKSPACE:
                record.holds += 1
                if record.holds == 1:
                    record.spans.append(self.now)
                held.append(record)
        return held

    def _pack(self, tensor: Tensor) -> Any:
        """Observe a tensor that autograd saves.

        A saved output that held its own graph node would never be freed, so what has a node is kept detached, as
        autograd itself does for outputs.
        """
        records = self._hold(tensor)
        kept = tensor if tensor.grad_fn is None else tensor.detach()
        return Saved(kept, records, self._released.append) if records else kept

    def _observe_inner_hooks(self) -> Callable[[Callable[[Tensor], Any], Callable[[Any], Tensor]], None]:
        """Watch other saved-tensor hooks pushed meanwhile (checkpointing, offloading), which replace ours.

        Tensors that such a hook keeps in place of the saved one count as activations until they are freed.
        """
        push = torch._C._autograd._push_saved_tensors_default_hooks

        def push_observed(pack: Callable[[Tensor], Any], unpack: Callable[[Any], Tensor]) -> None:
            def pack_observed(tensor: Tensor) -> Any:
                try:
                    kept = pack(tensor)
                except Exception:  # how a recomputation stops early: with its last tensor, which it has kept
                    self._hold(tensor)
                    raise
                for plain in plain_tensors(kept):
                    self._hold(plain)
                return kept

            push(pack_observed, unpack)

        return push_observed

    def _observe_selected(self) -> Callable[[Any, Any], None]:
        """Watch the results that selective recomputation keeps: they are activations until they are freed."""
        keep = torch.utils.checkpoint._VersionWrapper.__init__

        def keep_observed(wrapper: Any, value: Any) -> None:
            for plain in plain_tensors(value):
                self._hold(plain)
            keep(wrapper, value)

        return keep_observed

    def _watch_gradient(self, parameter: nn.Parameter) -> Any:
        """Class a gradient as soon as it is complete, before a hook that steps and frees it in backward."""

        def accumulated(parameter: Tensor) -> None:
            self._class_as(GRADIENTS, plain_tensors(parameter.grad))

        handle = parameter.register_post_accumulate_grad_hook(accumulated)  # type: ignore[no-untyped-call]
        hooks = parameter._post_accumulate_grad_hooks  # type: ignore[attr-defined]
        for key in [key for key in hooks if key != handle.id]:
            hooks[key] = hooks.pop(key)  # behind ours; `move_to_end` would not move it where torch reads the order
        return handle

    def _observe_resize(self) -> Callable[[torch.UntypedStorage, int], torch.UntypedStorage]:
        """FSDP frees and regrows storages in place, which no operator shows."""
        resize = torch.UntypedStorage.resize_

        def resize_observed(storage: torch.UntypedStorage, size: int) -> torch.UntypedStorage:
            resize(storage, size)
            record = self._known.get(id(storage))
            if record is not None and record() is storage and record.size != storage.nbytes():
                self._advance()
                self._resize(record, storage)
            return storage

        return resize_observed

    def _note_sum(self, old: Tensor, new: Tensor) -> None:
        old_record, new_record = self._see(old, 0), self._see(new, self.now)
        if old_record is not None and new_record is not None:
            self._sums.append((old_record, new_record))

    def _settle_sums(self) -> None:
        """Take back what counting itself costs: autograd sums two gradients of one activation in place, but not under
        a dispatch mode (`can_accumulate_inplace`, torch/csrc/autograd/input_buffer.cpp). Where the old sum is freed at
        once it would have been overwritten, so it ends where the new one begins.
        """
        for old, new in self._sums:
            if old.size == new.size and old.died == new.born + 1:
                old.died = new.born
