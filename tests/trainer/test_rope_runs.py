"""A model from a folder, extended: trained, resumed, evaluated and exported as what it has become."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from trainer.cli.compose import load
from trainer.data.tokenizer import load_tokenizer
from trainer.errors import UserError
from trainer.evaluate import evaluate_run
from trainer.export import export_run
from trainer.plan import counting_device, planned_config, predict
from trainer.run import run

SIZES: dict[str, Any] = {
    "vocab_size": 264, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "initializer_range": 0.2, "head_dim": 8,
}  # fmt: skip
FAMILIES: dict[str, Callable[[], transformers.PretrainedConfig]] = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SIZES, sliding_window=8, layer_types=["sliding_attention", "full_attention"]
    ),
    "phi3": lambda: transformers.Phi3Config(**SIZES, original_max_position_embeddings=16),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=264, n_embd=32, n_layer=1, n_head=4, n_positions=64),
}


def pretrained(family: str, folder: Path) -> Path:
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(FAMILIES[family]()).save_pretrained(folder)
    load_tokenizer("byte").save_pretrained(folder)
    return folder


def overrides(folder: Path, family: str, *more: str) -> list[str]:
    text = folder / "text.jsonl"
    if not text.exists():
        rows = [{"text": f"row {i}: " + "some words to learn " * 9} for i in range(40)]
        text.write_text("".join(json.dumps(row) + "\n" for row in rows))
    source = folder / family
    source = source if source.exists() else pretrained(family, source)
    return [
        "data=jsonl", f"data.path={text}", f"data.cache_dir={folder / 'cache'}", "data.sequence_length=48",
        "data.eval_fraction=0.2", "data.eval_rows=4", "model=hf", f"model.path={source}", f"data.tokenizer={source}",
        "optim=adamw", "optim.lr=1e-2", "train.steps=2", "train.global_batch=4", "train.micro_batch=4",
        "run.device=cpu", "checkpoint.every=1", f"run.dir={folder / 'run'}", *more,
    ]  # fmt: skip


YARN = ("model.rope.type=yarn", "model.rope.factor=4")


@pytest.mark.parametrize(
    ("family", "kind"),
    [
        ("llama", "yarn"),
        pytest.param("llama", "ntk", marks=pytest.mark.slow),
        pytest.param("llama", "dynamic", marks=pytest.mark.slow),
        pytest.param("llama", "llama3", marks=pytest.mark.slow),
        pytest.param("gemma3", "linear", marks=pytest.mark.slow),
        pytest.param("phi3", "longrope", marks=pytest.mark.slow),
    ],
)
def test_an_extended_model_is_exported_as_what_was_trained(
    family: str, kind: str, tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    lists = ["model.rope.short_factor=[1,1,1,1]", "model.rope.long_factor=[1,2,3,4]"] if kind == "longrope" else []
    asked = overrides(tmp_path, family, f"model.rope.type={kind}", "model.rope.factor=4", *lists)
    trained = run(load(asked)).summary
    assert f"RoPE, {kind}: 64 tokens, 4 times 16" in capsys.readouterr().out
    assert evaluate_run(tmp_path / "run", [], None).loss == pytest.approx(trained["eval_loss"], rel=1e-12)

    exported = export_run(tmp_path / "run", tmp_path / "exported", None)
    model = transformers.AutoModelForCausalLM.from_pretrained(exported, dtype=torch.float32).eval()
    assert model.config.max_position_embeddings == (16 if kind == "dynamic" else 64)
    again = ["model=hf", f"model.path={exported}", f"run.dir={tmp_path / 'again'}", "train.resume=never"]
    opened = load([each for each in asked if not each.startswith(("model", "run.dir"))] + again)
    held_out = [record for record in run(opened).summary.items() if record[0] == "eval_loss_first"]
    assert held_out == [("eval_loss_first", pytest.approx(trained["eval_loss"], rel=1e-6))]


def test_a_run_goes_on_with_its_own_positions_and_another_may_extend_it(
    tmp_path: Path, without_figures: None, capsys: pytest.CaptureFixture[str]
) -> None:
    short = overrides(tmp_path, "llama", "data.sequence_length=16")
    before = run(load(short)).summary
    with pytest.raises(UserError, match="was trained with other rotary positions") as refusal:
        run(load([*short, "train.steps=3", *YARN]))
    assert "saved None, asked yarn" in str(refusal.value)
    checkpoint = tmp_path / "run" / "checkpoints" / "step_00000002"
    stage = [f"run.dir={tmp_path / 'stage'}", f"train.resume={checkpoint}", "train.steps=3", "data.sequence_length=64"]
    after = run(load([*short, *stage, *YARN])).summary
    assert (before["steps"], after["steps"]) == (2, 3)  # with the optimizer's states
    assert "at the beginning of other data" in capsys.readouterr().out
    same = [f"run.dir={tmp_path / 'stage'}", "train.steps=4", "data.sequence_length=64"]
    assert run(load([*short, *same, *YARN])).summary["steps"] == 4


def test_a_plan_is_of_the_extended_model(tmp_path: Path) -> None:
    cfg = load(overrides(tmp_path, "llama", "model.rope.type=dynamic", "model.rope.factor=4"))
    assert predict(cfg, planned_config(cfg), ranks=1, device=counting_device(cfg)).peak.total > 0
    with pytest.raises(UserError, match="no rotary position embedding"):
        planned_config(load(overrides(tmp_path, "gpt2", *YARN)))


def test_a_model_without_rotary_positions_is_refused_before_text_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("trainer.build.build_corpus", lambda *args, **kwargs: pytest.fail("read"))
    with pytest.raises(UserError, match="no rotary position embedding"):
        run(load(overrides(tmp_path, "gpt2", *YARN)))


@pytest.mark.parametrize(
    ("config", "more", "said"),
    [
        ({"max_position_embeddings": 16}, (), "or extend it, as with model.rope.type=yarn model.rope.factor=3"),
        ({"max_position_embeddings": 16}, ("model.rope.type=yarn",), "model.rope.factor=3 for data.sequence_length=48"),
        (
            {"max_position_embeddings": 32, "rope_scaling": {"type": "linear", "factor": 4.0}},
            ("model.rope.type=yarn", "model.rope.factor=4"),
            "scaled already (linear, factor 4.0)",
        ),
        (
            {
                "max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16},
            },
            ("model.rope.type=yarn", "model.rope.factor=2"),
            "at most 32 tokens",
        ),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 16,
                "rope_scaling": {"type": "longrope"},
            },
            ("model.rope.type=yarn", "model.rope.factor=2"),
            "at most 32 tokens",
        ),
    ],
    ids=["too short", "no factor", "scaled from somewhere", "scaled again", "Phi-3"],
)  # fmt: skip
def test_a_folder_is_asked_for_the_length_that_its_model_has(
    config: dict[str, Any], more: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    asked = overrides(tmp_path, "llama", *more)
    path = tmp_path / "llama" / "config.json"
    path.write_text(json.dumps({"model_type": "llama", "hidden_size": 32, **config}))
    with pytest.raises(UserError) as refusal:
        load(asked)
    assert said in str(refusal.value)
