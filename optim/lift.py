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

from optim import fused
from optim.base import Group, piece, state_dtype
from optim.products import add_product_
from optim.projection import Side, add_back_
from optim.rules import Rule, Stepped, row_chunks
from optim.sharded import sum_parts
from optim.subspace import Subspace

GROWTH = 1.01
"""Largest ratio between the norms of two updates in a row (gamma; Fira, section 4.2)."""
SAFE = 1e-8
"""Added to norms that divide, as the authors' packages do."""


@dataclass
class Projected:
    """A matrix in the midst of its step: R and the basis, as this rank has and needs them; see `Subspace`."""

    item: Stepped
    subspace: Subspace
    basis: Tensor
    low: Tensor


@dataclass(frozen=True)
class Lift:
    """A way back; `limited` ones keep the norm of the last update in `growth`, `linear` ones need of the gradient what
    its projection holds."""

    limited: bool = False
    linear: bool = True

    def step_(self, batch: list[Projected], rule: Rule, group: Group) -> None:
        """Step matrices of one device and dtype in place."""
        lr, decay, after = _rates(group, rule)
        alpha = group["scale"] * (decay if after else 1.0)
        dtype = torch.bfloat16 if group["products"] == "bf16" else None  # no more is used of the step
        for each, step in zip(batch, steps_of(batch, rule, group, lr=lr, dtype=dtype), strict=True):
            add_back_(
                each.item.param, each.subspace.spread(step), each.basis, each.subspace.side,
                beta=decay, alpha=alpha, store=each.item.store, products=group["products"],
            )  # fmt: skip


@dataclass(frozen=True)
class Scaled(Lift):
    per_channel: bool = True
    residual: bool = False
    limited: bool = True
    linear: bool = False

    def step_(self, batch: list[Projected], rule: Rule, group: Group) -> None:
        lr, decay, after = _rates(group, rule)
        corrected = group.get("q_compat", False)  # as the authors' Q-APOLLO: the limiter sees Adam's correction too
        normed = steps_of(batch, rule, group, lr=-1.0, raw=not corrected)
        inside = group["scale"] if self.residual else 0.0
        factors, sizes = self._scales(batch, normed, inside)
        limit_growth_(factors, sizes, [each.item.state["growth"] for each in batch])
        for each, step, factor in zip(batch, normed, factors, strict=True):
            # Everything the weight takes is -lr a times something; the authors decay afterwards what we decay before.
            bias = 1.0 if corrected else rule.bias(each.item.state["step"], group)
            alpha = -lr * bias * (decay if after else 1.0)
            subspace, back = each.subspace, None
            if self.residual:
                inner = factor[subspace.low.mine] if subspace.cut and subspace.side == "right" else factor
                back = subspace.spread(step.addcmul_(each.low, inner, value=-1.0).mul_(alpha * inside))
            else:
                alpha *= math.sqrt(group["scale"])
            scaled_add_(
                each.item, factor.mul_(alpha), back, each.basis, subspace.side, beta=decay, products=group["products"]
            )

    def _scales(self, batch: list[Projected], normed: list[Tensor], inside: float) -> tuple[list[Tensor], Tensor]:
        """s of each matrix, shaped to multiply its gradient, and the norms |(G - inside back(R)) s|, (matrices,)."""
        over, under, whole = (
            [norms(x, each.subspace.side, per_channel=self.per_channel) for each, x in zip(batch, values, strict=True)]
            for values in (normed, [each.low for each in batch], [each.item.grad for each in batch])
        )
        partial = [i for i, each in enumerate(batch) if self._is_partial(each)]
        if partial:
            parts = [torch.stack([*self._placed(batch[i], over[i], under[i]), whole[i]]).square_() for i in partial]
            totals = sum_parts([(batch[i].item.layout, part) for i, part in zip(partial, parts, strict=True)])
            for i, total in zip(partial, totals, strict=True):
                over[i], under[i], whole[i] = total.sqrt_().unbind()
        factors = list(torch._foreach_div(over, torch._foreach_add(under, SAFE)))
        if inside:
            squares = torch._foreach_mul(whole, whole)
            torch._foreach_addcmul_(squares, under, under, value=inside**2 - 2 * inside)
            torch._foreach_clamp_min_(squares, 0.0)
            whole = list(torch._foreach_sqrt(squares))
        sizes = list(torch._foreach_norm(torch._foreach_mul(factors, whole)))
        # Ranks with channels of their own have parts of the norm.
        own = [i for i, each in enumerate(batch) if not each.item.layout.whole and i not in partial]
        if own:
            totals = sum_parts([(batch[i].item.layout, sizes[i].square()) for i in own])
            for i, total in zip(own, totals, strict=True):
                sizes[i] = total.sqrt()
        return factors, torch.stack(sizes)

    def _placed(self, each: Projected, *channels: Tensor) -> list[Tensor]:
        """Norms of N and R for all channels, with zeros for those of other ranks."""
        if not self.per_channel or each.subspace.side == "left":
            return list(channels)
        found = [x.new_zeros((each.subspace.shape[0], 1)) for x in channels]
        for every, mine in zip(found, channels, strict=True):
            every[each.subspace.low.mine] = mine
        return found

    def _is_partial(self, each: Projected) -> bool:
        """Whether the norms that s is made of are sums over ranks."""
        return not each.item.layout.whole and (each.subspace.cut or not self.per_channel)


LIFTS: dict[str, Lift] = {
    "back": Lift(),
    "channel": Scaled(),
    "tensor": Scaled(per_channel=False),
    "fira": Scaled(residual=True),
}


def steps_of(
    batch: list[Projected], rule: Rule, group: Group, *, lr: float, raw: bool = False, dtype: torch.dtype | None = None
) -> list[Tensor]:
    """What the rule makes of weights of zero, which stand in for those of the matrices: -lr N for each R.

    Args:
        dtype: narrower than R, if no more of a step is used; taken where that saves bytes.
    """
    fresh = all(each.item.layout.whole and rule.takes_fresh(each.low) for each in batch)
    sizes = [each.low.numel() for each in batch]
    low = batch[0].low
    flat = low.new_empty(sum(sizes), dtype=dtype) if fresh else low.new_zeros(sum(sizes))
    steps = [part.view(each.low.shape) for part, each in zip(torch.split(flat, sizes), batch, strict=True)]
    items = [
        Stepped(step, each.low, each.item.state, layout=each.subspace.low, fresh=fresh)
        for step, each in zip(steps, batch, strict=True)
    ]
    rule.step_(items, group, lr=lr, weight_decay=0.0, raw=raw)
    return steps


def norms(x: Tensor, side: Side, *, per_channel: bool) -> Tensor:
    """Norm of each channel of G, R or N, (m, 1) for a right projection and (1, n) for a left one, or of all, (1, 1).

    In fp32 at least.
    """
    wide = state_dtype(x.dtype)
    if not per_channel:
        total: Tensor = torch.linalg.vector_norm(x, dtype=wide)
        return total.view(1, 1)
    if side == "right" or x.is_cuda:
        found: Tensor = torch.linalg.vector_norm(x, dim=1 if side == "right" else 0, keepdim=True, dtype=wide)
        return found
    # On a CPU torch's norm over the first axis takes 10 times as long as this.
    squares = x.new_zeros((1, x.shape[1]), dtype=wide)
    for rows in row_chunks(x, piece(x)):
        squares += x[rows].to(wide).square().sum(0, keepdim=True)
    return squares.sqrt_()


def limit_growth_(factors: list[Tensor], sizes: Tensor, growths: list[Tensor]) -> None:
    """Shrink each s so that its update's norm exceeds the last by no more than GROWTH; remember the norm in `growths`.

    No last norm, at the first step or after an update of zero, is no limit.
    """
    last = torch.stack(growths)
    limits = torch.where(last > 0, (sizes / (last + SAFE)).clamp_(min=GROWTH).div_(GROWTH), 1.0)
    torch._foreach_copy_(growths, list((sizes / limits).unbind()))
    torch._foreach_div_(factors, list(limits.unbind()))


def scaled_add_(
    item: Stepped, factor: Tensor, back: Tensor | None, basis: Tensor, side: Side, *, beta: float, products: str
) -> None:
    """W <- beta W + G factor + back(`back`). A weight of lower precision is widened and rounded once, by chunks."""
    weight, grad = item.param, item.grad
    if back is None and fused.usable(weight, grad) and fused.writes(item.store):
        fused.scaled_add_(weight, grad, factor, beta=beta, store=item.store)
        return
    add_back = add_product_ if products == "bf16" else Tensor.addmm_
    for rows in row_chunks(weight, piece(weight)):
        part = weight[rows]
        wide = part if weight.dtype == basis.dtype else part.to(basis.dtype)
        if back is not None:
            left, right = (basis[:, rows].T, back) if side == "left" else (back[rows], basis)
            add_back(wide, left, right, beta=beta, alpha=1.0)
        elif beta != 1.0:
            wide.mul_(beta)
        wide.addcmul_(grad[rows].to(wide.dtype), factor[rows] if factor.shape[0] > 1 else factor)
        if wide is not part:
            item.store(part, wide)


def _rates(group: Group, rule: Rule) -> tuple[float, float, bool]:
    """Learning rate, what decay leaves of a weight, whether the update decays with it."""
    lr = float(group["lr"])
    after = rule.authors_decay_last and group.get("compat") == "authors"
    return lr, 1.0 - lr * group["weight_decay"], after
