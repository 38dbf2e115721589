"""What the user says about rotary position embeddings (RoPE), and what a model's own configuration says about them.

A token at position m turns pair j of a head of width d by m theta_j, theta_j = base^(-2j/d). Beyond the length that a
model was trained with come angles that it has never seen; every type here but `none` makes them smaller.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any


class RopeType(Enum):
    keep = "keep"
    none = "none"
    linear = "linear"
    ntk = "ntk"
    dynamic = "dynamic"
    yarn = "yarn"
    llama3 = "llama3"
    longrope = "longrope"


SCALED = (RopeType.linear, RopeType.ntk, RopeType.dynamic, RopeType.yarn, RopeType.llama3, RopeType.longrope)
OWN: dict[RopeType, tuple[str, ...]] = {
    RopeType.yarn: ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    RopeType.llama3: ("low_freq_factor", "high_freq_factor"),
    RopeType.longrope: ("short_factor", "long_factor", "attention_factor"),
}
"""Options that some types have beside the common ones."""


@dataclass(kw_only=True)
class RopeConfig:
    """Names and meanings are those of transformers' `rope_parameters`, which an export writes."""

    type: RopeType = RopeType.keep
    """How positions beyond the original length are told apart. keep: as the model's config.json has it. none: unscaled
    (with `base`: Adjusted Base Frequency). linear: all frequencies divided by `factor` (position interpolation). ntk: a
    base at which the lowest frequency is divided by `factor` and the highest kept. dynamic: ntk by the length of a row
    (data.sequence_length), unscaled up to the original one. yarn: frequencies that turn often are kept, slow ones
    divided, and scores sharpened. llama3: the same by wavelength, as Llama 3.1. longrope: divisors of their own."""
    factor: float | None = None
    """How many times its original length a model takes afterwards; at least 1, which scales nothing."""
    original_length: int | None = None
    """Tokens the model was first trained with, where its config.json does not say: one that is scaled already."""
    base: float | None = None
    """A new base for a model that is read, 500000 in place of 10000 say; of a new one it is model.rope_theta."""
    beta_fast: float | None = None
    """yarn: frequencies of more turns than this over the original length are kept. Default: 32."""
    beta_slow: float | None = None
    """yarn: frequencies of fewer turns than this are divided by `factor`. Default: 1."""
    attention_factor: float | None = None
    """yarn, longrope: what queries and keys are multiplied by. Default: 0.1 ln(factor) + 1 for yarn,
    sqrt(1 + ln(factor) / ln(original length)) for longrope."""
    mscale: float | None = None
    """yarn, with `mscale_all_dim`: multiplied by (0.1 mscale ln(factor) + 1) / (0.1 mscale_all_dim ln(factor) + 1)."""
    mscale_all_dim: float | None = None
    """yarn: see `mscale`."""
    truncate: bool | None = None
    """yarn: whether the bounds between kept and divided frequencies are rounded to whole ones. Default: true."""
    low_freq_factor: float | None = None
    """llama3: wavelengths above the original length over this are stretched by `factor`. Default: 1."""
    high_freq_factor: float | None = None
    """llama3: wavelengths below the original length over this are kept. Default: 4."""
    short_factor: list[float] | None = None
    """longrope: divisors, one for each pair of a head, of rows up to the original length."""
    long_factor: list[float] | None = None
    """longrope: divisors of longer rows."""

    def problems(self) -> list[str]:
        """Say what is wrong with the options by themselves."""
        found = self.idle_problems() or self.number_problems()
        if self.type is RopeType.yarn:
            found += self.yarn_problems()
        if self.type is RopeType.longrope:
            found += self.longrope_problems()
        low, high = self.low_freq_factor or 1.0, self.high_freq_factor or 4.0
        if self.type is RopeType.llama3 and not 0 < low < high:
            found.append(
                f"model.rope.low_freq_factor={low:g} and model.rope.high_freq_factor={high:g}: the first must lie "
                "between 0 and the second; Llama 3.1 has 1 and 4"
            )
        return found

    def idle_problems(self) -> list[str]:
        """An option that the type does not read would be ignored."""
        common = () if self.type is RopeType.keep else ("factor", "original_length", "base")
        own = OWN.get(self.type, ())
        found = [
            f"model.rope.{name}: has no effect with model.rope.type={self.type.value}; {remedy(name)}"
            for name in self.given()
            if name not in (*common, *own)
        ]
        if self.factor == 1 and self.type is not RopeType.longrope:
            found += [
                f"model.rope.{name}: has no effect with model.rope.factor=1, which scales nothing; leave it out"
                for name in self.given()
                if name in own
            ]
        return found

    def number_problems(self) -> list[str]:
        found = []
        if self.factor is not None and self.factor < 1:
            found.append(f"model.rope.factor={self.factor:g}: must be at least 1, the new length over the original one")
        least = {"original_length": 2, "base": 1.0, "attention_factor": 0.0, "beta_fast": 0.0, "beta_slow": 0.0}
        for name, bound in least.items():
            value = getattr(self, name)
            if value is not None and value <= bound:
                found.append(f"model.rope.{name}={value:g}: must be above {bound:g}; leave it out for the usual value")
        return found

    def yarn_problems(self) -> list[str]:
        found = []
        fast, slow = self.beta_fast or 32.0, self.beta_slow or 1.0
        if fast <= slow:
            found.append(
                f"model.rope.beta_fast={fast:g}: must be above model.rope.beta_slow={slow:g}; 32 and 1 are usual"
            )
        if (self.mscale is None) != (self.mscale_all_dim is None):
            given = "mscale" if self.mscale is not None else "mscale_all_dim"
            found.append(
                f"model.rope.{given}: has no effect alone; give model.rope.mscale and mscale_all_dim, or neither"
            )
        if self.mscale is not None and self.attention_factor is not None:
            found.append("model.rope.mscale: has no effect beside model.rope.attention_factor; leave one of them out")
        return found

    def longrope_problems(self) -> list[str]:
        found = []
        for name in ("short_factor", "long_factor"):
            divisors = getattr(self, name)
            if not divisors or min(divisors) <= 0:
                found.append(
                    f"model.rope.{name}: model.rope.type=longrope needs a list of divisors above 0, one for each pair "
                    "of a head; where a search has not found better ones, model.rope.type=yarn needs none"
                )
        return found

    def given(self) -> list[str]:
        """Names of the options, but for the type, that were set."""
        return [entry.name for entry in fields(self) if entry.name != "type" and getattr(self, entry.name) is not None]

    def longest(self, before: int | None, held: Mapping[str, Any]) -> int | None:
        """Return the most tokens a model takes whose own configuration says `before` and `held`; None: not known."""
        if self.type is RopeType.keep:
            grows = before is not None and kind_of(held) == "dynamic"
            return round(before * float(held.get("factor") or 1)) if grows and before is not None else before
        original = self.original_length or original_length(held, before)
        return None if original is None or not math.isfinite(self.times) else round(original * self.times)

    @property
    def times(self) -> float:
        """`factor`, 1 where none is given."""
        return 1.0 if self.factor is None else self.factor


def remedy(name: str) -> str:
    having = [kind.value for kind, names in OWN.items() if name in names] or [kind.value for kind in SCALED]
    return f"use model.rope.type={' or '.join(having)}, or leave it out"


def kind_of(held: Mapping[str, Any]) -> str:
    """Return the type that transformers' `rope_parameters`, or the `rope_scaling` of old, name."""
    return str(held.get("rope_type") or held.get("type") or "default")


def unknown_original(asked: str, held: Mapping[str, Any]) -> str:
    """Say that what is scaled already cannot be scaled again without knowing from where."""
    return (
        f"{asked}: the model's positions are scaled already ({kind_of(held)}, factor {held.get('factor')}), from a "
        "length that its config.json does not say; give it, model.rope.original_length=N"
    )


def original_length(held: Mapping[str, Any], longest: int | None) -> int | None:
    """Return the length before any scaling; None where `held` is scaled and does not say: what `longest` counts then
    differs from file to file."""
    said = held.get("original_max_position_embeddings")
    if said is not None:
        return int(said)
    return None if kind_of(held) == "linear" else longest
