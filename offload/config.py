"""What happens to saved activations, and which bytes leave the device."""

import re
import tempfile
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path


class Fate(Enum):
    """What becomes of the tensors that a block saves for backward."""

    keep = "keep"
    recompute = "recompute"
    selective = "selective"
    host = "host"
    disk = "disk"
    int8 = "int8"
    fp8 = "fp8"


MOVED = (Fate.host, Fate.disk)
COMPRESSED = (Fate.int8, Fate.fp8)
EXACT = (Fate.keep, Fate.recompute, Fate.selective, *MOVED)


class WhenFull(Enum):
    """What to do with an activation that its tier has no room for."""

    keep = "keep"
    stop = "stop"


class StatePlace(Enum):
    """Where optimizer states are between two steps."""

    none = "none"
    host = "host"
    disk = "disk"


class StepPlace(Enum):
    """Where parameters step whose states are in host memory."""

    device = "device"
    host = "host"


@dataclass(frozen=True)
class Rule:
    """One line of `activations.rules`, taken apart."""

    text: str
    module: str | None
    """Regular expression searched in the full name of the module that saves; None: any."""
    operator: str | None
    """Name of the function that saves, such as `silu`; None: any."""
    fate: Fate


def parse_rule(text: str) -> Rule:
    """Take `PATTERN -> FATE` apart, where PATTERN is `MODULE`, `OPERATOR()` or `MODULE OPERATOR()`.

    Raises:
        ValueError: says what is wrong with it, and what to do.
    """
    pattern, arrow, name = (part.strip() for part in text.rpartition("->"))
    if not arrow or not pattern:
        raise ValueError("is not of the form 'PATTERN -> FATE'; write for example 'mlp -> host' or 'silu() -> int8'")
    if name not in Fate.__members__ or name == Fate.selective.name:
        fates = ", ".join(fate.name for fate in Fate if fate is not Fate.selective)
        raise ValueError(f"{name or 'nothing'} is no fate of a rule; use one of {fates}")
    found = re.fullmatch(r"(?:(?P<module>.*)\s)?(?P<operator>\w+)\(\)", pattern)
    module, operator = (found["module"], found["operator"]) if found else (pattern, None)
    try:
        re.compile(module or "")
    except re.error as error:
        raise ValueError(f"{module} is no regular expression ({error}); write . and () with care") from error
    return Rule(text, module or None, operator, Fate[name])


@dataclass(kw_only=True)
class ActivationsConfig:
    fate: Fate = Fate.keep
    """Set by `activations=...`. What becomes of what a block saves for backward, where no rule says otherwise. `keep`:
    as autograd keeps it. `recompute`: each block keeps its input and runs again in backward. `selective`: the same, but
    attention and every second matrix product keep their results. `host`, `disk`: moved there during forward and
    fetched back ahead of backward. `int8`, `fp8`: kept as 8-bit codes with a scale for each group of neighbours."""
    rules: list[str] = field(default_factory=list)
    """What becomes of some of it: the first rule that matches wins. 'PATTERN -> FATE', where PATTERN is a regular
    expression searched in the names of modules ('layers.0.mlp -> keep'), the function that saves ('silu() -> int8'), or
    both ('mlp linear() -> host')."""
    inputs: Fate = Fate.keep
    """What becomes of the inputs of recomputed blocks: keep, host, disk, int8 or fp8."""
    attention: Fate | None = None
    """What recomputed blocks do about attention. keep: hold its output and row sums, a hidden state a block, so that
    all else runs again; keys and values that went round need not do so again. recompute: run it again, too. Default:
    keep with parallel.sequence=lightseq, as its authors do (unless activations.inputs is int8 or fp8), or recompute."""
    keep_last: int = 1
    """The last blocks, whose backward comes at once, keep what they save: nothing would be gained by moving it."""
    min_bytes: int = 65536
    """Smaller storages stay as they are: moving each would cost more than it frees."""
    host_gib: float | None = None
    """GiB of host memory (pinned beside CUDA) that activations of one rank may take; default: no limit."""
    disk_gib: float | None = None
    """GiB of files that activations of one rank may take; default: what the disk has."""
    disk_dir: str | None = None
    """Folder on the disk that takes them, best a local SSD; default: the system's folder for temporary files. The files
    have no names, so nothing of them is left however the run ends."""
    when_full: WhenFull = WhenFull.keep
    """What to do when a tier is full or fails to take an activation: `keep` it on the device, or `stop` the run."""
    lean: bool = False
    """Whether norms, gated MLPs and grouped attention of LLaMA-like models are computed so that they save the least:
    about 16 hidden states a block instead of 23. The same forward, bit for bit; norms' gradients are rounded anew. On
    CUDA by Liger's kernels where liger-kernel is installed, equal to rounding."""
    tile_mlp: int = 1
    """Pieces along the tokens that each MLP runs in, one after the other and again in backward; 1: whole. Exact."""

    def problems(self) -> list[str]:
        return [*self._number_problems(), *self._rule_problems(), *self._tier_problems()]

    def parsed(self) -> list[Rule]:
        """`rules`, taken apart."""
        return [parse_rule(rule) for rule in self.rules]

    def fates(self) -> set[Fate]:
        """Every fate that something may meet."""
        return {self.fate, self.inputs, *(rule.fate for rule in self.parsed())}

    def folder(self) -> Path:
        """Where the disk tier's files are made."""
        return Path(self.disk_dir or tempfile.gettempdir())

    def _number_problems(self) -> list[str]:
        found = [
            f"activations.{name}={value}: must be at least {least}; use activations.{name}={least} or more"
            for name, least in {"keep_last": 0, "min_bytes": 0, "tile_mlp": 1}.items()
            if (value := getattr(self, name)) < least
        ]
        for name in ("host_gib", "disk_gib"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                found.append(f"activations.{name}={value}: must be above 0; null sets no limit")
        return found

    def _rule_problems(self) -> list[str]:
        found = []
        for text in self.rules:
            try:
                rule = parse_rule(text)
            except ValueError as error:
                found.append(f"activations.rules='{text}': {error}")
                continue
            if rule.operator and rule.fate is Fate.recompute:
                found.append(
                    f"activations.rules='{text}': one operator cannot run again by itself; recompute its module "
                    "('mlp -> recompute'), and name in rules before it what that keeps ('linear() -> keep')"
                )
        return found

    def _attention_problems(self, fates: set[Fate]) -> list[str]:
        """Keeping attention's results is a matter of blocks that run again."""
        if self.attention is None:
            return []
        asked = f"activations.attention={self.attention.value}"
        if self.attention not in (Fate.keep, Fate.recompute):
            return [f"{asked}: must be keep or recompute; rules say where what attention saves goes"]
        if Fate.selective in fates:
            return [f"{asked}: has no effect, as activations=selective keeps it; leave it out, or use recompute"]
        if Fate.recompute not in fates:
            return [f"{asked}: has no effect, as nothing is recomputed; use it with activations=recompute"]
        return []

    def _tier_problems(self) -> list[str]:
        """A limit or a folder for a tier that nothing goes to would be ignored."""
        found = []
        try:
            fates = self.fates()
        except ValueError:
            return []
        if self.inputs in (Fate.recompute, Fate.selective):
            found.append(
                f"activations.inputs={self.inputs.value}: what a block is given cannot be recomputed; "
                "use keep, host, disk, int8 or fp8"
            )
        elif self.inputs is not Fate.keep and not fates & {Fate.recompute, Fate.selective}:
            found.append(
                f"activations.inputs={self.inputs.value}: has no effect, as nothing is recomputed; "
                "use it with activations=recompute or activations=selective"
            )
        found += self._attention_problems(fates)
        elsewhere, codes = bool(fates & set(MOVED)), bool(fates & set(COMPRESSED))
        for option, used in {"keep_last": elsewhere, "when_full": elsewhere, "min_bytes": elsewhere or codes}.items():
            value = getattr(self, option)
            if value != getattr(ActivationsConfig, option) and not used:
                shown = value.value if isinstance(value, Enum) else value
                found.append(
                    f"activations.{option}={shown}: has no effect, as nothing is moved"
                    + (" or compressed" if option == "min_bytes" else "")
                    + "; use it with activations=host"
                )
        for fate, options in {Fate.host: ("host_gib",), Fate.disk: ("disk_gib", "disk_dir")}.items():
            for option in options:
                value = getattr(self, option)
                if value is not None and fate not in fates:
                    found.append(
                        f"activations.{option}={value}: has no effect, as nothing goes to {fate.value}; "
                        f"use it with activations={fate.value}"
                    )
        return found


@dataclass(kw_only=True)
class OffloadConfig:
    states: StatePlace = StatePlace.none
    """Where optimizer states are between two steps. `none`: on the device that trains. `host`: in host memory, pinned
    beside CUDA. `disk`: in a file. From there they come to step, window by window, and go back; the result is the
    same, to the bit."""
    step: StepPlace = StepPlace.device
    """Where parameters step whose states are in host memory. `device`: states come there and go back. `host`: they
    stay; gradients come to the host, and weights go back (ZeRO-Offload), of which the host keeps a copy. For links that
    are slow beside the host's memory; with torch's fused kernels of the CPU."""
    window_mib: float = 128.0
    """MiB of states that step at a time; as much arrives meanwhile, and as much leaves. A parameter that has more by
    itself is a window of its own."""
    gradients: bool = False
    """Whether gradients leave too: each for host memory as soon as it is complete in backward; there micro-steps add
    up, and it comes back when its parameter steps. Not with DDP, whose buckets nothing frees. `host_gib` is of states
    alone: gradients take as much again as they have on the device."""
    host_gib: float | None = None
    """GiB of host memory that the states of one rank may take; default: no limit."""
    disk_gib: float | None = None
    """GiB of files that the states of one rank may take; default: what the disk has. They are taken at the start."""
    disk_dir: str | None = None
    """Folder on the disk that takes them, best a local SSD; default: the system's folder for temporary files. The file
    has no name, so nothing of it is left however the run ends."""
    when_full: WhenFull = WhenFull.stop
    """What to do when a tier has no room for all states or fails to take one: `stop` the run, before its first step
    where that shows then, or `keep` on the device what does not go."""

    @property
    def moves_states(self) -> bool:
        return self.states is not StatePlace.none

    def folder(self) -> Path:
        """Where the disk tier's file is made."""
        return Path(self.disk_dir or tempfile.gettempdir())

    def problems(self) -> list[str]:
        found = [
            f"offload.{name}={value}: must be above 0; "
            + ("128 is usual" if name == "window_mib" else "null: no limit")
            for name in ("window_mib", "host_gib", "disk_gib")
            if (value := getattr(self, name)) is not None and not value > 0
        ]
        only = dict.fromkeys(("step", "host_gib"), StatePlace.host)
        only |= dict.fromkeys(("disk_gib", "disk_dir"), StatePlace.disk)
        for name in ("window_mib", "gradients", "when_full", *only):
            value, place = getattr(self, name), only.get(name, self.states)
            if value != getattr(OffloadConfig, name) and (self.states is StatePlace.none or self.states is not place):
                wanted = only.get(name, StatePlace.host).value
                shown = value.value if isinstance(value, Enum) else str(value).lower()
                found.append(
                    f"offload.{name}={shown}: has no effect, as no states go to {wanted}; use offload.states={wanted}"
                )
        return found
