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
    accumulate: Accumulate = Accumulate.auto
    """Where a step's micro-batches add up. sharded: every one is summed over the ranks and leaves shards (zero 2 and 3,
    and auto there). local: whole gradients stay on each rank and are summed once a step: fewer bytes sent, more held
    (zero 0 and 1, and auto there)."""
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
        if self.accumulate is Accumulate.sharded and self.zero < 2:
            found.append(
                f"parallel.accumulate=sharded: parallel.zero={self.zero} holds whole gradients; "
                "use parallel.zero=2 or 3, or leave it out"
            )
        if self.timeout <= 0:
            found.append(f"parallel.timeout={self.timeout}: must be above 0 seconds; the default is 600")
        if self.bucket_mib < 1:
            found.append(f"parallel.bucket_mib={self.bucket_mib}: must be at least 1 MiB; the default is 25")
        return found
