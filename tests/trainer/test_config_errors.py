"""What is refused, and whether the message names what was asked and what to do."""

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from trainer.cli import store
from trainer.cli.compose import load
from trainer.cli.overrides import known_options
from trainer.errors import UserError
from trainer.schema import TrainConfig


def message(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(list(overrides))
    return str(caught.value)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+optim.typo=1"], ["+optim.typo=1: no such option, and none can be added"]),
        (["+train.foo.bar=1"], ["+train.foo.bar=1: no such option"]),
        (["+train.steps=4"], ["write it without +: train.steps=4"]),
        (["+optim=adamw"], ["write it without +: optim=adamw"]),
        (["~optim.rank"], ["~optim.rank: an option cannot be removed"]),
        (["~track"], ["~track: an option cannot be removed"]),
        (["train.stesp=3"], ["train.stesp=3: no such option; did you mean train.steps"]),
        (["lr=3"], ["lr=3: no such option; did you mean optim.lr"]),
        (["optimizer=galore"], ["optimizer=galore: no such option; did you mean optim"]),
        (["optim=galor"], ["optim=galor: no such choice; did you mean optim=galore", "adamw"]),
        (["recipe=quickstrat"], ["recipe=quickstrat: no such recipe; did you mean recipe=quickstart?"]),
        (["optim/sub=x"], ["optim/sub=x: no such option"]),
        (["optim@here=adamw"], ["optim@here=adamw: a group cannot be placed elsewhere; write optim=adamw"]),
        (["optim=adamw", "optim.rank=3"], ["optim=adamw has no option rank; galore, ", "write optim=galore too"]),
        (["optim.name=adamw"], ["optim.name=adamw: is set by the choice of optim; write optim=adamw"]),
        (["train.steps=1e3"], ["train.steps=1e3: needs a whole number; write 1000"]),
        (["train.steps=ten"], ["train.steps=ten: needs a whole number"]),
        (["train.steps=true"], ["train.steps=true: needs a whole number"]),
        (["train.steps=null"], ["train.steps=null: needs a whole number"]),
        (["optim.lr=true"], ["optim.lr=true: needs a number"]),
        (["optim.betas=0.9"], ["optim.betas=0.9: needs a list in brackets, such as [0.9,0.999]"]),
        (["optim.betas=[0.9]"], ["optim.betas=[0.9]: needs two numbers"]),
        (["model.tie_embeddings=3"], ["model.tie_embeddings=3: needs true or false"]),
        (
            ["precision.weights=FP32"],
            ["precision.weights=FP32: needs one of fp32, bf16, bf16_sr, int8_sr, fp64, fp8; did you mean fp32?"],
        ),
        (["train=3"], ["train=3: is a section"]),
        (["train={steps:5,stepz:6}"], ["is a section; set its options one by one", "stepz"]),
        (["train.steps=[1"], ["train.steps=[1: cannot be read"]),
        (["data.path=a=b"], ["data.path=a=b: cannot be read", "'data.path=\"a=b\"'"]),
        (["optim.lr"], ["optim.lr: is no override; write key=value"]),
        (["--steps=3"], ["--steps=3: no such flag; options are written key=value"]),
        (["optim.lr=1,2"], ["optim.lr=1,2: several values make a sweep; add -m"]),
        (["hydra.run.dir=x"], ["hydra.run.dir=x: Hydra's settings act only in a sweep", "run.dir=PATH"]),
        (["train.steps=${nope}"], ["train.steps=${nope}: the reference cannot be followed"]),
        (["train.steps=${run.name}"], ["train.steps=${run.name}: the reference cannot be followed"]),
        (["optim.lr=nan"], ["optim.lr=nan: must be a finite number"]),
        (["schedule.warmup=inf"], ["schedule.warmup=inf: must be a finite number"]),
        (["optim.betas=[0.9,nan]"], ["optim.betas=[0.9, nan]: must be a finite number"]),
        (["seed=-1"], ["seed=-1: must lie between 0 and"]),
        (["run.name=a/b"], ["run.name='a/b': names a folder under runs/"]),
        (["run.name=.."], ["run.name='..': names a folder under runs/"]),
        (["train.steps=0"], ["train.steps=0: must be at least 1"]),
        (
            ["train.global_batch=10", "train.micro_batch=4"],
            ["use train.global_batch=8 or 12", "train.micro_batch=1 or 2 or 5"],
        ),
        (["schedule.warmup=500"], ["schedule.warmup=500: longer", f"train.steps={TrainConfig().steps}"]),
        (["precision.weights=bf16"], ["precision.weights=bf16 with precision.compute=fp32", "bf16_pure"]),
        (["model.heads=3"], ["model.heads=3: model.hidden_size=256 does not split", "use model.heads=1 or 2 or 4"]),
        (["model.kv_heads=3"], ["model.kv_heads=3: does not divide model.heads=4; use model.kv_heads=1 or 2 or 4"]),
        (["model.path=x"], ["model.path=x: has no effect with model=llama_tiny; write model=hf"]),
        (["model.weights=pretrained"], ["model.weights=pretrained: model=llama_tiny has no files"]),
        (["model.hidden_size=null"], ["model.hidden_size=null", "needs a value"]),
        (["optim.rank=999"], ["optim.rank=999", "at most 256", "use optim.rank=256 or less"]),
        (
            ["data.sequence_length=4096"],
            ["data.sequence_length=4096: the model takes at most 2048", "model.max_length=4096"],
        ),
        (["track.to=tensorbord"], ["track.to=tensorbord: no such tracker; did you mean tensorboard?"]),
        (["model.attention=flash_attention_2"], ["model.attention=flash_attention_2", "model.attention=sdpa"]),
    ],
    ids=lambda value: value[0] if isinstance(value, list) and len(value[0]) < 30 else "",
)
def test_a_mistake_is_named_with_its_remedy(overrides: list[str], expected: list[str]) -> None:
    said = message(*overrides)
    for text in expected:
        assert text in said


def test_all_mistakes_are_in_one_message() -> None:
    said = message(
        "optim.lrr=1", "train.steps=abc", "+optim.typo=1", "precision.compute=int8", "model=lama_tiny", "seed=-1"
    )
    assert said.startswith("6 problems in the configuration:")
    for text in (
        "optim.lrr=1",
        "train.steps=abc",
        "+optim.typo=1",
        "precision.compute=int8",
        "model=lama_tiny",
        "seed=-1",
    ):
        assert text in said


def test_what_only_follows_from_a_reported_mistake_is_not_reported() -> None:
    said = message("train.global_batch=10", "train.micro_btch=5")
    assert said.startswith("train.micro_btch=5: no such option"), "micro_batch=16 is not what the user wanted"
    said = message("model=lama_350m", "data.sequence_length=2049", "optim.rank=1000")
    assert said.startswith("model=lama_350m"), "the sizes are those of a model nobody asked for"
    said = message("optim=adamww", "optim.rank=7")
    assert said.startswith("optim=adamww")


def test_a_mistake_inside_a_misspelt_group_is_still_reported() -> None:
    assert "track.to=foo: no such tracker" in message("track=wandbb", "track.to=foo")


def test_ranks_count_in_the_global_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "3")
    said = message("train.global_batch=16", "train.micro_batch=4")
    assert "train.micro_batch=4 x 3 ranks = 12 sequences; use train.global_batch=12 or 24" in said
    assert load(["train.global_batch=24", "train.micro_batch=4"]).train.global_batch == 24


def test_another_packages_optimizer_is_refused_where_shards_would_cut_its_blocks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = ["optim=bnb_adamw_8bit", "parallel.zero=3"]
    assert load(asked).parallel.zero == 3, "one rank cuts nothing"
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "use parallel.zero=1 or 0, or an optimizer of ours" in message(*asked)


def test_a_recipe_that_does_not_fit_the_other_choices_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("optim: {rank: 3}\n")
    said = message(f"recipe={tmp_path}", "optim=adamw")
    assert "does not fit the other choices" in said and "rank" in said and str(tmp_path) in said


# --- 300 generated configurations, each wrong in one to four places ---


@dataclass
class Broken:
    """Overrides with mistakes, the texts the message must hold, and the sections that are taken."""

    overrides: list[str] = field(default_factory=list)
    mentions: list[str] = field(default_factory=list)
    sections: set[str] = field(default_factory=set)


LISTED = [name for name in known_options(store.composed([])) if "." in name and not name.endswith(".name")]
NUMBERS = [name for name in LISTED if name.split(".")[1] in (
    "steps", "global_batch", "log_every", "lr", "eps", "floor", "every", "keep", "timeout", "sequence_length", "layers",
    "sample_every", "eval_rows", "scale", "update_proj_gap", "threads",
)]  # fmt: skip
ENUMS = {
    "run.device": "cuda", "precision.weights": "bf16", "data.packing": "best_fit", "activations.fate": "recompute",
    "schedule.name": "linear", "optim.proj_type": "right", "parallel.engine": "torch", "model.attention": "eager",
}  # fmt: skip
NEGATIVE = ["train.steps", "optim.lr", "checkpoint.keep", "data.sequence_length", "model.layers", "memory.sample_every",
            "parallel.timeout", "schedule.floor", "run.threads"]  # fmt: skip


def misspelt(name: str, rng: random.Random) -> str:
    """Drop, double or swap a letter, so that no valid name results."""
    while True:
        at = rng.randrange(len(name) - 1)
        new = rng.choice(
            [
                name[:at] + name[at + 1 :],
                name[:at] + name[at] + name[at:],
                name[:at] + name[at + 1] + name[at] + name[at + 2 :],
            ]
        )
        if new != name and re.fullmatch(r"[a-z][a-z0-9_]+", new):
            return new


def unknown_key(rng: random.Random, broken: Broken) -> str:
    key = rng.choice([name for name in LISTED if len(name.split(".")[1]) > 3])
    section, _, option = key.partition(".")
    wrong = f"{section}.{misspelt(option, rng)}"
    if wrong in known_options():
        return unknown_key(rng, broken)
    broken.overrides.append(f"{wrong}=1")
    broken.mentions += [f"{wrong}=1", key]
    return section


def unknown_section(rng: random.Random, broken: Broken) -> str:
    key = rng.choice(NUMBERS)
    section, _, option = key.partition(".")
    wrong = misspelt(section, rng)
    broken.overrides.append(f"{wrong}.{option}=1")
    broken.mentions += [f"{wrong}.{option}=1", key]
    return section


def unknown_choice(rng: random.Random, broken: Broken) -> str:
    group, choices = rng.choice(list(store.groups().items()))
    choice = rng.choice([choice for choice in choices if len(choice) > 3] or choices)
    wrong = misspelt(choice, rng) if len(choice) > 3 else f"{choice}{choice}"
    if wrong in choices:
        return unknown_choice(rng, broken)
    broken.overrides.append(f"{group}={wrong}")
    broken.mentions += [f"{group}={wrong}", choice]
    return group


def wrong_type(rng: random.Random, broken: Broken) -> str:
    key = rng.choice(NUMBERS)
    broken.overrides.append(f"{key}={rng.choice(['many', 'true', '[1,2]', '{a: 1}', '1x', 'ten'])}")
    broken.mentions.append(key)
    return key.split(".")[0]


def wrong_enum(rng: random.Random, broken: Broken) -> str:
    key, right = rng.choice(list(ENUMS.items()))
    wrong = misspelt(right, rng)
    broken.overrides.append(f"{key}={wrong}")
    broken.mentions += [f"{key}={wrong}", f"did you mean {right}"]
    return key.split(".")[0]


def typo(rng: random.Random, broken: Broken) -> str:
    section = rng.choice(["optim", "train", "model", "data", "run"])
    override = (
        f"{rng.choice(['+', '++'])}{section}.{rng.choice(['typo', 'extra', 'new_thing'])}={rng.choice(['1', 'x'])}"
    )
    broken.overrides.append(override)
    broken.mentions.append(override)
    return section


def removal(rng: random.Random, broken: Broken) -> str:
    key = rng.choice(LISTED)
    broken.overrides.append(f"~{key}")
    broken.mentions.append(f"~{key}")
    return key.split(".")[0]


def impossible_value(rng: random.Random, broken: Broken) -> str:
    key = rng.choice(NEGATIVE)
    broken.overrides.append(f"{key}={rng.choice([-1, -7])}")
    broken.mentions.append(f"{key}=-")
    return key.split(".")[0]


def contradiction(rng: random.Random, broken: Broken) -> str:
    section, overrides, key = rng.choice([
        ("train", ["train.global_batch=10", "train.micro_batch=3"], "train.micro_batch=3"),
        ("model", ["model.heads=7"], "model.heads=7"),
        ("model", ["model.heads=8", "model.kv_heads=3"], "model.kv_heads=3"),
        ("model", ["model=hf"], "model.path"),
        ("model", ["model.weights=pretrained"], "model.weights=pretrained"),
        ("precision", ["precision.weights=fp64"], "precision.weights=fp64"),
        ("optim", ["optim=adamw", "optim.rank=4"], "optim.rank=4"),
        ("optim", ["optim.betas=[0.9]"], "optim.betas"),
        ("data", ["data=text"], "data.path"),
        ("data", ["data.streaming=true"], "data.streaming"),
        ("schedule", ["schedule.warmup=5000"], "schedule.warmup=5000"),
    ])  # fmt: skip
    broken.overrides += overrides
    broken.mentions.append(key)
    return section


def bad_path(rng: random.Random, broken: Broken) -> str:
    section, overrides, key = rng.choice([
        ("model", ["model=hf", "model.path=./no/such/model"], "model.path=./no/such/model"),
        ("model", ["model=hf", "model.path=/nowhere"], "model.path=/nowhere"),
        ("data", ["data=text", "data.path=/nowhere/text.txt"], "data.path=/nowhere/text.txt"),
        ("data", ["data.tokenizer=./no/tokenizer.json"], "data.tokenizer=./no/tokenizer.json"),
        ("run", ["run.dir=/dev/null/run"], "run.dir=/dev/null/run"),
        ("train", ["train.resume=/nowhere/step_00000001"], "train.resume=/nowhere/step_00000001"),
        ("recipe", ["recipe=./no/such/recipe"], "recipe=./no/such/recipe"),
    ])  # fmt: skip
    broken.overrides += overrides
    broken.mentions.append(key)
    return section


def bad_syntax(rng: random.Random, broken: Broken) -> str:
    override = rng.choice(["train.steps=[1", "optim.lr", "run.name=a=b", "optim.lr=1,2", "--steps=3", "run.dir='x",
                           "=3", "optim.lr=f(1)", "train.steps=${oops", "hydra.verbose=true"])  # fmt: skip
    broken.overrides.append(override)
    broken.mentions.append(override)
    return override.split(".")[0]


MISTAKES: list[Callable[[random.Random, Broken], str]] = [
    unknown_key, unknown_section, unknown_choice, wrong_type, wrong_enum, typo, removal, impossible_value,
    contradiction, bad_path, bad_syntax,
]  # fmt: skip


def generate(seed: int) -> Broken:
    """Make a configuration with one to four mistakes in different sections, among overrides that are right."""
    rng = random.Random(seed)
    broken = Broken()
    for _ in range(rng.choice([1, 1, 2, 3, 4])):
        trial = Broken(list(broken.overrides), list(broken.mentions), set(broken.sections))
        section = rng.choice(MISTAKES)(rng, trial)
        if section not in broken.sections:
            broken = Broken(trial.overrides, trial.mentions, broken.sections | {section})
    if "checkpoint" not in broken.sections:
        broken.overrides.append("checkpoint.verify=false")
    rng.shuffle(broken.overrides)
    return broken


@pytest.mark.parametrize("block", range(10))
def test_300_broken_configurations_are_refused_with_every_broken_key_and_the_nearest_name(block: int) -> None:
    for seed in range(30 * block, 30 * block + 30):
        broken = generate(seed)
        try:
            cfg = load(broken.overrides)
        except UserError as error:
            said = str(error)
        else:
            pytest.fail(f"seed {seed}: accepted {broken.overrides} as {cfg}")
        missing = [text for text in broken.mentions if text not in said]
        assert not missing, f"seed {seed}: {broken.overrides} does not mention {missing}:\n{said}"
