"""Linear attention token by token, as its recurrence is written. Slow and obvious; differentiable by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor


def recurrent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts: Sequence[Sequence[int]],
    decay: Tensor | None = None,
    *,
    causal: bool = True,
) -> Tensor:
    """S_i = a_i S_(i-1) + k_i^T v_i and o_i = q_i S_i, with a = 0 where a document begins.

    Args:
        q: (batch, heads, tokens, width); k, v: (batch, key heads, tokens, width), each shared by neighbouring heads.
        starts: for each row the places where documents begin.
        decay: logarithms, (key heads,) or (batch, key heads, tokens); None: a = 1.
        causal: otherwise every token reads the sum of k^T v of its document.
    """
    share = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    length, rows = q.shape[2], []
    for row, begins in enumerate(starts):
        if not causal:
            borders = [*begins, length]
            parts = [slice(*pair) for pair in zip(borders, borders[1:], strict=False)]
            totals = [k[row, :, part].transpose(-1, -2) @ v[row, :, part] for part in parts]
            rows.append(torch.cat([q[row, :, part] @ total for part, total in zip(parts, totals, strict=True)], 1))
            continue
        state, outs = torch.zeros(q.shape[1], k.shape[-1], v.shape[-1], dtype=q.dtype), []
        for i in range(length):
            left = torch.zeros(q.shape[1], dtype=q.dtype) if i in begins else left_of(decay, row, i, share, q)
            state = left[:, None, None] * state + k[row, :, i, :, None] * v[row, :, i, None, :]
            outs.append((q[row, :, i, None, :] @ state)[:, 0])
        rows.append(torch.stack(outs, 1))
    return torch.stack(rows)


def left_of(decay: Tensor | None, row: int, i: int, share: int, q: Tensor) -> Tensor:
    """a_i of each head."""
    if decay is None:
        return torch.ones(q.shape[1], dtype=q.dtype)
    of_keys = decay if decay.dim() == 1 else decay[row, :, i]
    return of_keys.to(q.dtype).exp().repeat_interleave(share)


def positions_of(starts: Sequence[Sequence[int]], length: int) -> Tensor:
    """(rows, length) of places within documents."""
    rows = [torch.arange(length) for _ in starts]
    for row, begins in zip(rows, starts, strict=True):
        for begin in begins:
            row[begin:] -= row[begin].item()
    return torch.stack(rows)
