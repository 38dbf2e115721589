"""Activations on their way: what each block saves for backward meets the fate that the policy has for it.

Hooks on saved tensors are set while a block runs, on any model that has blocks; its source stays as it is. Rules that
hold for all fates:

- a storage counts once, however many operators save a view of it (without that, 35 % more would be moved);
- parameters, what is cast or viewed from them, buffers, and what every block is given beside its hidden state (rotary
  tables, masks) stay where they are;
- what one operator keeps as it is, others that save it keep too: attention's output is the next layer's input.

When a block's successor is done, what the block moved has left, or is waited for: so the copies run beside one block's
work and at most two blocks are near. In backward a block's first question fetches its predecessor's bytes. Bytes near
at the most: `peak_formula`. Frames follow from the order in which blocks run, so all this is the same in each run.
"""

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from offload.attention import Results
from offload.compress import FP8_GROUP, INT8_GROUP, encode
from offload.config import COMPRESSED, EXACT, MOVED, ActivationsConfig, Fate
from offload.elsewhere import Elsewhere
from offload.policy import Policy, Verdict
from offload.pool import Ledger
from offload.recompute import recompute, tile_mlps
from offload.saved import Compressed, Entry, Frame, Saved, hold
from offload.saving import Caller, given, has_storage, is_on, is_parameters_form, row_of
from offload.streams import Copies


class Activations:
    """The activations of one model. Made once; from then on every forward in training obeys the policy.

    Args:
        blocks: name and module of each block, in the order they run.
        device: where the model computes.
        shared_rows: whether attention is over rows that several ranks share.

    Raises:
        ValueError: a rule or option that these blocks cannot honour.
    """

    def __init__(
        self,
        cfg: ActivationsConfig,
        blocks: Sequence[tuple[str, nn.Module]],
        device: torch.device,
        *,
        shared_rows: bool = False,
        copies: Copies | None = None,
        dedupe: bool = True,
    ) -> None:
        self.cfg, self.ledger = cfg, Ledger()
        self.frames: list[Frame] = []
        """Of the last forward, one for each block."""
        self._blocks, self._device, self._dedupe = blocks, device, dedupe
        self._policy = Policy(cfg, blocks, shared_rows=shared_rows)
        self._elsewhere = Elsewhere(cfg, device, self.ledger, copies or Copies(device))
        self._caller = Caller(operators=self._policy.by_operator, modules=self._policy.by_module)
        self._entries: dict[tuple[int, Fate], weakref.ref[Entry]] = {}
        self._raw: dict[int, tuple[weakref.ref[torch.UntypedStorage], int]] = {}
        self._exempt: dict[int, Tensor] = {}
        self._inputs = False
        self._told = 0
        self._install()

    @property
    def exact(self) -> bool:
        """Whether gradients are those of a run that keeps everything."""
        return self.cfg.fates() <= set(EXACT)

    def peak_formula(self) -> int:
        """Bytes of moved and kept storages near at the most in the last forward and its backward, by the rules above:
        what is kept so far, and of the moved those of two neighbours.
        """
        kept = most = 0
        sizes = [0, *(frame.moved for frame in self.frames)]
        for before, frame in zip(sizes, self.frames, strict=False):
            kept += frame.kept
            most = max(most, kept + before + frame.moved)
        return most

    def take_messages(self) -> list[str]:
        """What the user should know since the last call, each thing once a run."""
        messages = self._elsewhere.messages
        new, self._told = messages[self._told :], len(messages)
        return new

    def rules_without_effect(self) -> list[str]:
        """Rules that decided about nothing in the forwards so far."""
        return [
            f"activations.rules='{rule}' has no effect: nothing of the kind is saved, or rules before it met it all"
            for rule in self._policy.unmet()
        ]

    # --- what a block's forward goes through ---

    def _install(self) -> None:
        if self.cfg.tile_mlp > 1:
            tile_mlps(self._blocks, self.cfg.tile_mlp)
        for region in self._policy.regions:
            recompute(region, self._saving_inputs, self._results)
        for index, (name, block) in enumerate(self._blocks):
            self._caller.follow(name, block)
            self._frame_block(index, name, block)

    def _needs_hooks(self) -> bool:
        """Whether some saved tensor may meet another fate than autograd's own."""
        others = {self.cfg.fate, *(rule.fate for rule in self._policy.rules)} - {
            Fate.keep,
            Fate.recompute,
            Fate.selective,
        }
        return bool(others) or self.cfg.inputs is not Fate.keep

    def _frame_block(self, index: int, name: str, block: nn.Module) -> None:
        if not self._needs_hooks():
            return
        inner = block.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return inner(*args, **kwargs)
            with self._frame(index, name, block, args, kwargs):
                return inner(*args, **kwargs)

        block.forward = forward

    @contextmanager
    def _frame(
        self, index: int, name: str, block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Iterator[None]:
        last = self.frames[-1] if self.frames else None
        if last is None or last.index >= index:
            self._sweep()
            self.frames, last = [], None
        frame = Frame(index, last)
        self.frames.append(frame)
        self._exempt = {id(t.untyped_storage()): t for t in given(block, args, kwargs) if has_storage(t)}
        try:
            with ExitStack() as stack:
                stack.enter_context(saved_tensors_hooks(self._packer(frame), self._unpack))
                self._caller.enter(stack, name)
                yield
        finally:
            self._exempt = {}
        if last is not None:
            last.settle()

    @contextmanager
    def _saving_inputs(self) -> Iterator[None]:
        self._inputs = True
        try:
            yield
        finally:
            self._inputs = False

    def _results(self) -> Results:
        """What holds the results of a recomputed module's attention: where its inputs are, if those stay exact."""
        return Results(self._pack_result if self.cfg.inputs in MOVED else hold, self._unpack)

    def _pack_result(self, tensor: Tensor) -> Any:
        packed = self._pack(self.frames[-1], tensor)
        if not isinstance(packed, Saved):
            hold(tensor)
        return packed

    # --- one saved tensor ---

    def _packer(self, frame: Frame) -> Callable[[Tensor], Any]:
        return lambda tensor: self._pack(frame, tensor)

    def _pack(self, frame: Frame, tensor: Tensor) -> Any:
        if not has_storage(tensor) or not is_on(self._device, tensor) or self._is_weight(tensor):
            return tensor if tensor.grad_fn is None else tensor.detach()
        verdict = self._verdict(frame, tensor)
        entry = None if verdict.fate is Fate.keep else self._entry(frame, tensor, verdict)
        return self._raw_tensor(frame, tensor) if entry is None else Saved(entry, tensor)

    def _unpack(self, kept: Any) -> Tensor:
        with torch.no_grad():
            if isinstance(kept, Saved):
                return kept.tensor()
            if isinstance(kept, tuple):
                frame, tensor = kept
                frame.begin_backward()
                return tensor  # type: ignore[no-any-return]
        return kept  # type: ignore[no-any-return]

    def _verdict(self, frame: Frame, tensor: Tensor) -> Verdict:
        if self._inputs:
            verdict = Verdict(self.cfg.inputs)
        else:
            verdict = self._policy.verdict(self._caller.module, self._caller.operator)
        fate = verdict.fate
        if tensor.untyped_storage().nbytes() < self.cfg.min_bytes:
            return Verdict(Fate.keep)
        if fate in MOVED and frame.index >= len(self._blocks) - self.cfg.keep_last:
            return Verdict(Fate.keep)
        if fate in COMPRESSED and row_of(tensor, fate) is None:
            return Verdict(Fate.keep)
        return verdict

    def _entry(self, frame: Frame, tensor: Tensor, verdict: Verdict) -> Entry | None:
        """The entry of a tensor's storage: the one there is, or a new one; None where it stays as it is."""
        storage, version = tensor.untyped_storage(), tensor._version
        key = (id(storage), verdict.fate)
        if self._dedupe:
            known = self._raw.get(key[0])
            if known is not None and known[0]() is storage and known[1] == version:
                return None
            ref = self._entries.get(key)
            entry = ref() if ref is not None else None
            if entry is not None and entry.is_of(storage, version):
                return entry
        with torch.no_grad():
            flat = tensor.detach().as_strided((storage.nbytes() // tensor.itemsize,), (1,), 0)
            made: Entry | None
            if verdict.fate in COMPRESSED:
                integers = verdict.fate is Fate.int8
                group = 0 if verdict.whole else INT8_GROUP if integers else FP8_GROUP
                codes = encode(flat, integers=integers, group=group, row=row_of(tensor, verdict.fate) or 0)
                made = Compressed(storage, version, codes, verdict.fate, self.ledger)
            else:
                made = self._elsewhere.take(frame, storage, version, flat.view(torch.uint8), verdict.fate)
        if made is not None:
            self._entries[key] = weakref.ref(made)
        return made

    def _raw_tensor(self, frame: Frame, tensor: Tensor) -> Any:
        """The tensor as it is, with its frame, so that backward's arrival here is noticed."""
        storage, version = tensor.untyped_storage(), tensor._version
        known = self._raw.get(id(storage))
        if known is None or known[0]() is not storage or known[1] != version:
            self._raw[id(storage)] = (weakref.ref(storage), version)
            frame.kept += storage.nbytes()
        return frame, tensor if tensor.grad_fn is None else tensor.detach()

    def _is_weight(self, tensor: Tensor) -> bool:
        """Whether a tensor is none of the block's own making, or made of a parameter alone by a cast or a view."""
        return id(tensor.untyped_storage()) in self._exempt or is_parameters_form(tensor)

    def _sweep(self) -> None:
        """Forget storages that are gone: a new forward begins."""
        self._entries = {key: ref for key, ref in self._entries.items() if ref() is not None}
        self._raw = {key: known for key, known in self._raw.items() if known[0]() is not None}
