"""Taking over the states of a run that torch, bitsandbytes or torchao began.

    optimizer = AdamW(model.parameters(), lr=1e-4, states="int8")
    adopt(optimizer, torch.load("optimizer.pt", weights_only=True))     # saved by bitsandbytes.optim.AdamW8bit

bitsandbytes and torchao count blocks through the whole tensor, we begin one at each row. Where rows are whole blocks
(their length divides by 256, or by 128 for 4 bits) both lie alike, the code books are the same, and the bytes are
copied as they are. Elsewhere a moment is decoded, and encoded again in our blocks where our state is coded: one more
rounding to the nearest code, once. torchao's FP8 is not COAT's and always goes that way.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from optim.base import MemoryOptimizer, State, state_dtype
from optim.codec import PLAIN, Codec, Dynamic, codec_for

WRAPPED = "__bnb_optimizer_quant_state__"
"""Where bitsandbytes hides codes from FSDP in what its state_dict returns."""
BNB_BLOCK = 256


def adopt(optimizer: MemoryOptimizer, state_dict: dict[str, Any]) -> list[str]:
    """Load moments and step counts of another package's AdamW into an AdamW of ours, for the same parameters in order.

    Groups and their options stay ours. Parameters without a saved state keep their fresh one.

    Args:
        optimizer: an unprojected AdamW with any `states`.
        state_dict: of `torch.optim.AdamW`, bitsandbytes' `AdamW8bit` or `AdamW`, or torchao's `AdamW8bit`, `AdamW4bit`
            or `AdamWFp8`, as `state_dict()` gives it or `torch.load` reads it.

    Returns:
        Names of the parameters whose moments could not be taken over bit for bit.

    Raises:
        ValueError: another number of parameters, or a state that is not of such an optimizer. Nothing is changed.
    """
    ids = [i for group in state_dict["param_groups"] for i in group["params"]]
    params = [(p, group) for group in optimizer.param_groups for p in group["params"]]
    if len(ids) != len(params):
        raise ValueError(f"the saved optimizer has {len(ids)} parameters, this one {len(params)}")
    pairs = []
    for i, (p, group) in zip(ids, params, strict=True):
        if i not in state_dict["state"]:
            continue
        saved = state_dict["state"][i]
        saved = {**saved, **saved.get(WRAPPED, {})}
        name = optimizer.name_of(p)
        if "exp_avg_sq" not in optimizer.state[p] or "basis" in optimizer.state[p]:
            raise ValueError(f"{type(optimizer).__name__} keeps no moments of the shape of {name}; adopt into AdamW")
        moments = dict(_moments(saved, p, name))
        pairs.append((p, group, int(saved["step"]), moments))
    rounded = []
    for p, group, step, moments in pairs:
        state = optimizer.state[p]
        state["step"] = step
        codec = codec_for(group["states"], p.shape)
        exact = [_take(state, key, moment, p, codec) for key, moment in moments.items()]
        if not all(exact):
            rounded.append(optimizer.name_of(p))
    return rounded


class _Coded:
    """A moment in another package's codes, blocks counted through the whole tensor."""

    def __init__(self, codes: Tensor, scale: Tensor, table: Tensor | None, bits: int, block: int) -> None:
        self.codes, self.scale, self.table, self.bits, self.block = codes, scale, table, bits, block

    def values(self, shape: torch.Size) -> Tensor:
        flat = self.codes.flatten()
        if self.bits == 4:
            flat = torch.stack([flat >> 4, flat & 15], dim=-1).flatten()
        unit = flat.float() if self.table is None else self.table.float()[flat.int()]
        scales = self.scale.float().repeat_interleave(self.block)[: shape.numel()]  # the last block may be short
        return (unit * scales).view(shape)


def _moments(saved: State, p: Tensor, name: str) -> Iterator[tuple[str, "Tensor | _Coded"]]:
    """Yield both moments of a saved state under our keys."""
    keys = ("exp_avg", "exp_avg_sq")
    theirs = ("state1", "state2") if "state1" in saved else keys
    if not {"step", *theirs} <= saved.keys():
        raise ValueError(f"the saved state of {name} is not that of an AdamW: it holds {', '.join(saved)}")
    for number, (key, their) in enumerate(zip(keys, theirs, strict=True), start=1):
        moment = saved[their]
        if moment.numel() != p.numel():
            raise ValueError(f"saved {their} of {name} has {moment.numel()} values, the parameter {p.numel()}")
        if f"absmax{number}" in saved:
            yield key, _Coded(moment, saved[f"absmax{number}"], saved[f"qmap{number}"], 8, BNB_BLOCK)
        elif hasattr(moment, "codes"):  # torchao's tensor classes
            bits = 4 if 2 * moment.codes.numel() == moment.numel() else 8
            yield key, _Coded(moment.codes, moment.scale, getattr(moment, "qmap", None), bits, moment.block_size)
        else:
            yield key, moment


def _take(state: State, key: str, moment: Tensor | _Coded, p: Tensor, codec: Codec) -> bool:
    """Write one moment. Whether not a bit was lost."""
    if isinstance(moment, _Coded):
        same = isinstance(codec, Dynamic) and (codec.bits, codec.block) == (moment.bits, moment.block)
        if same and moment.table is not None and p[0].numel() % moment.block == 0:
            state[key].copy_(moment.codes.view(state[key].shape))
            state[key + "_scale"].copy_(moment.scale.view(state[key + "_scale"].shape))
            return True
        moment = moment.values(p.shape).to(p.device)
    if codec is PLAIN:
        state[key].copy_(moment)
        return True
    values = moment.to(device=p.device, dtype=state_dtype(p.dtype))
    codec.write(state, key, slice(None), values, signed=key == "exp_avg")
    return False
