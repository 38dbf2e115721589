"""A matrix's subspace through time: when its basis is replaced, and by what (`on_refresh.py`: what its moments become).

State: `basis` (r, k), fp32 or packed to 4 bits (a random one may be drawn at each use instead of kept); numbers
`captured` (share of the gradient's energy in a fresh basis), `overlap` (|Q_new Q_old^T|^2 / r, 1 for the same span),
`refreshes` and `next_refresh` (a count of steps).
Lazy refreshes as in Q-GaLore (Zhang et al. 2024, arXiv:2407.08296, section 3.2): the gap doubles while the last five
overlaps average above a threshold. The authors compare only the first vector, whose sign is arbitrary.

Of a matrix whose shards keep the projected side whole (right projection of rows, left of columns), R is local, and
the moments lie as R does. Where the shards cut that side, R is a sum over ranks: reduce-scattered by whole rows (so
that blocks of codes stay whole), stepped there, and the step gathered. A basis lies as the shards where they cut its
side; else it is shared out by rows and gathered at each use, so that nothing of the model's size is on every rank,
or every rank has a copy (`basis_copies`).
Values a rank sends for a matrix (m, n) on D ranks, k the projected side, o the other one:
    step     side whole: r k, the basis (packed if int4), or with copies nothing;  cut: 2 r o
    refresh  side whole: 2 r k a warm pass, 2 k^2 a Gram matrix, once more r k for the last basis
             cut: the same and m n / D, as one all-to-all first makes the side whole. G is never gathered.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from optim.affine import Affine4
from optim.base import Group, State, read, state_dtype
from optim.codec import PLAIN, Codec
from optim.on_refresh import reset_, rotate_, turned
from optim.projection import METHODS, Side, basis_shape, find_basis, low_shape, project, side_of
from optim.rounding import keyed_normal, next_seed, seed_of, seeded_normal
from optim.rules import Moment
from optim.sharded import new_tensors
from optim.warm import OVERSAMPLE, redrawn_rows, sketch_basis, warm_basis
from parallel.dtensor import Layout

BASIS: dict[str, Codec] = {"fp32": PLAIN, "int4": Affine4(block=256), "regenerate": PLAIN}

FALL = 0.9
"""A warm basis that captures less than this share of what the last one did is searched for anew."""
SEARCH_EVERY = 10
"""Refreshes after which a warm basis is searched for anew in any case: power iteration alone is slow to leave a
subspace whose directions have died."""
LARGE = 2048
"""Smaller side of a matrix from which a first warm basis is sketched: to decompose G G^T takes minutes for a model of
such matrices, a hundred times as long as this."""
QUEUE = 5
BASIS_KEYS = ("basis", "basis_scale", "basis_zero")
OWN_KEYS = {*BASIS_KEYS, "overlaps", "growth"}


@dataclass(frozen=True)
class Subspace:
    """Decisions for a matrix of global `shape` in a group; what changes is in the parameter's state."""

    shape: Sequence[int]
    group: Group
    layout: Layout = Layout(())
    """Of the matrix, if it is sharded."""
    side: Side = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "side", side_of(self.shape, self.group.get("proj_type", "std")))
        if self.layout.whole:
            object.__setattr__(self, "layout", Layout(tuple(self.shape)))

    @cached_property
    def cut(self) -> bool:
        """Whether the ranks have parts of the projected side."""
        return self.layout.dim == (0 if self.side == "left" else 1)

    @cached_property
    def low(self) -> Layout:
        """Of R, its moments and its step."""
        return self.layout.like(self.low_shape, 0 if self.cut else self.layout.dim)

    @cached_property
    def basis_layout(self) -> Layout:
        """Of the basis in the state. Codes have blocks along its rows."""
        if self.cut and self.codec.in_place:
            return self.layout.like(self.basis_shape, 1)
        return self.layout.like(self.basis_shape, None if self.group.get("basis_copies") else 0)

    @cached_property
    def basis_shape(self) -> tuple[int, int]:
        return basis_shape(self.shape, self.group["rank"], self.side)

    @cached_property
    def low_shape(self) -> tuple[int, int]:
        return low_shape(self.shape, self.group["rank"], self.side)

    @property
    def regenerated(self) -> bool:
        """Whether the basis is drawn again at each use, from the name and the number of the refresh, and not kept."""
        return self.group.get("basis") == "regenerate"

    @cached_property
    def large(self) -> bool:
        """Whether the first of its warm bases is sketched."""
        return min(self.shape) >= max(LARGE, 2 * (self.basis_shape[0] + OVERSAMPLE))

    @cached_property
    def codec(self) -> Codec:
        return BASIS[self.group.get("basis", "fp32")]

    def new_state(self, like: Tensor) -> State:
        """State beside the moments, for this rank's part `like` of the matrix."""
        state: dict[str, Any] = {"captured": 0.0, "overlap": 0.0, "refreshes": 0, "next_refresh": 0}
        if self.group["lazy"]:
            state |= {"gap": self.group["update_proj_gap"], "overlaps": like.new_zeros(QUEUE, dtype=torch.float32)}
        if self.regenerated:
            return state
        new = partial(self.codec.new, "basis", wide=state_dtype(like.dtype))
        return state | new_tensors(new, like, self.basis_layout)

    def state_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of the tensors of `new_state` for weights of `dtype`."""
        queue = 4 * QUEUE if self.group.get("lazy") else 0
        if self.regenerated:
            return queue
        return self.codec.nbytes(self.basis_shape, state_dtype(dtype)) + queue

    def basis(self, state: State, dtype: torch.dtype, name: str = "") -> Tensor:
        """(r, k) in `dtype`; for the part of the side that this rank's shard has. A drawn one needs the `name`."""
        if self.regenerated:
            like = state["growth"].new_empty((), dtype=dtype)
            drawn = self.drawn(like, name, state["refreshes"] - 1)
            return drawn[:, self.layout.mine] if self.cut else drawn
        if self.layout.whole and self.codec.in_place:
            basis: Tensor = state["basis"]
            return basis
        if self.basis_layout.dim == 1:
            width = self.basis_layout.local_shape[1]
            return self.codec.read(state, "basis", slice(None), dtype, signed=True, width=width)
        whole = self.whole_basis(state, dtype)
        return whole[:, self.layout.mine] if self.cut else whole

    def whole_basis(self, state: State, dtype: torch.dtype) -> Tensor:
        """(r, k) in `dtype` on every rank."""
        held = {key: state[key] for key in BASIS_KEYS if key in state}
        if not self.layout.whole:
            for key, part in held.items():
                shape = (self.basis_shape[0], self.basis_shape[1] if self.basis_layout.dim == 1 else part.shape[1])
                held[key] = self.layout.like(shape, self.basis_layout.dim).gather(part)
        return self.codec.read(held, "basis", slice(None), dtype, signed=True, width=self.basis_shape[1])

    def drawn(self, like: Tensor, name: str, count: int) -> Tensor:
        """The random basis of refresh number `count`, entries N(0, 1/r), with the dtype and device of `like`."""
        return keyed_normal(self.basis_shape, like, name, count).mul_(self.basis_shape[0] ** -0.5)

    def project(self, grad: Tensor, basis: Tensor) -> Tensor:
        """R of this rank's part of the gradient, laid out as `low`."""
        found = project(grad, basis, self.side, self.group.get("products", "fp32"))
        return self.low.scatter(found) if self.cut else found

    def spread(self, step: Tensor) -> Tensor:
        """What this rank's weights take of a step on R that is laid out as `low`."""
        return self.low.gather(step) if self.cut else step

    def due(self, state: State) -> bool:
        """Whether the next step needs a new basis."""
        return bool(state["refreshes"] == 0 or state["step"] >= state["next_refresh"])

    def refresh(self, grad: Tensor, state: State, moments: Sequence[Moment], name: str) -> Tensor | None:
        """Replace the basis; keep it if the gradient is zero, in which no direction leads, or not finite.

        Args:
            grad: this rank's part.

        Returns:
            The gradient projected by the new basis, where measuring the basis has made it.
        """
        dtype = state_dtype(grad.dtype)
        measured = self.layout.norms(grad, dtype=dtype)[0]
        size = read(measured, usual=1.0)
        norm = measured if 1e-6 < size < 1e12 else None
        if norm is None:  # else all squares were in range, and a NaN would have shown
            size = read(self.layout.max_(_peak(grad)), usual=1.0)
        if not size < math.inf:
            return None
        random = self.group["refresh"] == "random"
        if size == 0.0 and not random:
            if state["refreshes"]:
                self._schedule(state, name)
            return None
        if self.regenerated:
            self._settle(state, None, 0.0, name)
            return None
        # Squares of a very small or very large gradient leave fp32's range.
        wide = dtype if random or 1e-12 < size < 1e12 else torch.float64
        old = self.whole_basis(state, wide) if state["refreshes"] and not random else None
        over, own, weak = self.layout, grad, None
        if self.cut and not random:
            over = self.layout.like(self.shape, 1 if self.side == "left" else 0)
            grad = self.layout.move(grad, 1 if self.side == "left" else 0)
        new, captured, low, energies = self._find(grad, over, norm, old, state, wide, name)
        if low is not None and energies is not None and self.group["compat"] != "authors":
            new, low, weak = self._completed(new, low, energies, grad, name, state["refreshes"])
        found = new
        if old is not None:
            turn = new @ old.T
            state["overlap"] = read(turn.square().sum() / len(turn), usual=1.0)
            how = self.group["on_refresh"]
            new = turned(new, turn, how)
            if how == "rotate":
                rotate_(state, moments, turn, self.side, self.low, self.group["states"])
        self._settle(state, new, captured, name)
        if low is None or not (new is found and wide == dtype and self.codec.in_place):
            return None
        if self.cut:  # of operands as they are, as where the side is whole: whether it is must make no difference
            low = self.low.scatter(project(own, new[:, self.layout.mine], self.side))
            return low if weak is None else self._silenced(low, weak)
        return low

    def _settle(self, state: State, new: Tensor | None, captured: float, name: str) -> None:
        if new is not None:
            part = self.basis_layout.cut(new)
            if self.codec.in_place:
                state["basis"].copy_(part)
            else:
                self.codec.write(state, "basis", slice(None), part, signed=True)
        state["captured"] = captured
        if self.group["on_refresh"] == "reset" and state["refreshes"]:
            reset_(state, OWN_KEYS)
        state["refreshes"] += 1
        self._schedule(state, name)

    def _schedule(self, state: State, name: str) -> None:
        gap = self.group["update_proj_gap"]
        if self.group["lazy"]:
            if state["refreshes"] > 1:
                state["overlaps"][state["refreshes"] % QUEUE] = state["overlap"]
            if state["refreshes"] > QUEUE and read(state["overlaps"].mean(), 0.0) >= self.group["lazy_threshold"]:
                state["gap"] *= 2
            gap = state["gap"]
        early = seed_of(name) % gap if self.group["stagger"] and state["refreshes"] == 1 else 0
        state["next_refresh"] = state["step"] + gap - early

    def _find(
        self, grad: Tensor, over: Layout, norm: Tensor | None, old: Tensor | None, state: State, wide: torch.dtype,
        name: str,
    ) -> tuple[Tensor, float, Tensor | None, Tensor | None]:  # fmt: skip
        """A new basis in `wide`, the share of energy it captures, the gradient projected by it and that one's energies.

        Of a random one, which is not orthonormal, 0 and nothing. `over` is the layout of `grad`, `norm` its norm, if
        that is known.
        """
        r, k = self.basis_shape
        method, count = self.group["refresh"], state["refreshes"]
        if method == "random":
            if "seed" in state:  # as the authors draw
                drawn = seeded_normal((r, k) if self.side == "right" else (k, r), grad, state["seed"])
                state["seed"] = next_seed(state["seed"])
                return (drawn if self.side == "right" else drawn.T).to(wide) / math.sqrt(r), 0.0, None, None
            return self.drawn(grad.new_empty((), dtype=wide), name, count), 0.0, None, None
        if method == "warm" and old is not None:
            new = warm_basis(grad, old, self.side, over, in_range=norm is not None)
            found = self._captured(grad, over, norm, new)
            if found[0] >= FALL * state["captured"] and (count + 1) % SEARCH_EVERY:
                return new, *found
        if method == "randomized" or (method == "warm" and (old is not None or self.large)):
            new = sketch_basis(grad, r, self.side, wide, (name, count), old if method == "warm" else None, over)
        else:
            fix_signs = self.group["compat"] != "authors"
            exact = "gram" if method == "warm" else method
            new = find_basis(grad, r, self.side, exact, wide, fix_signs=fix_signs, over=over)
        return new, *self._captured(grad, over, norm, new)

    def _captured(self, grad: Tensor, over: Layout, norm: Tensor | None, basis: Tensor) -> tuple[float, Tensor, Tensor]:
        """Share of energy that a basis captures, the gradient projected by it, the energy along each of its rows."""
        low = project(grad, basis, self.side)
        norm = over.norms(grad, dtype=basis.dtype)[0] if norm is None else norm
        energies = over.sum_((low / norm).square_().sum(0 if self.side == "right" else 1))
        return read(energies.sum(), usual=1.0), low, energies

    def _completed(
        self, new: Tensor, low: Tensor, energies: Tensor, grad: Tensor, name: str, count: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Put random rows, keyed by name and number, for those along which the gradient holds nothing but rounding.

        A gradient of lower rank leaves these to chance, and every way of sharding it would find others. Returns the
        basis, the gradient projected by it, which is zero along them, and which they are, if any.
        """
        # Squares are rounded as any number is, and so hold directions down to the root of that. An exact basis is found
        # from squares in fp64: beside those of fp32 gradients that is nothing.
        method, eps = self.group["refresh"], torch.finfo(state_dtype(grad.dtype)).eps
        exact = method in METHODS or (method == "warm" and count == 0 and not self.large)
        exact = exact and state_dtype(grad.dtype) != torch.float64
        weak = energies <= energies.amax() * ((16 * eps) ** 2 if exact else eps)
        if not read(weak.any(), usual=0.0):
            return new, low, None
        new = redrawn_rows(new, weak, (name, count))
        return new, self._silenced(project(grad, new, self.side), weak, whole=True), weak

    def _silenced(self, low: Tensor, weak: Tensor, *, whole: bool = False) -> Tensor:
        """R, or this rank's part of it, without the rounding along rows of the basis that the gradient does not have:
        Adam would divide it by its own size."""
        if self.side == "right":
            return low.masked_fill_(weak, 0.0)
        return low.masked_fill_((weak if whole else weak[self.low.mine])[:, None], 0.0)


def _peak(grad: Tensor) -> Tensor:
    """Largest magnitude; infinity if there is a NaN. 15 times as fast as torch's infinity norm."""
    if not grad.numel():
        return grad.new_zeros(())
    return torch.maximum(grad.amax(), -grad.amin()).nan_to_num_(nan=math.inf, posinf=math.inf)
