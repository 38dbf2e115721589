"""environment.json: what explains a difference between two runs, and no secrets."""

import json
import subprocess
import tomllib
from pathlib import Path

import pytest
import torch

from trainer.environment import LIBRARIES, environment, git_state, without_secrets


def test_the_environment_is_json_and_names_what_the_run_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["stowage", "optim=galore", "hub.token=hf_abc"])
    monkeypatch.setenv("SOME_API_KEY", "sk-very-secret")
    text = json.dumps(environment())
    found = json.loads(text)
    assert found["torch"] == found["libraries"]["torch"] == torch.__version__
    assert found["command"] == ["stowage", "optim=galore", "hub.token=***"]
    assert found["cores"] >= 1 and found["memory"] > 2**28 and found["world_size"] == 1
    assert "hf_abc" not in text and "sk-very-secret" not in text


def test_every_dependency_of_the_project_is_noted() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("=")[0].strip() for requirement in project["dependencies"]}
    assert names <= set(LIBRARIES), f"not in LIBRARIES: {names - set(LIBRARIES)}"


@pytest.mark.parametrize(
    ("typed", "noted"),
    [
        ("hub.token=abc", "hub.token=***"),
        ("+WANDB_API_KEY=a=b", "+WANDB_API_KEY=***"),
        ("db.password=x", "db.password=***"),
        ("data.path=https://me:pw@host/x", "data.path=https://***@host/x"),
        ("data.tokenizer=byte", "data.tokenizer=byte"),
        ("seed=3", "seed=3"),
    ],
)
def test_secrets_on_the_command_line_are_blanked(typed: str, noted: str) -> None:
    assert without_secrets([typed]) == [noted]


def test_git_state_follows_commits_and_changes(tmp_path: Path) -> None:
    def git(*command: str) -> None:
        who = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(tmp_path), *who, *command], check=True, capture_output=True)

    assert git_state(tmp_path) is None
    git("init")
    assert git_state(tmp_path) is None, "no commit yet"
    (tmp_path / "a").write_text("1")
    git("add", "a")
    git("commit", "-m", "first")
    state = git_state(tmp_path)
    assert state is not None and len(state["commit"]) == 40 and state["changed"] is False
    (tmp_path / "a").write_text("2")
    assert git_state(tmp_path) == {"commit": state["commit"], "changed": True}
