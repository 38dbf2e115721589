"""What can be combined: a table of axes. A value is a name and the Hydra overrides that ask for it, one line each.

The first value of an axis is its default. Axes of the method (what is computed) belong to the single-process reference
too; axes of the layout (where and when it is computed) are what must make no difference. Options are given one by one
and not by a group's file: configurations of the same files are composed in a fifth of the time.
"""

import copy
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from enum import Enum
from functools import cached_property
from typing import Any, get_args, get_type_hints
from unittest import mock

import yaml

from optim.config import CONFIGS
from trainer import check
from trainer.cli.compose import load
from trainer.schema import Config

STEPS = 5
GAP = 2
"""Steps between refreshes: at 0, 2 and 4, so that a new basis is found, stepped with twice, and refreshed from."""
GLOBAL_BATCH = 48
"""Splits into 1, 2, 3 and 4 ranks times 1, 2 and 4 micro-steps."""
STOP_AFTER = 3
"""Steps before the interruption of the combinations that are resumed: between two refreshes."""


OWN = "="


@dataclass(frozen=True)
class Value:
    name: str
    overrides: tuple[str, ...] = ()
    settings: Mapping[str, Any] | None = None
    """What no override says: `ranks`, `degree` (ranks that share a row), `micro_steps`, `resume`; `reference`, values
    that its reference has where others have that of the method or the default, OWN the combination's own, and `narrow`,
    the same for formats narrower than fp64; `drifts`, whether how a batch is split shows even in fp64."""


@dataclass(frozen=True)
class Axis:
    name: str
    about: str
    """One line for the document."""
    method: bool
    values: tuple[Value, ...]

    @cached_property
    def by_name(self) -> dict[str, Value]:
        return {value.name: value for value in self.values}

    def __getitem__(self, name: str) -> Value:
        if name not in self.by_name:
            raise ValueError(f"{self.name}={name}: unknown; known are {', '.join(self.by_name)}")
        return self.by_name[name]


def v(name: object, *overrides: str, **settings: Any) -> Value:
    return Value(str(name), overrides, settings)


def low(name: str, rank: int = 32, *more: str) -> Value:
    return v(name, f"optim={name}", f"optim.rank={rank}", *more)


LOSSY = {"activations": OWN, "mlp": OWN, "blocks": OWN}
"""What 8-bit codes lose depends on what is saved: the reference saves the same."""
WINDOW = "offload.window_mib=0.05"
"""A few parameters of the tiny model step at a time."""
SMALL = "activations.min_bytes=256"
"""Activations of the tiny model are worth moving."""
ALL = 0
"""Every rank shares every row."""
REFRESHED = f"optim.update_proj_gap={GAP}"

# Where a value computes the same in another way, narrow formats round at other places, all rows alike, which no split
# of a batch shows: its reference then computes in that way too, and ways are compared with each other in fp64. What a
# loss multiplies with before it rounds (nothing, or one in all targets) decides whether the gradient of each target,
# nearly the same number in all rows of a new model, goes up in all of them or down: 2e-3 of all gradients in bf16. A
# lean norm sums its weight's gradient from fp32 products.
AXES: tuple[Axis, ...] = (
    Axis("optimizer", "every registered name", True, (
        v("adamw", "optim=adamw"),
        v("adamw_8bit", "optim=adamw_8bit"),
        v("adamw_4bit", "optim=adamw_4bit"),
        v("adamw_fp8", "optim=adamw_fp8"),
        v("sgd", "optim=sgd"),
        v("adafactor", "optim=adafactor"),
        low("galore", 32, REFRESHED),
        low("galore_8bit", 32, REFRESHED),
        low("galore_adafactor", 32, REFRESHED),
        low("qgalore", 32, REFRESHED),
        low("apollo", 32, REFRESHED),
        low("apollo_mini", 1, REFRESHED),
        low("qapollo", 32, REFRESHED),
        low("qapollo_mini", 1, REFRESHED),
        low("fira", 32, REFRESHED),
        low("cosmos", 16),
        v("bnb_adamw_8bit", "optim=bnb_adamw_8bit"),
        v("bnb_paged_adamw_8bit", "optim=bnb_paged_adamw_8bit"),
        v("bnb_paged_adamw", "optim=bnb_paged_adamw"),
        v("bnb_lion_8bit", "optim=bnb_lion_8bit"),
        v("bnb_paged_lion_8bit", "optim=bnb_paged_lion_8bit"),
        v("torchao_adamw_8bit", "optim=torchao_adamw_8bit", "optim.compile=false"),
        v("torchao_adamw_4bit", "optim=torchao_adamw_4bit", "optim.compile=false"),
        v("torchao_adamw_fp8", "optim=torchao_adamw_fp8", "optim.compile=false"),
    )),
    Axis("states", "codec of the moments; `own` is the optimizer's default", True, (
        v("own"), *(v(name, f"optim.states={name}") for name in ("fp32", "bf16", "int8", "int4", "fp8")),
    )),
    Axis("precision", "formats of weights and of products", True, (
        v("fp64", "precision.weights=fp64", "precision.compute=fp64"),
        v("fp32", "precision.weights=fp32", "precision.compute=fp32"),
        v("bf16", "precision.weights=fp32", "precision.compute=bf16"),
        v("bf16_pure", "precision.weights=bf16", "precision.compute=bf16"),
        v("bf16_sr", "precision.weights=bf16_sr", "precision.compute=bf16"),
        v("int8_sr", "precision.weights=int8_sr", "precision.compute=bf16"),
        v("fp8", "precision.weights=fp32", "precision.compute=fp8"),
    )),
    Axis("refresh", "how a new basis is found; `own` is the optimizer's default", True, (
        v("own"), *(v(name, f"optim.refresh={name}") for name in ("warm", "gram", "svd", "randomized", "random")),
    )),
    Axis("on_refresh", "what becomes of the moments when the basis changes", True, (
        v("keep"), *(v(name, f"optim.on_refresh={name}") for name in ("sign", "procrustes", "rotate", "reset")),
    )),
    Axis("side", "which side of a gradient is projected", True, (
        v("std"), *(v(name, f"optim.proj_type={name}") for name in ("reverse_std", "left", "right")),
    )),
    Axis("basis", "how a basis is kept", True, (v("fp32"), v("int4", "optim.basis=int4"))),
    Axis("products", "operands of the products with a basis; a batch in parts is rounded in parts", True, (
        v("fp32"), v("bf16", "optim.products=bf16", reference={"in_backward": OWN}, drifts=True),
    )),
    Axis("when", "when bases are refreshed", True, (
        v("every_gap"), v("stagger", "optim.stagger=true"), v("lazy", "optim.lazy=true", "optim.lazy_threshold=0.01"),
    )),
    Axis("clip", "clipping of gradients, to a norm that every step exceeds", True, (
        v("off", "train.clip_norm=0"),
        v("global", "train.clip_norm=0.1"),
        v("parameter", "train.clip_norm=0.1", "train.clip_by=parameter"),
        v("previous", "train.clip_norm=0.1", "train.clip_by=previous", reference={"in_backward": OWN}),
        v("two_pass", "train.clip_norm=0.1", "train.clip_by=two_pass",
          reference={"clip": "global", "in_backward": "no"}),
    )),
    Axis("model", "attention of all layers by softmax, linear, or linear in every other one", True, (
        v("llama"),
        v("linear", "model.linear=gated"),
        v("hybrid", "model.linear=lightning", "model.softmax_every=2"),
    )),
    Axis("embeddings", "whether the head shares the embedding's weights", True, (
        v("own"), v("tied", "model.tie_embeddings=true"),
    )),
    Axis("targets", "label smoothing and z-loss", True, (
        v("own"), v("smoothed", "loss.label_smoothing=0.1"), v("z_loss", "loss.z_loss=1e-3"),
    )),
    Axis("packing", "how documents become rows; `document` masks unevenly", True, (
        v("document", "data.packing=document"),
        v("concat", "data.packing=concat"),
        v("best_fit", "data.packing=best_fit"),
    )),
    Axis("rope", "how positions are told apart beyond the length a model was first trained with", True, (
        v("own"),
        v("yarn", "model.max_length=4", "model.rope.type=yarn", "model.rope.factor=4"),
        v("dynamic", "model.max_length=8", "model.rope.type=dynamic", "model.rope.factor=2"),
    )),
    Axis("ranks", "processes (gloo)", False, tuple(v(n, ranks=n) for n in (1, 2, 3, 4))),
    Axis("zero", "what is sharded over the ranks", False, (v(0), *(v(n, f"parallel.zero={n}") for n in (1, 2, 3)))),
    Axis("replicas", "groups of ranks that hold the whole each", False, (v(1), v(2, "parallel.replicas=2"))),
    Axis("matrices", "whether matrices that are stepped whole have one owner each, under zero=1", False, (
        v("auto"), v("rows", "parallel.matrices=rows"), v("owners", "parallel.matrices=owners"),
    )),
    Axis("accumulate", "where the micro-batches of a step add up", False, (
        v("auto"), v("local", "parallel.accumulate=local"), v("sharded", "parallel.accumulate=sharded"),
    )),
    Axis("sequence", "how the tokens of a row are split over ranks", False, (
        v("none"),
        v("ulysses", "parallel.sequence=ulysses", degree=ALL),
        v("ring", "parallel.sequence=ring", degree=ALL),
        v("ring_pairs", "parallel.sequence=ring", "parallel.sequence_degree=2", degree=2),
        v("usp", "parallel.sequence=usp", degree=ALL),
        v("lightseq", "parallel.sequence=lightseq", degree=ALL),
        v("lasp2", "parallel.sequence=lasp2", degree=ALL),
    )),
    Axis("engine", "library that runs the distributed step", False, (
        v("torch"), v("deepspeed", "parallel.engine=deepspeed"),
    )),
    Axis("accumulation", "micro-steps of a step", False, tuple(v(n, micro_steps=n) for n in (1, 2, 4))),
    Axis("in_backward", "whether each parameter is stepped within backward", False, (
        v("no"), v("yes", "optim.in_backward=true"),
    )),
    Axis("offload", "where optimizer states are between two steps", False, (
        v("none"), v("host", "offload.states=host", WINDOW), v("disk", "offload.states=disk", WINDOW),
        v("host_gradients", "offload.states=host", "offload.gradients=true", WINDOW),
        v("host_step", "offload.states=host", "offload.step=host", WINDOW),
    )),
    Axis("activations", "what becomes of saved activations; what 8-bit codes lose, the reference loses too", False, (
        v("keep"),
        v("recompute", "activations.fate=recompute"),
        v("recompute_but_attention", "activations.fate=recompute", "activations.attention=keep"),
        v("selective", "activations.fate=selective"),
        v("host", "activations.fate=host", SMALL),
        v("disk", "activations.fate=disk", SMALL),
        v("int8", "activations.fate=int8", SMALL, reference=LOSSY),
        v("fp8", "activations.fate=fp8", SMALL, reference=LOSSY, drifts=True),
        v("recompute_host", "activations.fate=recompute", "activations.inputs=host", SMALL),
    )),
    Axis("blocks", "norms, products and attention as transformers computes them, or saving the least", False, (
        v("transformers"), v("lean", "activations.lean=true", narrow={"blocks": OWN}),
    )),
    Axis("mlp", "pieces along the tokens that an MLP runs in", False, (
        v("whole"), v("tiled", "activations.tile_mlp=3"),
    )),
    Axis("loss", "how the loss is computed; chunks of 100 rows span documents and rows", False, (
        v("chunked", "loss.chunk_rows=100"),
        v("plain", "loss.kind=plain", narrow={"loss": OWN}),
        v("torch", "loss.kind=torch", narrow={"loss": OWN}),
    )),
    Axis("checkpoint", "what a save waits for; resumed from one that was written beside training", False, (
        v("sync"),
        v("async", "checkpoint.mode=async", "checkpoint.every=1"),
        v("lazy", "checkpoint.mode=lazy", "checkpoint.every=1"),
    )),
    Axis("resume", "straight through; interrupted and resumed; saved by one process; resumed by one process", False, (
        v("straight"), v("again", resume="again"), v("from_one", resume="from_one"), v("to_one", resume="to_one"),
    )),
)  # fmt: skip

BY_NAME = {axis.name: axis for axis in AXES}

COMMON = (
    "model.hidden_size=64", "model.intermediate_size=136", "model.layers=2", "model.heads=4", "model.kv_heads=2",
    "data.sequence_length=16", "data.eval_fraction=0.1", "data.eval_rows=12",
    f"train.steps={STEPS}", f"train.global_batch={GLOBAL_BATCH}", "train.log_every=1", "train.eval_every=0",
    "optim.weight_decay=0.02", "run.device=cpu", "run.threads=1", "parallel.timeout=60",
)  # fmt: skip
"""GQA, and sides that 3 ranks divide unevenly; matrices just large enough for every codec to quantize some."""


@dataclass(frozen=True, order=True)
class Combination:
    """One value of every axis, by name, in the order of AXES."""

    names: tuple[str, ...] = tuple(axis.values[0].name for axis in AXES)

    @classmethod
    def of(cls, **chosen: object) -> "Combination":
        """Give some axes a value, the others their default.

        Raises:
            ValueError: an unknown axis or value; the message lists the known ones.
        """
        unknown = sorted(chosen.keys() - BY_NAME.keys())
        if unknown:
            raise ValueError(f"{unknown[0]}: no such axis; there are {', '.join(BY_NAME)}")
        return cls(tuple(axis[str(chosen.get(axis.name, axis.values[0].name))].name for axis in AXES))

    def __str__(self) -> str:
        return " ".join(f"{axis}={name}" for axis, name in self.items() if name != BY_NAME[axis].values[0].name) or "-"

    def items(self) -> Iterator[tuple[str, str]]:
        return zip(BY_NAME, self.names, strict=True)

    def __getitem__(self, axis: str) -> str:
        return dict(self.items())[axis]

    def but(self, **chosen: object) -> "Combination":
        """The same with other values of some axes."""
        return Combination.of(**{**dict(self.items()), **chosen})

    @cached_property
    def values(self) -> tuple[Value, ...]:
        return tuple(axis[name] for axis, name in zip(AXES, self.names, strict=True))

    def setting(self, key: str, default: Any) -> Any:
        return next((value.settings[key] for value in self.values if value.settings and key in value.settings), default)

    @property
    def ranks(self) -> int:
        return int(self.setting("ranks", 1))

    @property
    def micro_batch(self) -> int:
        """Rows of a rank in a micro-step, or of those that share them."""
        shares = max(1, self.ranks // (self.setting("degree", 1) or self.ranks))
        return int(GLOBAL_BATCH // (shares * self.setting("micro_steps", 1)))

    @property
    def resume(self) -> str:
        return str(self.setting("resume", "straight"))

    @property
    def splits_codes(self) -> bool:
        """Whether 8-bit activations lose something else than in one process: attention over a row that ranks share
        saves other tensors."""
        return self["activations"] in ("int8", "fp8") and self["sequence"] != BY_NAME["sequence"].values[0].name

    @property
    def drifts(self) -> bool:
        """Whether how a batch is split shows even in fp64."""
        return bool(self.setting("drifts", False)) or self.splits_codes

    @property
    def is_exact(self) -> bool:
        """Whether nothing but the order of fp64 sums depends on the layout."""
        return self["precision"] == "fp64" and not self.drifts

    @property
    def reference(self) -> "Combination":
        """The same method in one process: nothing sharded, split, recomputed or interrupted."""
        chosen = {axis.name: name for axis, name in zip(AXES, self.names, strict=True) if axis.method}
        for value in self.values:
            settings = value.settings or {}
            narrow = {} if self.is_exact else settings.get("narrow", {})
            for axis, name in {**settings.get("reference", {}), **narrow}.items():
                chosen[axis] = self[axis] if name == OWN else name
        return Combination.of(**chosen)

    def overrides(self) -> list[str]:
        """Hydra overrides that ask for it, but for the data and the run's folder."""
        asked = [override for value in self.values for override in value.overrides]
        return [*COMMON, *asked, f"train.micro_batch={self.micro_batch}"]

    @property
    def problems(self) -> tuple[str, ...]:
        """What the configuration check says to it; empty where it has nothing against it."""
        return problems(self)

    def is_meaningful(self) -> bool:
        """Whether the optimizer has every option of `optim` that is asked for: AdamW has no basis to refresh."""
        return applies(self.values, self["optimizer"])


@functools.cache
def problems(combination: Combination) -> tuple[str, ...]:
    """What `trainer.check` finds, without Hydra, which takes a hundred times as long; a run composes as users do."""
    cfg = copy.deepcopy(common_config())
    cfg.optim = CONFIGS[combination["optimizer"]]()
    for override in combination.overrides()[len(COMMON) :]:
        key, _, text = override.partition("=")
        *path, name = key.split(".")
        if path:
            put(functools.reduce(getattr, path, cfg), name, text)
    nowhere = mock.patch.object(check, "folder_problems", lambda cfg: [])  # which tries to write, thousands of times
    with nowhere, mock.patch.dict(os.environ, WORLD_SIZE=str(combination.ranks)):
        return (*check.problems(cfg), *check.start_problems(cfg))


@functools.cache
def common_config() -> Config:
    return load(["data=stdlib", *(override for override in COMMON if not override.startswith("optim."))])


def put(section: Any, name: str, text: str) -> None:
    """Set an option of a section to what `text` says: a number, a choice, or a word of YAML."""
    hint = get_type_hints(type(section))[name]
    choices = [kind for kind in (hint, *get_args(hint)) if isinstance(kind, type) and issubclass(kind, Enum)]
    read: Any = choices[0] if choices else float if hint is float else yaml.safe_load
    setattr(section, name, read(text))


def applies(values: tuple[Value, ...], optimizer: str) -> bool:
    """Whether `optimizer` has the options of `values`. Asking for others is refused as any unknown option is."""
    return all(has_options(value.overrides, optimizer) for value in values)


@functools.cache
def has_options(overrides: tuple[str, ...], optimizer: str) -> bool:
    asked = {each.removeprefix("optim.").split("=")[0] for each in overrides if each.startswith("optim.")}
    return asked <= {field.name for field in fields(CONFIGS[optimizer])}
