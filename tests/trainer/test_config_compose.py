"""What composes, and to what."""

import json
import subprocess
import sys
import tomllib
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from optim.config import AdamWConfig, GaLoreConfig
from trainer import recipes
from trainer.cli import store
from trainer.cli.compose import compose, load, load_saved, to_yaml
from trainer.cli.docs import choice_docs, option_docs
from trainer.cli.overrides import Findings
from trainer.errors import UserError
from trainer.folder import plain
from trainer.recipes import ROOT
from trainer.schema import Config, Dtype

CHOICES = [(group, choice) for group, choices in store.groups().items() for choice in choices]


def composed(*overrides: str) -> Config:
    found = Findings()
    cfg = compose(list(overrides), found)
    assert found.problems == []
    loaded = OmegaConf.to_object(cfg)
    assert isinstance(loaded, Config)
    return loaded


@pytest.mark.parametrize("recipe", [None, *(pytest.param(name, marks=pytest.mark.slow) for name in recipes.names())])
@pytest.mark.parametrize(("group", "choice"), [pair for pair in CHOICES if pair[0] != "recipe"], ids=str)
def test_every_choice_composes_alone_and_with_every_recipe(group: str, choice: str, recipe: str | None) -> None:
    cfg = composed(f"{group}={choice}", *([f"recipe={recipe}"] if recipe else []))
    section = getattr(cfg, group)
    assert is_dataclass(section)
    if group in ("optim", "model"):
        assert section.name == choice, "the YAML's own name is what it is chosen by"


@pytest.mark.parametrize("recipe", recipes.names())
def test_every_arm_of_every_recipe_composes(recipe: str) -> None:
    for name, arm in recipes.read(recipe).claim.arms.items():
        assert composed(f"recipe={recipe}", *arm.overrides).recipe == recipe, name


@pytest.mark.parametrize("recipe", [None, *recipes.names()])
def test_a_configuration_in_plain_words_is_what_omegaconf_makes_of_it(recipe: str | None) -> None:
    more = ["parallel.engine=deepspeed", "deepspeed.zero_optimization.reduce_bucket_size=900"]
    cfg = composed(*([f"recipe={recipe}"] if recipe else more))
    assert plain(cfg) == OmegaConf.to_container(OmegaConf.structured(cfg), enum_to_str=True)


@pytest.mark.parametrize(("group", "choice"), CHOICES, ids=str)
def test_every_choice_says_in_its_first_line_what_it_is(group: str, choice: str) -> None:
    if group == "recipe":
        assert recipes.read(choice).claim.claim
        return
    assert (store.CONFIGS / group / f"{choice}.yaml").read_text().startswith("# ")
    assert choice_docs(group)[choice]


def test_every_group_has_a_default_and_every_yaml_a_group() -> None:
    main = OmegaConf.load(store.CONFIGS / "train.yaml")
    given = {str(name) for entry in main.defaults if not isinstance(entry, str) for name in entry}
    assert given == set(store.groups())
    assert {path.parent.name for path in store.CONFIGS.glob("*/*.yaml")} == given - {"recipe"}


def test_no_arguments_train_a_small_llama_with_galore_on_the_standard_library() -> None:
    cfg = load([])
    assert (cfg.model.name, cfg.data.source.value, type(cfg.optim)) == ("llama_tiny", "stdlib", GaLoreConfig)


def test_quickstart_is_what_runs_without_arguments() -> None:
    default, quickstart = composed(), composed("recipe=quickstart")
    quickstart.recipe, quickstart.run.name = default.recipe, default.run.name
    assert quickstart == default


@pytest.mark.parametrize(
    ("choice", "sizes"),
    {
        "llama_60m": (512, 1376, 8, 8),
        "llama_130m": (768, 2048, 12, 12),
        "llama_350m": (1024, 2736, 16, 24),
        "llama_1b": (2048, 5461, 32, 24),
        "llama_7b": (4096, 11008, 32, 32),
    }.items(),
)
def test_llama_sizes_are_those_of_the_papers_table(choice: str, sizes: tuple[int, ...]) -> None:
    model = composed(f"model={choice}").model
    assert (model.hidden_size, model.intermediate_size, model.heads, model.layers) == sizes
    assert model.vocab_size == 32000 and model.tie_embeddings is False


@pytest.mark.parametrize(
    ("choice", "dtypes"),
    {
        "fp32": ("fp32", "fp32"),
        "bf16": ("fp32", "bf16"),
        "bf16_pure": ("bf16", "bf16"),
        "bf16_sr": ("bf16_sr", "bf16"),
        "int8_sr": ("int8_sr", "bf16"),
        "fp64": ("fp64", "fp64"),
    }.items(),
)
def test_precision_choices_set_weights_and_compute(choice: str, dtypes: tuple[str, str]) -> None:
    precision = load([f"precision={choice}"]).precision
    assert (precision.weights, precision.compute) == (Dtype(dtypes[0]), Dtype(dtypes[1]))


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["optim=adamw", "optim.betas=[0.8,0.95]", "train.steps=7"],
        ["recipe=quickstart", "train.steps=${train.log_every}", "run.name='a-b'", "++optim.rank=8"],
        ["train.steps=5", "train.steps=6", "model.kv_heads=2", "data.path=null", "optim.targets='.*'"],
        ["train={steps: 9, log_every: 3}", "precision=bf16", "schedule=wsd", "run.dir=runs/x=1"],
    ],
    ids=len,
)
def test_overrides_give_what_hydra_itself_composes(overrides: list[str]) -> None:
    if "run.dir=runs/x=1" in overrides:
        overrides = [*overrides[:-1], "run.dir='runs/x=1'"]
    assert composed(*overrides) == OmegaConf.to_object(store.composed(overrides))


def test_an_override_wins_over_the_recipe_and_the_recipe_over_its_group(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(
        "defaults: [{override /optim: adamw}]\noptim: {lr: 0.5}\ntrain: {steps: 11}\n"
    )
    cfg = composed(f"recipe={tmp_path}", "train.steps=12")
    assert (type(cfg.optim), cfg.optim.lr, cfg.train.steps) == (AdamWConfig, 0.5, 12)
    assert cfg.recipe == str(tmp_path)


def test_a_recipe_finds_its_data_from_the_repository_wherever_it_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    path = composed("recipe=adamw_vs_galore_wikitext").data.path
    assert path == str((ROOT / "../shared/data/wikipedia/train.jsonl.gz").resolve())


def test_home_is_expanded_where_no_shell_does_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load(["run.dir='~/run'"]).run.dir == str(tmp_path / "run")


@pytest.mark.parametrize(
    "overrides",
    [[], ["optim=adamw", "optim.betas=[0.8,0.95]"], ["recipe=quickstart", "optim.proj_type=left", "run.threads=2"]],
    ids=len,
)
def test_a_saved_configuration_loads_back_equal(overrides: list[str], tmp_path: Path) -> None:
    cfg = load(overrides)
    (tmp_path / "config.yaml").write_text(to_yaml(cfg))
    assert load_saved(tmp_path / "config.yaml") == cfg
    assert load_saved(tmp_path / "config.yaml", []) == cfg


def test_a_saved_configuration_takes_new_data_but_keeps_tokenizer_and_length(tmp_path: Path) -> None:
    text = tmp_path / "book.txt"
    text.write_text("words " * 100)
    (tmp_path / "config.yaml").write_text(to_yaml(load(["data.sequence_length=64", "data.packing=document"])))
    data = load_saved(tmp_path / "config.yaml", ["data=text", f"data.path={text}"]).data
    assert (data.source.value, data.path, data.sequence_length, data.packing.value) == (
        "text",
        str(text),
        64,
        "document",
    )


def test_a_saved_configuration_refuses_what_its_run_has_decided(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text(to_yaml(load([])))
    with pytest.raises(UserError, match="optim=adamw: the run has made that choice"):
        load_saved(tmp_path / "config.yaml", ["optim=adamw"])
    with pytest.raises(UserError, match=r"data\.eval_row=3.*did you mean data\.eval_rows"):
        load_saved(tmp_path / "config.yaml", ["data.eval_row=3"])


def test_a_file_that_is_no_configuration_is_named(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    with pytest.raises(UserError, match="no such file"):
        load_saved(path)
    for content in ("[1, 2]", "a: {", "train: {speps: 3}", "optim: 3"):
        path.write_text(content)
        with pytest.raises(UserError, match="config.yaml"):
            load_saved(path)


def test_the_configuration_is_good_or_refused_without_torch() -> None:
    script = (
        "import sys, json\nfrom trainer.cli.main import main\ncode = main(['train', 'optim.lr=-1', 'tran.steps=3'])\n"
        "print(json.dumps([code, [m for m in ('torch', 'transformers', 'datasets') if m in sys.modules]]))"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [2, []]


def test_pyproject_packs_every_folder_with_code_or_configuration() -> None:
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    ours = ("trainer", "optim", "parallel", "offload")
    with_code = {".".join(path.parent.relative_to(ROOT).parts) for name in ours for path in (ROOT / name).rglob("*.py")}
    assert set(listed) == with_code | {"configs", "recipes"}


def test_every_option_says_what_it_means() -> None:
    for name, kind in store.SECTIONS.items():
        if is_dataclass(kind):
            silent = [
                field.name for field in fields(kind) if not option_docs(kind)[field.name] and field.name != "name"
            ]
            assert silent == [], f"{name}: no text under {silent}"
