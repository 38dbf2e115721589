"""What the checks see of files and of other sections."""

import json
import os
from pathlib import Path

import pytest

from optim.config import AdamWConfig
from trainer import check, check_machine
from trainer.cli.compose import load
from trainer.errors import UserError
from trainer.schema import Config


def said(*overrides: str) -> str:
    try:
        load(list(overrides))
    except UserError as error:
        return str(error)
    return ""


def model_folder(tmp_path: Path, *, files: tuple[str, ...] = ("model.safetensors",), **config: object) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    for name in files:
        (folder / name).write_bytes(b"x")
    return folder


def test_a_complete_model_folder_is_accepted(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, max_position_embeddings=256, hidden_size=64)
    assert said("model=hf", f"model.path={folder}", "optim.rank=64") == ""


def test_a_folder_with_pickled_weights_alone_is_refused_with_the_way_to_convert(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, files=("pytorch_model.bin",))
    text = said("model=hf", f"model.path={folder}")
    assert "has pytorch_model.bin but no *.safetensors" in text and "save_pretrained(NEW_PATH)" in text
    assert said("model=hf", f"model.path={folder}", "model.weights=random") == ""


def test_a_folder_without_weights_offers_training_from_scratch(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, files=())
    assert "has no *.safetensors; add them, or train" in said("model=hf", f"model.path={folder}")


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, files=("model-1.safetensors",))
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "1 of 2 weight files are missing, first model-2.safetensors" in said("model=hf", f"model.path={folder}")


@pytest.mark.parametrize(
    ("content", "expected"),
    [(None, "has no config.json"), ("{", "cannot be read as JSON"), ("adapter", "holds an adapter alone")],
)
def test_a_folder_without_a_good_config_is_refused(tmp_path: Path, content: str | None, expected: str) -> None:
    if content == "adapter":
        (tmp_path / "adapter_config.json").write_text("{}")
    elif content is not None:
        (tmp_path / "config.json").write_text(content)
    assert expected in said("model=hf", f"model.path={tmp_path}")


def test_a_misspelt_model_folder_offers_the_one_beside_it(tmp_path: Path) -> None:
    folder = model_folder(tmp_path)
    assert f"model.path={tmp_path}/modle: no such folder; did you mean model?" in said(
        "model=hf", f"model.path={folder.parent}/modle"
    )


def test_a_hub_name_is_taken_unless_the_hub_is_off_and_nothing_is_cached(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    asked = ("model=hf", "model.path=some-one/a.model")
    assert said(*asked) == ""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "model.path=some-one/a.model: no such folder, and the hub is switched off" in said(*asked)
    (tmp_path / "models--some-one--a.model").mkdir()
    assert said(*asked) == ""


@pytest.mark.parametrize("key", ["max_position_embeddings", "n_positions"])
def test_rows_longer_than_the_models_own_limit_are_refused(tmp_path: Path, key: str) -> None:
    folder = model_folder(tmp_path, **{key: 128})
    text = said("model=hf", f"model.path={folder}")
    assert "data.sequence_length=256: the model takes at most 128 tokens" in text
    assert "use data.sequence_length=128 or less" in text


def test_a_rank_above_the_models_own_width_is_refused(tmp_path: Path) -> None:
    folder = model_folder(tmp_path, text_config={"hidden_size": 64})
    assert "optim.rank=65: the model's matrices have at most 64 directions" in said(
        "model=hf", f"model.path={folder}", "optim.rank=65"
    )


@pytest.mark.parametrize(
    "override",
    [
        "hidden_size=64",
        "layers=2",
        "kv_heads=1",
        "vocab_size=99",
        "max_length=64",
        "tie_embeddings=true",
        "dropout=0.1",
    ],
)
def test_an_architecture_option_is_refused_for_a_model_that_brings_its_own(tmp_path: Path, override: str) -> None:
    folder = model_folder(tmp_path)
    text = said("model=hf", f"model.path={folder}", f"model.{override}")
    assert f"model.{override}: has no effect with model=hf" in text


def test_checking_the_run_folder_leaves_nothing_behind(tmp_path: Path) -> None:
    assert said(f"run.dir={tmp_path}/new/run") == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_run_folder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert f"{tmp_path}/file is not a folder" in said(f"run.dir={tmp_path}/file/run")
    if os.geteuid() != 0:
        (tmp_path / "locked").mkdir(mode=0o500)
        assert f"cannot write in {tmp_path}/locked" in said(f"run.dir={tmp_path}/locked/run")


def test_resume_never_refuses_a_folder_with_checkpoints(tmp_path: Path) -> None:
    asked = (f"run.dir={tmp_path}", "train.resume=never")
    assert said(*asked) == ""
    (tmp_path / "checkpoints/step_00000010").mkdir(parents=True)
    text = said(*asked)
    assert "train.resume=never" in text and "newest step_00000010" in text and "train.resume=auto" in text


def test_a_path_to_resume_from_must_be_a_checkpoint(tmp_path: Path) -> None:
    step = tmp_path / "checkpoints/step_00000010"
    step.mkdir(parents=True)
    assert f"is not a checkpoint (it has no manifest.json); use train.resume={step}" in said(f"train.resume={tmp_path}")
    (step / "manifest.json").write_text("{}")
    assert said(f"train.resume={step}") == ""


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    text = said("track=clearml")
    assert "track.to=clearml: the package clearml isn't installed" in text and "pip install" in text


def test_nan_never_reaches_a_sections_own_check() -> None:
    cfg = Config()
    cfg.schedule.warmup = float("inf")
    cfg.optim = AdamWConfig(betas=[0.9, float("nan")])
    assert [problem.split(":")[0] for problem in check.problems(cfg)] == [
        "optim.betas=[0.9, nan]",
        "schedule.warmup=inf",
    ]


def test_the_machine_is_held_against_the_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    cfg = load(["run.device=cuda"])
    with pytest.raises(UserError, match="run.device=cuda: torch finds no CUDA device here"):
        check_machine.check_hardware(cfg)
    check_machine.check_hardware(load([]))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    with pytest.raises(UserError, match="2 ranks on this machine: it has 1 CUDA devices"):
        check_machine.check_hardware(cfg)


def test_copies_of_a_basis_are_refused_where_nothing_is_sharded():
    options = ["optim=galore", "optim.basis_copies=true"]
    with pytest.raises(UserError, match="optim.basis_copies=true: has no effect with parallel.zero=0.*parallel.zero=1"):
        load(options)
    load([*options, "parallel.zero=1"])
