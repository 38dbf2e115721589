"""What a number of ranks asks of a configuration: shares of the batch, of rows and of what is sharded.

Part of `trainer.check`; imports no torch either.
"""

from parallel.config import Matrices, SequenceKind
from trainer.check_model import is_read
from trainer.check_offload import gradients_problems
from trainer.schema import Config, LinearKind


def rank_count_problems(cfg: Config, ranks: int) -> list[str]:
    """Check what depends on the number of ranks."""
    found = gradients_problems(cfg, ranks) + shard_problems(cfg, ranks) + sequence_problems(cfg, ranks)
    shares = max(1, ranks // cfg.parallel.degree(ranks))
    return found + (batch_problems(cfg, shares) or two_pass_problems(cfg, shares))


def sequence_problems(cfg: Config, ranks: int) -> list[str]:
    """Groups that share rows must split the ranks."""
    parallel = cfg.parallel
    degree, inner = parallel.sequence_degree or ranks, parallel.ulysses_degree
    if parallel.sequence is SequenceKind.none:
        return []
    if ranks == 1:
        return [
            f"parallel.sequence={parallel.sequence.value}: one process has nobody to share a row with; start several "
            "(torchrun --nproc-per-node N -m trainer), or use parallel.sequence=none"
        ]
    if ranks % degree:
        fitting = [count for count in range(2, ranks + 1) if ranks % count == 0]
        return [
            f"parallel.sequence_degree={degree}: does not divide {ranks} ranks; use parallel.sequence_degree="
            f"{' or '.join(map(str, fitting))}"
        ]
    least = 2 * degree if parallel.sequence is SequenceKind.ring else degree
    if cfg.data.sequence_length < least:
        return [
            f"data.sequence_length={cfg.data.sequence_length}: too short to be shared by {degree} ranks; use "
            f"data.sequence_length={least} or more, or a smaller parallel.sequence_degree"
        ]
    if inner is not None and degree % inner:
        return [f"parallel.ulysses_degree={inner}: does not divide the {degree} ranks that share a row; leave it out"]
    if parallel.sequence is SequenceKind.lasp2 and not is_read(cfg.model) and cfg.model.linear is LinearKind.none:
        return [no_states(f"model={cfg.model.name}")]
    return []


def no_states(model: str) -> str:
    """What to say of LASP-2 where there is nothing for it to do."""
    return (
        f"parallel.sequence=lasp2: hands on the states of linear attention, and {model} has none; use "
        "parallel.sequence=ring, which sends as much for softmax attention and computes meanwhile, or a model with "
        "linear layers (model=llama_linear_tiny)"
    )


def shard_problems(cfg: Config, ranks: int) -> list[str]:
    """Replicas must split the ranks, with something left to cut."""
    parallel, found = cfg.parallel, []
    if parallel.replicas > 1 and (ranks % parallel.replicas or ranks == parallel.replicas):
        fitting = [count for count in range(1, ranks // 2 + 1) if ranks % count == 0]
        found.append(
            f"parallel.replicas={parallel.replicas}: does not split {ranks} ranks into groups of two or more; use "
            + (f"parallel.replicas={' or '.join(map(str, fitting))}" if ranks > 1 else "torchrun to start several")
        )
    if getattr(cfg.optim, "basis_copies", False) and not parallel.zero:
        found.append(
            "optim.basis_copies=true: has no effect with parallel.zero=0, where every rank has every basis; leave it "
            "out, or use parallel.zero=1, 2 or 3"
        )
    if getattr(cfg.optim, "basis_copies", False) and parallel.matrices is Matrices.owners:
        found.append(
            "optim.basis_copies=true: has no effect with parallel.matrices=owners, where a basis is its owner's alone; "
            "use one of the two"
        )
    package = getattr(cfg.optim, "package", None)
    if package is not None and parallel.engine.value == "torch" and ranks > 1:
        cut = f"parallel.zero={parallel.zero}" if parallel.zero > 1 else "parallel.matrices=rows"
        if parallel.zero > 1 or parallel.matrices is Matrices.rows:
            found.append(
                f"optim={cfg.optim.name}: {package} lays its blocks over whole parameters, which {cut} cuts into rows; "
                "use parallel.zero=1 or 0, or an optimizer of ours, such as optim=adamw_8bit"
            )
    if cfg.optim.in_backward and parallel.zero == 1:
        found.append(
            "optim.in_backward=true: with parallel.zero=1 gradients are summed in DDP's buckets, which free none in "
            "backward; use parallel.zero=0, 2 or 3"
        )
    return found


def batch_problems(cfg: Config, ranks: int) -> list[str]:
    """The global batch must split evenly into micro-batches over ranks."""
    batch, micro = cfg.train.global_batch, cfg.train.micro_batch
    if batch < 1 or micro < 1 or batch % (micro * ranks) == 0:
        return []
    unit = micro * ranks
    nearest = sorted({max(unit, batch // unit * unit), -(-batch // unit) * unit})
    fitting = [] if batch % ranks else [n for n in range(1, batch // ranks + 1) if batch // ranks % n == 0]
    near = sorted(sorted(fitting, key=lambda n: abs(n - micro))[:3])
    over = f" x {ranks} ranks" if ranks > 1 else ""
    return [
        f"train.global_batch={batch}: does not split into train.micro_batch={micro}{over} = {unit} sequences; "
        f"use train.global_batch={' or '.join(map(str, nearest))}"
        + (f", or train.micro_batch={' or '.join(map(str, near))}" if near else "")
    ]


def two_pass_problems(cfg: Config, ranks: int) -> list[str]:
    """The norm of gradients that add up needs them all at once."""
    micro_steps = cfg.train.global_batch // (cfg.train.micro_batch * ranks)
    if cfg.train.clip_by.value != "two_pass" or micro_steps == 1:
        return []
    return [
        f"train.clip_by=two_pass: with {micro_steps} micro-steps the norm is that of sums that all have to be kept, so "
        f"nothing is saved; use train.micro_batch={cfg.train.micro_batch * micro_steps}, train.clip_by=parameter or "
        "previous, or the same result from optim.in_backward=false train.clip_by=global"
    ]
