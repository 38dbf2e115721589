"""The command line from outside: help, exit codes, sweeps, and who prints."""

import json
import os
import subprocess
import sys
import types
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from trainer import check_machine
from trainer.cli import main as cli
from trainer.cli import store
from trainer.cli.compose import load, load_saved, to_yaml
from trainer.cli.overrides import dotted, hints
from trainer.cli.packages import check_packages
from trainer.errors import TrainingStopped, UserError
from trainer.recipes import ROOT
from trainer.schema import Config, TrainConfig
from trainer.signals import Interrupted

Output = pytest.CaptureFixture[str]


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Config]:
    """Collect the configurations that would be trained; a learning rate above 0.5 is how the run ends."""
    seen: list[Config] = []

    def run(cfg: Config) -> None:
        seen.append(cfg)
        endings: dict[float, Exception] = {
            2.0: UserError("the user's"), 3.0: TrainingStopped("no longer finite"), 1.0: RuntimeError("ours"),
            130.0: Interrupted(2, "interrupted, saved"), 143.0: Interrupted(15, "interrupted, saved"),
        }  # fmt: skip
        if cfg.optim.lr in endings:
            raise endings[cfg.optim.lr]
        folder = Path(cfg.run.dir or "runs/here")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "summary.json").write_text(json.dumps({"eval_loss": 1.25, "eval_perplexity": 3.5}))

    monkeypatch.setitem(sys.modules, "trainer.run", types.SimpleNamespace(run=run))
    monkeypatch.setattr(check_machine, "check_hardware", lambda cfg: None)
    monkeypatch.setattr("trainer.cli.train.check_hardware", lambda cfg: None)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    monkeypatch.chdir(tmp_path)
    return seen


@pytest.mark.parametrize(
    ("rate", "code", "shown"),
    [
        ("0.5", 0, ""),
        ("2", 2, "the user's"),
        ("3", 3, "no longer finite"),
        ("130", 130, "saved"),
        ("143", 143, "saved"),
    ],
)
def test_exit_codes_say_how_a_run_ended(rate: str, code: int, shown: str, runs: list[Config], capsys: Output) -> None:
    assert cli.main(["train", f"optim.lr={rate}"]) == code
    assert len(runs) == 1
    assert shown in capsys.readouterr().err


def test_a_bug_keeps_its_traceback(runs: list[Config]) -> None:
    with pytest.raises(RuntimeError, match="ours"):
        cli.main(["train", "optim.lr=1"])


def test_a_mistake_prints_one_message_without_traceback(capsys: Output) -> None:
    assert cli.main(["train", "optim.lr=-1", "tran.steps=3"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and "Traceback" not in said.err
    assert said.err.startswith("stowage: 2 problems in the configuration:")


def test_other_ranks_leave_with_the_same_code_in_silence(capsys: Output, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    assert cli.main(["train", "optim.lr=-1"]) == 2
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["trian"], "did you mean train?"),
        (["optim=adamw"], "write stowage train optim=adamw"),
        (["train", "--multrun"], "--multrun: no such flag; did you mean --multirun"),
        (["train", "-m", "--cfg"], "leave one of the two out"),
        (["train", "--steps=3"], "options are written key=value"),
        (["eval"], "required: RUN;"),
        (["eval", "nowhere/run"], "no such folder"),
        (["eval", "--stpe", "3", "x"], "--stpe"),
        (["export", "x"], "required: DIR;"),
        (["recipe"], "required: ACTION"),
        (["recipe", "shw"], "did you mean show?"),
        (["recipe", "run"], "needs a NAME"),
        (["recipe", "run", "quickstrat"], "did you mean recipe=quickstart?"),
        (["recipe", "run", "quickstart", "--seeds", "a"], "0,1,2"),
        (["recipe", "run", "quickstart", "train.stesp=1"], "did you mean train.steps"),
        (["recipe", "check", "quickstart", "--out", "nowhere"], "first `stowage recipe run quickstart`"),
        (["recipe", "check", "quickstart", "train.steps=3"], "an effect on `recipe run` alone"),
    ],
    ids=" ".join,
)
def test_a_wrong_command_is_exit_code_2_and_one_message(
    arguments: list[str], expected: str, capsys: Output, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("stowage: ") and expected in said and "Traceback" not in said


def test_python_m_trainer_is_stowage_train(runs: list[Config]) -> None:
    assert cli.main(["train.steps=4"], default="train") == 0
    assert cli.main(["train", "train.steps=5"], default="train") == 0
    assert cli.main([], default="train") == 0
    assert [cfg.train.steps for cfg in runs] == [4, 5, TrainConfig().steps]


def test_stowage_alone_explains_itself(capsys: Output) -> None:
    assert cli.main([]) == 0
    said = capsys.readouterr().out
    assert all(f"  {command}" in said for command in cli.COMMANDS)
    assert cli.main(["--version"]) == 0


def test_help_has_every_option_and_choice_and_fits_100_columns(capsys: Output) -> None:
    assert cli.main(["train", "--help"]) == 0
    said = capsys.readouterr().out
    cfg = load([])
    for section in fields(cfg):
        value = getattr(cfg, section.name)
        names = dotted(f"{section.name}.", type(value)) if is_dataclass(value) else [section.name]
        for name in names:
            assert f"\n  {name} " in said or name == "recipe", name
    for group, choices in store.groups().items():
        for choice in choices:
            assert f" {choice} " in said, f"{group}={choice}"
    assert max(map(len, said.splitlines())) <= 100
    assert "\x1b" not in said, "plain when piped"
    assert "* galore" in said and "* llama_tiny" in said


def test_help_shows_the_options_and_values_of_the_choices_given(capsys: Output) -> None:
    assert cli.main(["train", "optim=adamw", "train.steps=77", "--help"]) == 0
    said = capsys.readouterr().out
    assert "* adamw" in said and "optim.rank" not in said and "int = 77" in said
    assert set(hints(store.optimizers()["adamw"])) <= {
        line.split()[0].removeprefix("optim.") for line in said.splitlines() if line.startswith("  optim.")
    }


@pytest.mark.parametrize("command", ["eval", "export", "recipe"])
def test_every_command_has_help_within_100_columns(command: str, capsys: Output) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert not ended.value.code
    said = capsys.readouterr().out
    assert said.startswith(f"usage: stowage {command}") and max(map(len, said.splitlines())) <= 100


def test_cfg_prints_a_configuration_that_loads_back(capsys: Output, tmp_path: Path) -> None:
    assert cli.main(["train", "optim=adamw", "train.steps=7", "--cfg"]) == 0
    (tmp_path / "config.yaml").write_text(capsys.readouterr().out)
    assert load_saved(tmp_path / "config.yaml") == load(["optim=adamw", "train.steps=7"])


def test_a_sweep_trains_every_combination_in_a_folder_of_its_own(runs: list[Config], capsys: Output) -> None:
    assert cli.main(["train", "-m", "optim=galore,adamw", "seed=0,1", "train.steps=7", "run.dir=swept"]) == 0
    assert [(cfg.optim.name, cfg.seed, cfg.train.steps) for cfg in runs] == [
        ("galore", 0, 7), ("galore", 1, 7), ("adamw", 0, 7), ("adamw", 1, 7),
    ]  # fmt: skip
    assert [cfg.run.dir for cfg in runs] == [str(Path("swept").absolute() / str(n)) for n in range(4)]
    said = capsys.readouterr().out
    rows = [line.split() for line in said.splitlines() if line[:1].isdigit()]
    assert rows[2] == ["2", "adamw", "0", "1.25", "3.5", "done"]


def test_a_sweep_leaves_nothing_of_hydra_behind(runs: list[Config]) -> None:
    assert cli.main(["train", "-m", "seed=0,1"]) == 0
    files = sorted(str(path.relative_to(Path.cwd())) for path in Path.cwd().rglob("*") if path.is_file())
    assert [Path(file).name for file in files] == ["summary.json", "summary.json"]
    assert all(file.startswith("runs/train/") for file in files)


def test_a_failing_job_leaves_the_others_running_and_its_code_is_the_sweeps(runs: list[Config], capsys: Output) -> None:
    assert cli.main(["train", "-m", "optim.lr=3,0.5,1", "run.dir=swept"]) == 3
    assert len(runs) == 3
    said = capsys.readouterr()
    assert "exit 3: no longer finite" in said.out and "exit 1: RuntimeError: ours" in said.out
    assert "Traceback" in said.err, "of our own bug"


def test_an_interrupt_ends_the_whole_sweep(runs: list[Config]) -> None:
    assert cli.main(["train", "-m", "optim.lr=0.5,143,0.25", "run.dir=swept"]) == 143
    assert len(runs) == 2


def test_mistakes_in_any_job_are_reported_before_the_first_one_starts(runs: list[Config], capsys: Output) -> None:
    assert cli.main(["train", "-m", "optim.lr=0.5,-1", "train.global_batch=16,17", "train.stesp=3", "run.dir=s"]) == 2
    said = capsys.readouterr().err
    assert runs == [] and not Path("s").exists()
    for text in ("optim.lr=-1", "train.global_batch=17", "train.stesp=3: no such option"):
        assert said.count(text) == 1


def test_a_sweep_over_a_glob_is_spread_out_by_hydra(runs: list[Config]) -> None:
    assert cli.main(["train", "-m", "schedule=glob(c*)", "run.dir=swept"]) == 0
    assert [cfg.schedule.name.value for cfg in runs] == ["constant", "cosine"]


def test_a_sweep_over_ranks_needs_a_folder_all_agree_on(
    runs: list[Config], capsys: Output, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["train", "-m", "seed=0,1", "train.micro_batch=4"]) == 2
    assert "needs run.dir=PATH" in capsys.readouterr().err


def saved_run(folder: Path, *steps: int) -> Path:
    for step in steps:
        (folder / f"checkpoints/step_{step:08d}").mkdir(parents=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text(to_yaml(load([])))
    return folder


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """Collect what eval and export hand over to the trainer."""
    seen: list[tuple[Any, ...]] = []
    hand_over = types.SimpleNamespace(
        evaluate_run=lambda *given: seen.append(given), export_run=lambda *given: seen.append(given)
    )
    monkeypatch.setitem(sys.modules, "trainer.evaluate", hand_over)
    monkeypatch.setitem(sys.modules, "trainer.export", hand_over)
    return seen


def test_eval_and_export_find_the_run_and_hand_it_over(calls: list[tuple[Any, ...]], tmp_path: Path) -> None:
    run = saved_run(tmp_path / "runs/train/today", 10, 20)
    assert cli.main(["eval", str(run), "data.eval_rows=0", "--step", "10"]) == 0
    assert cli.main(["eval", str(tmp_path / "runs/train"), "--json"]) == 0
    assert cli.main(["export", str(run), str(tmp_path / "out"), "--step", "20"]) == 0
    assert calls == [(run, ["data.eval_rows=0"], 10, False), (run, [], None, True), (run, tmp_path / "out", 20)]


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval", "RUN", "--step", "11"], "use --step 10 or 20"),
        (["eval", "RUN", "optim.lr=3"], "optim.lr=3: has no effect on an evaluation"),
        (["eval", "RUN", "data.eval_rwos=3"], "did you mean data.eval_rows"),
        (["eval", "RUN", "data=text", "data.path=/nowhere.txt"], "data.path=/nowhere.txt"),
        (["export", "RUN", "RUN"], "exists already"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_eval_and_export_refuse_what_they_could_not_heed(
    arguments: list[str], expected: str, calls: list[tuple[Any, ...]], capsys: Output, tmp_path: Path
) -> None:
    run = saved_run(tmp_path / "run", 10, 20)
    assert cli.main([argument.replace("RUN", str(run)) for argument in arguments]) == 2
    assert expected in capsys.readouterr().err and calls == []


def test_another_distributions_package_in_front_of_ours_is_reported(tmp_path: Path) -> None:
    (tmp_path / "optim").mkdir()
    (tmp_path / "optim/__init__.py").write_text("")
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    code = "import sys; from trainer.cli.main import main; sys.exit(main(['train', '--cfg']))"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert f"package optim: Python finds {tmp_path / 'optim'}" in done.stderr
    check_packages()


@pytest.mark.parametrize(("arguments", "code"), [(["--help"], 0), (["optim.lr=-1"], 2), (["trian"], 2)], ids=str)
def test_the_module_ends_with_the_code_from_a_real_process(arguments: list[str], code: int) -> None:
    command = [sys.executable, "-m", "trainer", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert "Traceback" not in done.stderr


def test_the_defaults_file_is_all_that_a_run_without_arguments_needs() -> None:
    assert OmegaConf.to_object(store.composed([])) == load([])
