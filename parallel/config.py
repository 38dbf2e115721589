"""What the user says about processes and sharding."""

from dataclasses import dataclass
from enum import Enum


class EngineName(Enum):
    """Which library drives the distributed step."""

    torch = "torch"
    deepspeed = "deepspeed"
    accelerate = "accelerate"


class Accumulate(Enum):
    """Where the gradients of a step's micro-batches are added up."""

    auto = "auto"
    local = "local"
    sharded = "sharded"


class Matrices(Enum):
    """How stage 1 shares out matrices."""

    auto = "auto"
    rows = "rows"
    owners = "owners"


class SequenceKind(Enum):
    """How the tokens of a row are split over ranks, and what those send each other for attention."""

    none = "none"
    ulysses = "ulysses"
    ring = "ring"
    usp = "usp"
    lightseq = "lightseq"
    lasp2 = "lasp2"


@dataclass(kw_only=True)
class ParallelConfig:
    engine: EngineName = EngineName.torch
    """Library that runs the distributed step. torch: DDP and FSDP2; deepspeed: its ZeRO-1, 2 and 3, whose own options
    are `deepspeed.KEY=VALUE`; accelerate: what the file given to `accelerate launch --config_file` says."""
    zero: int = 0
    """What is cut into shards, one a rank. 0: nothing, every rank holds a replica (DDP). 1: optimizer states. 2: states
    and gradients, and weights between steps (FSDP2 that keeps a step's gathered weights from forward to backward).
    3: states, gradients and weights, which each block gathers when it runs."""
    replicas: int = 1
    """With zero above 0: groups of ranks that hold the whole each, shards within (HSDP); 1 cuts over all ranks."""
    matrices: Matrices = Matrices.auto
    """parallel.zero=1: what of each matrix a rank steps. rows: its own, and the ranks send each other what the method
    needs of the whole beside them. owners: whole ones, each of which one rank steps and holds the states of. auto:
    whole where rows would send more and the ranks' shares come out even; the log says which, and why."""
    accumulate: Accumulate = Accumulate.auto
    """Where a step's micro-batches add up. sharded: every one is summed over the ranks and leaves shards (zero 2 and 3,
    and auto there). local: whole gradients stay on each rank and are summed once a step: fewer bytes sent, more held
    (zero 0 and 1, and auto there)."""
    sequence: SequenceKind = SequenceKind.none
    """How the tokens of a row are split over ranks (any transformers model; exact). none: every rank has whole rows.
    ulysses: an all-to-all gives each rank all tokens of some heads. ring: keys and values go round, which overlaps with
    computing; any number of heads. usp: ulysses among neighbours, a ring over those. lightseq: early ranks help
    late ones with causal attention; half the bytes of a ring where all heads have keys; any number of heads. lasp2: for
    models with linear attention, whose states are gathered once a layer, however long the row; layers that attend by
    softmax gather keys and values. Linear layers hand on states under any of these."""
    sequence_degree: int | None = None
    """Ranks that share each row; their number times the ranks that read different rows is that of all. Default: all
    ranks share every row. What parallel.zero cuts, it cuts over all of them."""
    ulysses_degree: int | None = None
    """parallel.sequence=usp: how many of the sequence_degree ranks exchange heads, the rest is the ring; default: as
    many as divide the model's heads and key heads."""
    timeout: float = 600.0
    """Seconds a collective may wait for the slowest rank before the run ends with an error."""
    bucket_mib: int = 25
    """MiB of gradients reduced together while backward still runs, or of weights gathered together (zero 0 and 1)."""

    def problems(self) -> list[str]:
        found = []
        if self.zero not in range(4):
            found.append(f"parallel.zero={self.zero}: must be 0, 1, 2 or 3; 3 holds the least")
        if self.replicas < 1:
            found.append(f"parallel.replicas={self.replicas}: must be at least 1; 1 cuts over all ranks")
        if self.replicas > 1 and self.zero == 0:
            found.append(
                f"parallel.replicas={self.replicas}: has no effect with parallel.zero=0, where every rank is a "
                "replica; leave it out, or use parallel.zero=1, 2 or 3"
            )
        if self.matrices is not Matrices.auto and self.zero != 1:
            found.append(
                f"parallel.matrices={self.matrices.value}: has no effect with parallel.zero={self.zero}; leave it out, "
                "or use parallel.zero=1"
            )
        if self.accumulate is Accumulate.sharded and self.zero < 2:
            found.append(
                f"parallel.accumulate=sharded: parallel.zero={self.zero} holds whole gradients; "
                "use parallel.zero=2 or 3, or leave it out"
            )
        found += self.sequence_problems()
        if self.timeout <= 0:
            found.append(f"parallel.timeout={self.timeout}: must be above 0 seconds; the default is 600")
        if self.bucket_mib < 1:
            found.append(f"parallel.bucket_mib={self.bucket_mib}: must be at least 1 MiB; the default is 25")
        return found

    def sequence_problems(self) -> list[str]:
        found, kind, degree, inner = [], self.sequence, self.sequence_degree, self.ulysses_degree
        if degree is not None and kind is SequenceKind.none:
            found.append(
                f"parallel.sequence_degree={degree}: has no effect with parallel.sequence=none; leave it out, or use "
                "parallel.sequence=ulysses, ring, usp, lightseq or lasp2"
            )
        elif degree is not None and degree < 2:
            found.append(f"parallel.sequence_degree={degree}: splits nothing; use 2 or more, or parallel.sequence=none")
        if inner is not None and kind is not SequenceKind.usp:
            found.append(
                f"parallel.ulysses_degree={inner}: has no effect with parallel.sequence={kind.value}; leave it out, or "
                "use parallel.sequence=usp"
            )
        elif inner is not None and (inner < 1 or (degree is not None and degree % inner)):
            over = f"parallel.sequence_degree={degree}" if degree is not None else "at least 1"
            found.append(f"parallel.ulysses_degree={inner}: must divide {over}; leave it out to have it chosen")
        return found

    def degree(self, ranks: int) -> int:
        """How many of `ranks` ranks share each row; a process alone has whole ones."""
        return 1 if self.sequence is SequenceKind.none or ranks == 1 else (self.sequence_degree or ranks)
