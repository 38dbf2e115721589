"""The optimizer that DeepSpeed sees: our own, applied to what DeepSpeed's flat partitions are parts of.

DeepSpeed gives an optimizer this rank's part of one long fp32 vector, cut at any value. Where an optimizer treats
each value by itself, its part of each parameter is stepped in place, without communication. Any other one gets whole
matrices: each has an owner among the ranks (greedily balanced), its parts travel there with their gradients, are
stepped, and travel back, one matrix for each owner at a time. Both volumes are those of ZeRO-1, the numbers are those
of one process, and the states lie with the owners.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from optim import registry
from optim.config import OptimConfig
from parallel.collectives import gather_objects
from parallel.launch import World
from parallel.owners import balanced, to_owners
from trainer.engines.base import Numbers
from trainer.engines.partition import FlatPart, Segment, part_of
from trainer.model import global_shape


@dataclass(frozen=True)
class Exchange:
    """One whole parameter: who owns it, and how many of its values each rank holds."""

    segment: Segment
    owner: int
    lengths: list[int]


class PartitionedOptimizer(Optimizer):
    """Steps flat partitions through an optimizer of ours; idle until `bind` has told what they are parts of.

    Args:
        parameters: of the model, trainable ones.
        elementwise: whether any slice of a parameter can be stepped by itself.
        on_host: whether DeepSpeed keeps the partitions in host memory.
    """

    def __init__(
        self,
        cfg: OptimConfig,
        named: Sequence[tuple[str, nn.Parameter]],
        world: World,
        *,
        elementwise: bool,
        on_host: bool,
    ) -> None:
        super().__init__([p for _, p in named if p.requires_grad], {"lr": cfg.lr})
        self._cfg, self._world, self._elementwise, self._on_host = cfg, world, elementwise, on_host
        # Groups are a matter of names and global shapes, which DeepSpeed is about to take away.
        self._named = [
            (name, nn.Parameter(torch.empty(global_shape(p), dtype=p.dtype, device="meta"), p.requires_grad))
            for name, p in named
        ]
        self._flats: list[Tensor] = []
        self._segments: list[Segment] = []
        self._rounds: dict[int, list[list[Exchange]]] = {}
        self._pieces: dict[str, nn.Parameter] = {}
        self.inner: Optimizer | None = None
        """The optimizer of ours, over the pieces that this rank steps."""

    def bind(self, flats: list[Tensor], segments: list[Segment]) -> None:
        """Take the partitions that DeepSpeed has made, and make the states of what this rank steps."""
        self._flats, self._segments = flats, segments
        if self._elementwise:
            mine = [segment for segment in segments if segment.length]
            self._pieces = {each.name: nn.Parameter(part_of(flats, each)) for each in mine}
        else:
            self._rounds = self._exchanges()
            like = flats[0]
            for each in (each for rounds in self._rounds.values() for line in rounds for each in line):
                if each.owner == self._world.process_rank:
                    whole = torch.empty(each.segment.shape, dtype=like.dtype, device=like.device)
                    self._pieces[each.segment.name] = nn.Parameter(whole)
        self.inner = self._built()
        if not self._elementwise:
            for piece in self._pieces.values():
                piece.data = piece.new_empty(0)  # whole only while it is stepped
        for flat in flats:  # for the memory accounting: masters count as states, as in ZeRO's own formulas
            self.state[flat]["master"] = flat
        if self.inner is not None:
            self.state[flats[0]]["inner"] = self.inner.state

    def _built(self) -> Optimizer | None:
        if not self._pieces:  # more ranks than parameters
            return None
        if self._elementwise and self._on_host and self._cfg.name == "adamw":
            return cpu_adam(registry.groups(self._cfg, self._named, self._pieces))
        optimizer = registry.build(self._cfg, self._named, stepped=self._pieces)
        optimizer.check_finite = False  # the step has looked at the global norm
        return optimizer

    def _exchanges(self) -> dict[int, list[list[Exchange]]]:
        """For each flat partition, rounds of exchanges in which no rank owns two parameters."""
        count = self._world.process_count
        everyone = gather_objects(self._world, [segment.length for segment in self._segments])
        owners = balanced([sum(lengths) for lengths in zip(*everyone, strict=True)], count)
        found: dict[int, list[list[Exchange]]] = {}
        for flat in range(len(self._flats)):
            queues: list[list[Exchange]] = [[] for _ in range(count)]
            for index, segment in enumerate(self._segments):
                if segment.flat == flat:
                    queues[owners[index]].append(
                        Exchange(segment, owners[index], [lengths[index] for lengths in everyone])
                    )
            longest = max(map(len, queues))
            found[flat] = [[queue[i] for queue in queues if i < len(queue)] for i in range(longest)]
        return found

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        """Step the partitions that are among `param_groups` just now, which DeepSpeed changes from call to call."""
        asked = {id(p) for group in self.param_groups for p in group["params"]}
        for index, flat in enumerate(self._flats):
            if id(flat) in asked and flat.grad is not None:
                if self._elementwise:
                    self._step_parts(index, flat.grad)
                else:
                    for line in self._rounds[index]:
                        self._step_whole(line, flat.grad)

    def _step_parts(self, index: int, grad: Tensor) -> None:
        pieces = []
        for segment in self._segments:
            if segment.flat == index and segment.length:
                piece = self._pieces[segment.name]
                piece.grad = grad[segment.offset : segment.offset + segment.length]
                pieces.append(piece)
        self._step_inner(pieces)

    def _step_whole(self, line: list[Exchange], grad: Tensor) -> None:
        """Bring each parameter of a round to its owner, step it there, and take the parts back."""
        rank, count = self._world.process_rank, self._world.process_count
        mine = next((each for each in line if each.owner == rank), None)
        lengths = mine.lengths if mine is not None else [0] * count
        nothing = grad.new_empty(0)
        values, grads = [nothing] * count, [nothing] * count
        for each in line:
            at = slice(each.segment.offset, each.segment.offset + each.segment.length)
            values[each.owner] = self._flats[each.segment.flat].detach()[at]
            grads[each.owner] = grad[at]
        whole, whole_grad = self._gather(values, lengths), self._gather(grads, lengths)
        if mine is not None:
            piece = self._pieces[mine.segment.name]
            piece.data = whole.view(mine.segment.shape)
            piece.grad = whole_grad.view(mine.segment.shape)
            self._step_inner([piece])
            whole = piece.data.flatten()
            piece.data = piece.new_empty(0)
        held = [value.numel() for value in values]
        back = self._gather(list(torch.split(whole, lengths)), held)
        for value, stepped in zip(values, torch.split(back, held), strict=True):
            value.copy_(stepped)

    def _gather(self, parts: list[Tensor], lengths: list[int]) -> Tensor:
        if self._world.process_count == 1:
            return parts[0].clone()
        return to_owners(parts, lengths, self._world.gradients)

    def _step_inner(self, pieces: list[nn.Parameter]) -> None:
        if pieces and self.inner is not None:
            self.inner.step()
        for piece in pieces:
            piece.grad = None

    def tensors(self) -> dict[str, Any]:
        """Master weights and states of this rank, as `trainer.state` names them."""
        found: dict[str, Any] = {}
        for segment in self._segments:
            found[f"model/{segment.name}"] = FlatPart(segment.shape, segment.start, part_of(self._flats, segment))
            for key, value in self._state(segment.name).items():
                if isinstance(value, Tensor):
                    cut = self._elementwise and value.dim() > 0
                    found[f"optim/{segment.name}/{key}"] = (
                        FlatPart(segment.shape, segment.start, value) if cut else value
                    )
        return found

    def _state(self, name: str) -> dict[str, Any]:
        return self.inner.state[self._pieces[name]] if self.inner is not None and name in self._pieces else {}

    def numbers(self) -> Numbers:
        """State numbers of all parameters, of whichever rank steps them."""
        mine = {
            name: {key: value for key, value in self._state(name).items() if isinstance(value, int | float | bool)}
            for name in self._pieces
        }
        merged: Numbers = {}
        for each in gather_objects(self._world, mine):
            merged |= {name: values for name, values in each.items() if values}
        return {segment.name: merged[segment.name] for segment in self._segments if segment.name in merged}

    def set_numbers(self, numbers: Numbers) -> None:
        """Put saved state numbers into what this rank steps."""
        for name in self._pieces:
            self._state(name).update(numbers.get(name, {}))


def cpu_adam(groups: list[dict[str, Any]]) -> Optimizer:
    """DeepSpeed's vectorised Adam for host memory. Its C++ is compiled at the first use, in a minute or two."""
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    found: Optimizer = DeepSpeedCPUAdam(groups, adamw_mode=True)
    for group in found.param_groups:
        for p in group["params"]:
            found.state[p] = {"step": 0, "exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
    return found
