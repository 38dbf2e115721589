"""What becomes of a matrix's moments when its basis is replaced: the option `on_refresh`.

With C = Q_new Q_old^T (r, r), m and v the moments of R:
    keep        nothing, as in the authors' packages: along each row they go on with what they knew of another
    sign        rows of Q_new that point away from those of Q_old are turned round
    procrustes  Q_new is turned within its span to lie as near Q_old as it can: polar(C)^T Q_new
    rotate      m and v follow: m C^T and v (C*C)^T for a right projection, C m and (C*C) v for a left one
    reset       m, v and the step count begin anew
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from optim.base import State
from optim.codec import codec_for
from optim.projection import Side
from optim.rules import Moment
from parallel.dtensor import Layout


def turned(new: Tensor, turn: Tensor, how: str) -> Tensor:
    """The new basis (r, k) as `how` wants it; `turn` is C."""
    if how == "sign":
        return new * torch.where(turn.diagonal() < 0, -1.0, 1.0).to(new.dtype)[:, None]
    if how == "procrustes":
        u, _, vh = torch.linalg.svd(turn)
        found: Tensor = (u @ vh).T @ new
        return found
    return new


def rotate_(state: State, moments: Sequence[Moment], turn: Tensor, side: Side, low: Layout, states: str) -> None:
    """Let the moments follow by C; `low` is the layout of R, `states` the name of their codec."""
    codec = codec_for(states, low.shape)
    home = codec.home(low)
    for moment in moments:
        width = home.local_shape[1]
        values = codec.read(state, moment.key, slice(None), turn.dtype, signed=moment.signed, width=width)
        by = (turn if moment.power == 1 else turn.square()).to(values.dtype)
        if side == "right":
            found = values @ by.T
        elif home.dim == 0:  # rows of the moments are on several ranks, and each of the turned ones is made of all
            found = home.scatter(by[:, home.mine] @ values)
        else:
            found = by @ values
        if codec.in_place:
            state[moment.key].copy_(found)
        else:
            codec.write(state, moment.key, slice(None), found, signed=moment.signed)


def reset_(state: State, kept: set[str]) -> None:
    """Zero the step count and all tensors but those named in `kept`."""
    state["step"] = 0
    for key, value in state.items():
        if isinstance(value, Tensor) and key not in kept:
            value.zero_()
