"""DeepSpeed: ZeRO-1, 2 and 3, with its offload of optimizer states and CPU Adam, behind our step.

Its engine runs forward, backward, the reductions and the update. What a step means stays ours:

- DeepSpeed averages gradients over the ranks (all stages, without sequence parallelism, by the world size), so each
  loss is multiplied by it; it is not divided by the number of micro-steps.
- The accumulation boundary is set by hand, so that any number of micro-steps is one step.
- The norm is DeepSpeed's own, of the reduced gradients, read before its `step`. A step that is not finite anywhere is
  dropped here on all ranks; a finite one is clipped inside `step` by DeepSpeed, by torch's factor.
- Its checkpoint is not used: weights and states are handed out under our names (`trainer.state`).
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from optim.schedule import scale_rates
from parallel.launch import World
from trainer.engines import deepspeed_config
from trainer.engines.base import Numbers
from trainer.engines.partition import (
    FlatPart,
    flat_partitions,
    held_of,
    is_bf16,
    own_parts,
    segments,
    write_masters,
)
from trainer.engines.partitioned import PartitionedOptimizer
from trainer.errors import UserError, first_line
from trainer.precision import settled
from trainer.schema import Config
from trainer.state import model_tensors, parameter_names


class DeepSpeedEngine:
    """`base.Engine` on DeepSpeed's engine.

    Raises:
        UserError: DeepSpeed refuses the configuration, or an operator of it cannot be built here.
    """

    def __init__(self, model: nn.Module, world: World, cfg: Config) -> None:
        self._owner, self._world, self._stage = model, world, cfg.parallel.zero
        self._linear = nn.functional.linear  # which stage 3 replaces, for good
        config = deepspeed_config.generated(cfg, world.process_count)
        half = bool(config["bf16"]["enabled"])
        try:
            deepspeed = quiet_deepspeed(world)
            masters = give_parts(model, config, half) if next(model.parameters()).is_meta else None
            if masters is None and half:
                trained = [(name, p.detach()) for name, p in model.named_parameters() if p.requires_grad]
                masters = own_parts(trained, world, self._stage)
            self._names = parameter_names(model)
            self.optimizer = PartitionedOptimizer(
                settled(cfg, world.device),
                list(model.named_parameters()),
                world,
                elementwise=deepspeed_config.elementwise(cfg),
                on_host=deepspeed_config.offloaded_to(cfg) is not None,
            )
            self.model, *_ = deepspeed.initialize(
                model=model,
                optimizer=self.optimizer,
                config=config,
                dist_init_required=False,
            )
            self._zero: Any = self.model.optimizer
            flats, held = flat_partitions(self._zero), segments(self._zero, self._stage, self._names)
            if masters is not None and half:
                write_masters(flats, held, masters)
            del masters
            self.optimizer.bind(flats, held)
        except (ValueError, RuntimeError, AssertionError) as error:
            self.close()
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"parallel.engine=deepspeed: it does not start ({type(error).__name__}: {first_line(error)}). "
                "Leave out deepspeed.* options, or use parallel.engine=torch."
            ) from error

    @contextmanager
    def accumulating(self, last: bool) -> Iterator[None]:
        """Return the context of one micro-step; only the `last` of a step ends in an update."""
        self.model.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of this micro-step's share of the loss, undoing DeepSpeed's mean over ranks beforehand."""
        self.model.backward(loss * self._world.process_count, scale_wrt_gas=False)

    def gradient_norm(self) -> Tensor:
        """Global 2-norm of all gradients; infinite where any rank's are not finite."""
        from deepspeed.runtime.utils import combine_grad_norm_groups, get_global_norm_of_tensors

        if self._stage == 3:
            norm = combine_grad_norm_groups(self._zero._get_norm_groups())
        elif is_bf16(self._zero):
            norm = get_global_norm_of_tensors(self._zero.get_grads_for_norm()[0])
        else:
            norm = self._zero.scaled_global_norm()
        return torch.as_tensor(norm)

    def clip(self, max_norm: float, norm: Tensor) -> None:
        """Nothing: `update` clips, by min(1, max_norm / (norm + 1e-6)) as torch does."""

    def clip_each(self, max_norm: float) -> None:
        raise AssertionError("train.clip_by=parameter is refused for DeepSpeed before the start")

    def update(self, multiplier: float) -> None:
        """Step the weights at `multiplier` times each group's own learning rate."""
        if self.optimizer.inner is not None:
            scale_rates(self.optimizer.inner, multiplier)
        self.model.step()

    def clear_gradients(self) -> None:
        """Forget the gradients of a step that was not applied; an applied one has freed its own."""
        zero = self._zero
        if self._stage == 3:
            zero._pre_step()
            zero._partition_all_parameters()
            zero._overflow_clean_up(1.0)
            return
        zero.zero_grad()
        if is_bf16(zero):
            return
        zero._release_preflattened_grad_buffers()
        if zero.cpu_offload:
            zero.reset_cpu_buffers()
        for kept in (zero.averaged_gradients, zero.all_grad_tensors):
            for group in kept:
                kept[group] = None

    def tensors(self) -> dict[str, Any]:
        """Weights (fp32 masters) and states; of a cut parameter this rank's part."""
        found: dict[str, Any] = {**model_tensors(self._owner)}
        p: Any
        for name, p in self._owner.named_parameters():
            if hasattr(p, "ds_tensor"):  # needed for frozen ones: the others are among the optimizer's
                start, length = held_of(p)
                found[f"model/{name}"] = FlatPart(p.ds_shape, start, p.ds_tensor.detach()[:length])
        return found | self.optimizer.tensors()

    def numbers(self) -> Numbers:
        """State numbers of all parameters."""
        return self.optimizer.numbers()

    @torch.no_grad()
    def loaded(self, numbers: Numbers) -> None:
        """Bring masters that were read to the weights that forward uses."""
        self.optimizer.set_numbers(numbers)
        if self._stage < 3:
            self._zero.update_lp_params()
            return
        self._zero._partition_all_parameters()
        for group in range(len(self._zero.fp16_groups)):
            self._zero._reassign_or_swap_out_partitioned_parameters(group)
        self._zero.checkpoint_event_epilogue()

    def remarks(self) -> list[str]:
        """Nothing that a configuration does not say."""
        return []

    def close(self) -> None:
        """Put torch's own `linear` back. DeepSpeed's saves other tensors, so that what a later run in this process
        keeps in 8 bits would be others too."""
        nn.functional.linear = self._linear


def give_parts(model: nn.Module, config: dict[str, Any], half: bool) -> dict[str, tuple[int, Tensor]]:
    """Make a ZeRO-3 parameter of each of no storage, of the part that it carries as attribute `rows`; return these
    parts, exact, by name. What DeepSpeed's `zero.Init` does, but of weights that nobody had to hold whole."""
    import deepspeed

    deepspeed.init_distributed(dist_init_required=False)  # or it would take itself to be alone
    dtype = torch.bfloat16 if half else torch.float32
    init: Any = deepspeed.zero.Init(config_dict_or_path=config, dtype=dtype)
    parts: dict[str, tuple[int, Tensor]] = {}
    made: dict[nn.Parameter, nn.Parameter] = {}
    for name, parameter in list(model.named_parameters()):
        rows: Tensor = parameter.rows  # type: ignore[attr-defined]
        hollow = torch.empty((), dtype=dtype, device=rows.device).expand(parameter.shape)  # of one value's memory
        new: Any = nn.Parameter(hollow, parameter.requires_grad)
        init._convert_to_deepspeed_param(new)
        new.partition()
        start, length = held_of(new)
        new.ds_tensor[:length].copy_(rows)
        parts[name], made[parameter] = (start, rows), new
    for module in model.modules():
        for key, own in list(module.named_parameters(recurse=False)):
            module._parameters[key] = made[own]
    return parts


def quiet_deepspeed(world: World) -> Any:
    """Import deepspeed for this rank's device, which it decides at its import, and keep it quiet."""
    os.environ.setdefault("DS_ACCELERATOR", world.device.type)
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # which it insists on, even of a single process
    import deepspeed
    import deepspeed.runtime.bf16_optimizer as stage_1_of_bf16

    stage_1_of_bf16.see_memory_usage = lambda *_, **__: None  # prints at every start, whoever asks it not to
    # Of inference; it would be compiled at every first start.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    forget_ended_groups()
    # Among its warnings is one of untested optimizers, at every start; ours is tested, in tests/parallel.
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", message=".*torch.distributed.* is deprecated", category=FutureWarning)
    return deepspeed


def forget_ended_groups() -> None:
    """Let DeepSpeed make its groups anew where those it remembers went with an earlier run of this process."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    remembered = groups._WORLD_GROUP
    if remembered is not None and remembered not in dist.distributed_c10d._world.pg_map:
        comm.cdb = groups._WORLD_GROUP = groups._DATA_PARALLEL_GROUP = None
