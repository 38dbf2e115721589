"""From a step in the subspace back to the weight.

With R the projected gradient, N the rule's step on it, s = |N| / |R| per channel of the side that is kept (a row of
R for a right projection, a column for a left one) or for the whole matrix:
    back     W <- W - lr scale back(N)                                   GaLore
    channel  W <- W - lr a sqrt(scale) limit(G s)                        APOLLO
    tensor   the same with one s for the matrix                          APOLLO-Mini
    fira     W <- W - lr a [scale back(N) + limit((G - scale back(R)) s)]
a is Adam's bias correction sqrt(1 - b2^t) / (1 - b1^t), which N and s are without. limit() lets the norm of its
argument grow by 1% a step at most (Chen et al. 2024, arXiv:2410.01623, section 4.2); that norm is found from the
norms of channels, without a second matrix of the gradient's size: (G - c Q Q^T G) has |G_i|^2 - (2c - c^2) |R_i|^2.
Of a sharded matrix, this takes one sum over the ranks, made for all matrices at once: of one number where each rank
has whole channels, of three for the matrix's one s, of three for each channel where the shards cut the channels.
Papers: Zhao et al. 2024, arXiv:2403.03507; Zhu et al. 2024, arXiv:2412.05270; Chen et al. 2024, arXiv:2410.01623.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from optim.base import CHUNK, Group
from optim.projection import Side, add_back_
from optim.rules import Rule, Stepped, row_chunks
from optim.sharded import Sums
from optim.subspace import Subspace

GROWTH = 1.01
"""Largest ratio between the norms of two updates in a row (gamma; Fira, section 4.2)."""
SAFE = 1e-8
"""Added to norms that divide, as the authors' packages do."""


@dataclass(frozen=True)
class Lift:
    """A way back; `limited` ones keep the norm of the last update in `growth`, `linear` ones need of the gradient what
    its projection holds."""

    limited: bool = False
    linear: bool = True

    def step_(self, item: Stepped, rule: Rule, low: Tensor, basis: Tensor, subspace: Subspace, group: Group) -> Sums:
        """Step one matrix in place, given R and the basis as this rank has and needs them; see `Subspace`."""
        lr, decay, authors = _rates(group)
        delta = torch.zeros_like(low)  # stands in for the weight, so that the rule leaves -lr N in it
        substitute = Stepped(delta, low, item.state, layout=subspace.low)
        yield from rule.stepping(substitute, group, lr=lr, weight_decay=0.0)
        alpha = group["scale"] * (decay if authors else 1.0)
        add_back_(
            item.param, subspace.spread(delta), basis, subspace.side, beta=decay, alpha=alpha, store=item.store
        )  # fmt: skip


@dataclass(frozen=True)
class Scaled(Lift):
    per_channel: bool = True
    residual: bool = False
    limited: bool = True
    linear: bool = False

    def step_(self, item: Stepped, rule: Rule, low: Tensor, basis: Tensor, subspace: Subspace, group: Group) -> Sums:
        lr, decay, authors = _rates(group)
        state, side = item.state, subspace.side
        normed = torch.zeros_like(low)
        substitute = Stepped(normed, low, state, layout=subspace.low)
        corrected = group.get("q_compat", False)  # as the authors' Q-APOLLO: the limiter sees Adam's correction too
        yield from rule.stepping(substitute, group, lr=-1.0, weight_decay=0.0, raw=not corrected)
        inside = group["scale"] if self.residual else 0.0
        if item.layout.whole or (self.per_channel and not subspace.cut):
            factor = scaling(normed, low, side, per_channel=self.per_channel)
            square = yield scaled_square(factor, channel_energy(item.grad, side, low.dtype), low, side, inside=inside)
        else:
            energies = yield torch.stack([
                _energy(normed, subspace, per_channel=self.per_channel),
                _energy(low, subspace, per_channel=self.per_channel),
                _of_matrix(channel_energy(item.grad, side, low.dtype), per_channel=self.per_channel),
            ])  # fmt: skip
            over, under, energy = energies
            factor = over.sqrt() / (under.sqrt() + SAFE)
            square = (factor.square() * (energy - (2 * inside - inside**2) * under).clamp_(min=0.0)).sum()
        if not self.residual:
            del normed, low
        factor = limit_growth_(factor, square.sqrt_(), state["growth"])
        # Everything the weight takes is -lr a times something; the authors decay afterwards what we decay before.
        bias = 1.0 if corrected else rule.bias(state["step"], group)
        alpha = -lr * bias * (decay if authors else 1.0)
        if self.residual:
            inner = factor[subspace.low.mine] if subspace.cut and side == "right" else factor
            back: Tensor | None = subspace.spread((normed - low * inner).mul_(alpha * inside))
            factor = factor * alpha
        else:
            back, factor = None, factor * (alpha * math.sqrt(group["scale"]))
        scaled_add_(item, factor, back, basis, side, beta=decay)


LIFTS: dict[str, Lift] = {
    "back": Lift(),
    "channel": Scaled(),
    "tensor": Scaled(per_channel=False),
    "fira": Scaled(residual=True),
}


def scaling(normed: Tensor, low: Tensor, side: Side, *, per_channel: bool) -> Tensor:
    """s = |N| / |R|, shaped to multiply a gradient: (m, 1) for a right projection, (1, n) for a left, or (1, 1)."""
    axes = (0 if side == "left" else 1) if per_channel else (0, 1)
    over, under = (torch.linalg.vector_norm(x, dim=axes, keepdim=True) for x in (normed, low))
    found: Tensor = over / (under + SAFE)
    return found


def scaled_square(factor: Tensor, energy: Tensor, low: Tensor, side: Side, *, inside: float) -> Tensor:
    """|(G - inside back(R)) s|^2 from the `energy` of G's channels; for an orthonormal basis if `inside` is not 0."""
    if inside:
        energy = energy - (2 * inside - inside**2) * low.square().sum(0 if side == "left" else 1, keepdim=True)
    return (factor.square() * energy.clamp_(min=0.0)).sum()


def _energy(low: Tensor, subspace: Subspace, *, per_channel: bool) -> Tensor:
    """This rank's part of the energy of each channel of R or N, or of all of it, shaped to add up over the ranks."""
    if not per_channel:
        return _of_matrix(low.square().sum(), per_channel=False)
    if subspace.side == "left":
        return low.square().sum(0, keepdim=True)
    channels = low.new_zeros((subspace.shape[0], 1))
    channels[subspace.low.mine] = low.square().sum(1, keepdim=True)
    return channels


def _of_matrix(channels: Tensor, *, per_channel: bool) -> Tensor:
    return channels if per_channel else channels.sum().view(1, 1)


def channel_energy(grad: Tensor, side: Side, dtype: torch.dtype) -> Tensor:
    """Sum of squares of each channel: (m, 1) for a right projection, (1, n) for a left one."""
    if side == "right":
        norms: Tensor = torch.linalg.vector_norm(grad, dim=1, keepdim=True, dtype=dtype)
        return norms.square_()
    # torch's norm over the first axis takes 10 times as long as this.
    total = grad.new_zeros((1, grad.shape[1]), dtype=dtype)
    for rows in row_chunks(grad, CHUNK):
        total += grad[rows].to(dtype).square().sum(0, keepdim=True)
    return total


def limit_growth_(factor: Tensor, size: Tensor, growth: Tensor) -> Tensor:
    """Shrink s so that the update's norm exceeds the last by no more than GROWTH; remember the norm in `growth`.

    No last norm, at the first step or after an update of zero, is no limit.
    """
    limit = torch.where(growth > 0, (size / (growth + SAFE)).clamp(min=GROWTH) / GROWTH, 1.0)
    growth.copy_(size / limit)
    return factor / limit


def scaled_add_(item: Stepped, factor: Tensor, back: Tensor | None, basis: Tensor, side: Side, *, beta: float) -> None:
    """W <- beta W + G factor + back(`back`). A weight of lower precision is widened and rounded once, by chunks."""
    weight, grad = item.param, item.grad
    for rows in row_chunks(weight, CHUNK):
        part = weight[rows]
        wide = part if weight.dtype == basis.dtype else part.to(basis.dtype)
        if back is not None:
            left, right = (basis[:, rows].T, back) if side == "left" else (back[rows], basis)
            wide.addmm_(left, right, beta=beta)
        elif beta != 1.0:
            wide.mul_(beta)
        wide.addcmul_(grad[rows].to(wide.dtype), factor[rows] if factor.shape[0] > 1 else factor)
        if wide is not part:
            item.store(part, wide)


def _rates(group: Group) -> tuple[float, float, bool]:
    lr = float(group["lr"])
    return lr, 1.0 - lr * group["weight_decay"], group.get("compat") == "authors"
