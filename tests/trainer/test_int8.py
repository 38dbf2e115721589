"""precision=int8_sr from the command line to the exported model."""

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import nn

import trainer.loop
from optim.int8 import Int8Weight
from optim.int8_grid import stored_bytes
from parallel.launch import World
from tests.trainer.test_plan import real_rows
from tests.trainer.test_resume import stopping_at
from trainer.build import make_trainable
from trainer.checkpoint.store import CheckpointStore
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.evaluate import evaluate_run
from trainer.export import export_run
from trainer.metrics import read_metrics
from trainer.model import build_model
from trainer.plan import planned_config, predict
from trainer.precision import int8_matrices
from trainer.run import run
from trainer.schema import Config
from trainer.signals import Interrupted
from trainer.step import train_step

CPU = torch.device("cpu")
METHOD = ["optim=qgalore", "precision=int8_sr", "optim.rank=8", "optim.update_proj_gap=2"]
SMALL = [
    "model.hidden_size=32", "model.intermediate_size=48", "model.layers=2", "model.heads=4", "data.sequence_length=32",
    "train.global_batch=4", "train.micro_batch=4", "run.device=cpu", "run.threads=1",
]  # fmt: skip


def made(cfg: Config) -> nn.Module:
    weights, int8 = cfg.precision.weights, int8_matrices(cfg)
    return build_model(cfg.model, planned_config(cfg), weights=weights, int8=int8, device=CPU, seed=0)


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    checkpoint = CheckpointStore(folder / "checkpoints", keep=0, verify=True).newest()
    assert checkpoint is not None
    tensors = {n: torch.empty(i.shape, dtype=i.dtype) for n, i in checkpoint.names().items()}
    checkpoint.load(tensors)
    return tensors


def test_a_run_resumes_bit_for_bit_evaluates_and_exports(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"document {i} says " + "abc xyz " * (i % 7 + 3) for i in range(60)))

    def options(name: str) -> list[str]:
        source = ["data=text", f"data.path={text}", "data.eval_fraction=0.2", f"data.cache_dir={tmp_path / 'cache'}"]
        rates = ["train.steps=6", "train.log_every=1", "train.eval_every=0", "checkpoint.every=0"]
        return [*SMALL, *METHOD, *source, *rates, f"run.dir={tmp_path / name}"]

    run(load(options("whole")))
    with monkeypatch.context() as patch:
        patch.setattr(trainer.loop, "train_step", stopping_at(3))
        with pytest.raises(Interrupted):
            run(load(options("parts")))
    run(load(options("parts")))
    whole, parts = tensors_of(tmp_path / "whole"), tensors_of(tmp_path / "parts")
    assert [name for name in whole if not torch.equal(whole[name], parts[name])] == []

    name = "model/model.layers.0.mlp.down_proj.weight"
    assert {whole[f"{name}/{part}"].dtype for part in ("scale", "low")} == {torch.float32}
    assert whole[f"{name}/codes"].dtype is torch.uint8 and whole["model/lm_head.weight"].dtype is torch.bfloat16

    last = [line["eval_loss"] for line in read_metrics(tmp_path / "whole" / "metrics.jsonl") if "eval_loss" in line][-1]
    assert evaluate_run(tmp_path / "whole", [], None).loss == pytest.approx(last, rel=1e-6)

    export_run(tmp_path / "whole", tmp_path / "exported", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "exported", dtype="auto")
    weight = model.get_parameter(name.removeprefix("model/"))
    parts_of_it = (whole[f"{name}/{part}"] for part in ("codes", "scale", "low"))
    coded = Int8Weight(*parts_of_it, group=256, dtype=torch.bfloat16)
    assert type(weight) is nn.Parameter and torch.equal(weight, coded.dequantize())


@pytest.mark.parametrize("optimizer", ["adamw", "qgalore"])
def test_the_predicted_bytes_are_the_measured_ones_and_the_weights_those_of_the_formula(optimizer: str) -> None:
    cfg = load([*SMALL, "precision=int8_sr", "precision.int8_group=16", f"optim={optimizer}"])
    plan = predict(cfg, planned_config(cfg), ranks=1, device=CPU)
    trainable = make_trainable(cfg, World(), made(cfg))
    for step, predicted in enumerate(plan.steps.values()):
        with trainable.meter.count_step() as timeline:
            train_step(trainable, real_rows(cfg, 1), step, stop=0)
        assert timeline.peak_by_phase == predicted.peak_by_phase
    matrices = {n: p for n, p in trainable.model.named_parameters() if isinstance(p, Int8Weight)}
    assert len(matrices) == 2 * 7
    others = [
        t for n, t in (*trainable.model.named_parameters(), *trainable.model.named_buffers()) if n not in matrices
    ]
    expected = sum(stored_bytes(p.shape, 16) for p in matrices.values()) + sum(t.nbytes for t in others)
    assert trainable.meter.held()["weights"] == expected
    assert plan.peak.by_kind["weights"] == expected


def test_int8_takes_attention_and_mlp_and_leaves_the_rest_bf16() -> None:
    model = made(load([*SMALL, *METHOD]))
    for name, p in model.named_parameters():
        inside = "self_attn" in name or "mlp" in name
        assert isinstance(p, Int8Weight) == inside and p.dtype is torch.bfloat16, name


def test_groups_are_the_methods_own_unless_the_user_says() -> None:
    def group(*overrides: str) -> int:
        found: Any = int8_matrices(load(["precision=int8_sr", *overrides]))
        return int(found.group)

    assert [group(f"optim={name}") for name in ("qgalore", "qapollo", "qapollo_mini", "adamw")] == [256, 128, 128, 256]
    assert group("optim=qapollo", "precision.int8_group=64") == 64


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["optim=qgalore"], "optim=qgalore: is a method for weights in int8, which precision=int8_sr keeps; add it"),
        (["optim=qapollo_mini", "precision=bf16_sr"], "optim=qapollo_mini: is a method for weights in int8"),
        (
            ["precision=bf16", "precision.int8_group=64"],
            "precision.int8_group=64: has no effect with",
        ),
        (["precision=int8_sr", "precision.int8_group=4"], "precision.int8_group=4: must be at least 8"),
        (["precision=int8_sr", "precision.int8_targets='('"], "precision.int8_targets='(': not a regular expression"),
        (["precision=int8_sr", "precision.compute=fp32"], "precision.weights=int8_sr with precision.compute=fp32"),
        (["optim=qgalore", "precision=int8_sr", "optim.compat=authors"], "optim.compat=authors: q-galore-torch adds"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_message(overrides: list[str], message: str) -> None:
    with pytest.raises(UserError) as refused:
        load(overrides)
    assert message in str(refused.value)


def test_a_rule_that_finds_no_matrix_of_the_model_is_refused() -> None:
    with pytest.raises(UserError, match=r"precision\.int8_targets='nothing': finds none of the model's matrices"):
        made(load([*SMALL, *METHOD, "precision.int8_targets=nothing"]))
