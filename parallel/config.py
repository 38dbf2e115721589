"""What the user says about processes and sharding."""

from dataclasses import dataclass
from enum import Enum


class EngineName(Enum):
    """Which library drives the distributed step."""

    torch = "torch"


@dataclass(kw_only=True)
class ParallelConfig:
    engine: EngineName = EngineName.torch
    """Library that runs the distributed step. `torch`: DistributedDataParallel."""
    zero: int = 0
    """What is sharded over the ranks. 0: nothing, every rank holds a replica (DDP)."""
    timeout: float = 600.0
    """Seconds a collective may wait for the slowest rank before the run ends with an error."""
    bucket_mib: int = 25
    """MiB of gradients reduced together while backward still runs."""

    def problems(self) -> list[str]:
        found = []
        if self.zero != 0:
            found.append(f"parallel.zero={self.zero}: only 0 (replicas, DDP) is available; use parallel.zero=0")
        if self.timeout <= 0:
            found.append(f"parallel.timeout={self.timeout}: must be above 0 seconds; the default is 600")
        if self.bucket_mib < 1:
            found.append(f"parallel.bucket_mib={self.bucket_mib}: must be at least 1 MiB; the default is 25")
        return found
