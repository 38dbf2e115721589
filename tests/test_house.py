"""The house itself: who may import whom, and that every configuration file leads to a model that can be built."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import torch

from trainer.cli.compose import load

REPO = Path(__file__).parents[1]
FLOORS = ("parallel", "optim", "offload", "trainer")
"""Each may import itself and those before it."""


def imported(path: Path) -> set[str]:
    """Top-level packages a file imports, inside functions too."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(str(node.module).split(".")[0])
    return found


@pytest.mark.parametrize("floor", FLOORS)
def test_imports_go_down_the_floors_only(floor: str) -> None:
    above = set(FLOORS[FLOORS.index(floor) + 1 :])
    wrong = {str(p.relative_to(REPO)): imported(p) & above for p in (REPO / floor).rglob("*.py")}
    assert {path: names for path, names in wrong.items() if names} == {}


def test_nothing_imports_configs_recipes_tests_or_benchmarks() -> None:
    data = {"configs", "recipes", "tests", "benchmarks"}
    files = [p for floor in FLOORS for p in (REPO / floor).rglob("*.py")]
    assert {str(p): imported(p) & data for p in files if imported(p) & data} == {}


def test_option_files_import_the_standard_library_alone() -> None:
    """They are read before anything slow, so that a mistake is told within a second."""
    slow = {"torch", "transformers", "datasets", "numpy", "accelerate", "rich", "matplotlib"}
    files = [
        REPO / f
        for f in (
            "parallel/config.py",
            "optim/config.py",
            "offload/config.py",
            "trainer/data/config.py",
            "trainer/schema.py",
            "trainer/check.py",
            "trainer/check_machine.py",
            "trainer/check_model.py",
            "trainer/check_ranks.py",
        )
    ]
    assert {str(p): imported(p) & slow for p in files if imported(p) & slow - {"torch"}} == {}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    lines = [line for line in (REPO / "constraints.txt").read_text().splitlines() if line and line[0] != "#"]
    pins = dict(line.split("==") for line in lines)
    wanted = [*project["dependencies"], *project["optional-dependencies"]["test"]]
    for requirement in wanted:
        name, least = re.fullmatch(r"([\w.-]+)>=([\d.]+)", requirement).groups()  # type: ignore[union-attr]
        key = name if name in pins else name.replace("-", "_")
        assert key in pins, f"{name} is not pinned in constraints.txt"
        assert tuple(map(int, pins[key].split("."))) >= tuple(map(int, least.split("."))), requirement


def parameters(choice: str) -> int:
    """Weights of a model configuration, built without storage."""
    from trainer.model import build_model, model_config
    from trainer.schema import Dtype

    cfg = load([f"model={choice}", "data.sequence_length=128"])
    tokenizer = type("Tokenizer", (), {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0})()
    config = model_config(cfg.model, tokenizer, 259)
    model = build_model(cfg.model, config, weights=Dtype.fp32, device=torch.device("meta"), seed=0)
    return sum(p.numel() for p in model.parameters())


@pytest.mark.parametrize(
    "choice, millions",
    [
        ("llama_60m", 58.07),
        ("llama_linear_60m", 58.07),
        ("llama_130m", 134.1),
        ("llama_350m", 368.0),
        ("llama_1b", 1339),
        ("llama_7b", 6738),
    ],
)
def test_the_papers_models_have_the_papers_sizes(choice: str, millions: float) -> None:
    """Parameter counts of the GaLore repository's configurations."""
    assert parameters(choice) / 1e6 == pytest.approx(millions, rel=5e-4)


def test_the_tiny_model_has_a_few_million_weights() -> None:
    assert 2e6 < parameters("llama_tiny") <= parameters("llama_linear_tiny") < 5e6


@pytest.mark.parametrize("path", sorted(p.name for p in (REPO / "configs" / "model").glob("*.yaml")))
def test_every_model_file_is_tried_here(path: str) -> None:
    tried = (
        *("llama_tiny", "llama_60m", "llama_130m", "llama_350m", "llama_1b", "llama_7b", "hf"),
        *("llama_linear_tiny", "llama_linear_60m"),
    )
    assert path.removesuffix(".yaml") in tried
