"""Recipes: reading a claim, running its arms, holding the runs against it."""

import json
import signal
from pathlib import Path

import pytest

from trainer import recipes
from trainer.cli import main as cli
from trainer.cli import recipe_jobs
from trainer.cli.compose import load, load_saved
from trainer.cli.recipe_jobs import Job, run_jobs
from trainer.errors import TrainingStopped, UserError
from trainer.recipes import Check

CONFIG = "train: {steps: 3}\n"
CLAIM = """
claim: b is half of a
arms: {a: [optim=adamw], b: [optim=galore, optim.rank=4]}
seeds: [0, 1]
metrics: [eval_loss, memory.states]
checks:
  - {name: loss, arm: b, metric: eval_loss, over_arm: a, expected: 0.5, tolerance: 0.1}
  - {name: fall, arm: a, metric: eval_loss, over_metric: eval_loss_first, at_most: 0.6}
"""
Output = pytest.CaptureFixture[str]


class Process:
    """Stands in for a run's process that ends at once, or when it is told to."""

    def __init__(self, code: int | None):
        self.returncode = code
        self.told: list[int] = []

    def poll(self) -> int | None:
        return self.returncode

    def send_signal(self, number: int) -> None:
        self.told.append(number)
        self.returncode = 128 + number


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "claim.yaml").write_text(CLAIM)
    monkeypatch.chdir(tmp_path)
    return folder


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
    """Collect the command lines of runs, and leave what a run leaves: AdamW ends at 2 of 4, GaLore at 1."""
    seen: list[list[str]] = []

    def start(job: Job) -> Process:
        overrides = job.arguments
        seen.append(overrides)
        cfg = load(overrides)
        folder = Path(str(cfg.run.dir))
        folder.mkdir(parents=True)
        loss = {"adamw": 2.0, "galore": 1.0}[cfg.optim.name] + 0.01 * cfg.seed
        summary = {"eval_loss_first": 4.0, "eval_loss": loss, "memory": {"states": 10}}
        (folder / "summary.json").write_text(json.dumps(summary))
        (folder / "metrics.jsonl").write_text('{"step": 1, "loss": 3.0}\n{"step": 3, "eval_loss": 2.0}\n')
        environment = {"python": "3", "libraries": {"torch": "2"}, "git": None, "gpus": []}
        (folder / "environment.json").write_text(json.dumps(environment))
        return Process(0)

    monkeypatch.setattr(recipe_jobs, "start", start)
    return seen


def test_a_run_trains_every_arm_with_every_seed_and_judges(
    recipe: Path, trained: list[list[str]], capsys: Output
) -> None:
    assert cli.main(["recipe", "run", str(recipe), "train.log_every=2"]) == 0
    configs = [load(overrides) for overrides in trained]
    assert [(cfg.optim.name, cfg.seed, cfg.train.steps, cfg.train.log_every) for cfg in configs] == [
        ("adamw", 0, 3, 2), ("galore", 0, 3, 2), ("adamw", 1, 3, 2), ("galore", 1, 3, 2),
    ]  # fmt: skip
    out = Path("runs/recipes/mine")
    lines = [json.loads(line) for line in (out / "runs.jsonl").read_text().splitlines()]
    assert [(line["arm"], line["seed"], line["overrides"]) for line in lines][3] == ("b", 1, ["train.log_every=2"])
    assert (out / "loss.csv").read_text().splitlines()[:3] == [
        "arm,seed,step,loss,eval_loss",
        "a,0,1,3.0,",
        "a,0,3,,2.0",
    ]
    assert (out / "versions.txt").read_text() == "python 3\ntorch 2\n"
    assert load_saved(out / "resolved.yaml").train.steps == 3
    said = capsys.readouterr().out
    assert "the claim holds" in said and "differ from the recipe: train.log_every=2" in said
    assert cli.main(["recipe", "check", str(recipe)]) == 0


def test_a_claim_that_falls_short_is_exit_code_1(recipe: Path, trained: list[list[str]], capsys: Output) -> None:
    (recipe / "claim.yaml").write_text(CLAIM.replace("at_most: 0.6", "at_most: 0.4"))
    assert cli.main(["recipe", "run", str(recipe), "--seeds", "5", "--out", "elsewhere"]) == 1
    said = capsys.readouterr().out
    assert "FALLS SHORT" in said and "the claim does NOT hold (elsewhere)" in said


def test_arms_can_be_run_alone_and_others_added_later(recipe: Path, trained: list[list[str]], capsys: Output) -> None:
    assert cli.main(["recipe", "run", str(recipe), "--arms", "b"]) == 1
    assert [load(overrides).optim.name for overrides in trained] == ["galore", "galore"]
    assert "INCOMPLETE" in capsys.readouterr().out
    assert cli.main(["recipe", "run", str(recipe), "--arms", "a,b", "--resume"]) == 0
    assert [load(overrides).optim.name for overrides in trained] == ["galore", "galore", "adamw", "adamw"]


@pytest.mark.parametrize(
    ("arms", "said"),
    [
        ("a,bb", "--arms bb: mine has no such arm; did you mean b? Known: a, b"),
        ("", "mine has no such arm; Known: a, b"),
    ],
)
def test_arms_that_there_are_none_of_are_refused(
    recipe: Path, trained: list[list[str]], capsys: Output, arms: str, said: str
) -> None:
    assert cli.main(["recipe", "run", str(recipe), "--arms", arms]) == 2
    assert trained == [] and said in capsys.readouterr().err


def test_check_judges_the_newest_batch_alone(recipe: Path, trained: list[list[str]]) -> None:
    assert cli.main(["recipe", "run", str(recipe)]) == 0
    path = Path("runs/recipes/mine/runs.jsonl")
    line = json.loads(path.read_text().splitlines()[0]) | {"batch": "later", "summary": {"eval_loss": 9.0}}
    path.write_text(path.read_text() + json.dumps(line) + "\n")
    assert cli.main(["recipe", "check", str(recipe)]) == 1, "an arm is missing, and the loss is not there to divide by"


def test_a_run_that_does_not_finish_ends_the_recipe_with_its_code(
    recipe: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe_jobs, "start", lambda job: Process(3))
    assert cli.main(["recipe", "run", str(recipe)]) == 3


def test_a_batch_that_was_interrupted_goes_on_with_what_it_lacks(
    recipe: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    whole = recipe_jobs.start

    def interrupted(job: Job) -> Process:
        if len(trained) == 3:
            folder = Path(str(load(job.arguments).run.dir))
            folder.mkdir(parents=True)
            return Process(3)
        return whole(job)  # type: ignore[return-value]

    monkeypatch.setattr(recipe_jobs, "start", interrupted)
    assert cli.main(["recipe", "run", str(recipe), "--out", "out"]) == 3
    assert [cfg.seed for cfg in map(load, trained)] == [0, 0, 1], "all arms of a seed come before the next seed"

    def going_on(job: Job) -> Process:
        Path(str(load(job.arguments).run.dir)).rmdir()
        return whole(job)  # type: ignore[return-value]

    monkeypatch.setattr(recipe_jobs, "start", going_on)
    assert cli.main(["recipe", "run", str(recipe), "--out", "out", "--resume"]) == 0
    assert len(trained) == 4
    lines = [json.loads(line) for line in Path("out/runs.jsonl").read_text().splitlines()]
    assert len({line["batch"] for line in lines}) == 1 and len(lines) == 4
    assert Path("out/loss.csv").read_text().count("\n") == 1 + 2 * 4
    assert "the claim holds" in capsys.readouterr().out


def test_jobs_run_some_at_a_time_and_the_first_failure_has_the_others_save(monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[tuple[str, int]] = []
    ended: list[str] = []
    processes = {"a": Process(None), "b": Process(None), "c": Process(None), "d": Process(0)}

    def start(job: Job) -> Process:
        alive = sum(processes[name].returncode is None for name, _ in begun)
        begun.append((job.name, alive))
        if job.name == "c":  # b, beside which it runs, fails
            processes["b"].returncode = 3
        if job.name == "b":
            processes["a"].returncode = 0
        return processes[job.name]

    monkeypatch.setattr(recipe_jobs, "start", start)
    jobs = [Job(name, [name], done=lambda seconds, name=name: ended.append(name)) for name in "abcd"]
    with pytest.raises(TrainingStopped, match="exit code 3: b"):
        run_jobs(jobs, at_once=2)
    assert begun == [("a", 0), ("b", 1), ("c", 1)], "two at a time, none begun after a failure"
    assert ended == ["a"] and processes["c"].told == [signal.SIGTERM]


def test_a_run_beside_others_prints_into_its_file(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    log = tmp_path / "batch" / "a-seed0.log"
    with pytest.raises(UserError, match="exit code 2: train.step=3; what it said is in .*a-seed0.log"):
        run_jobs([Job("a", ["train.step=3"], log=log)], at_once=2)
    assert "did you mean train.steps" in log.read_text()
    assert capfd.readouterr().out == "a\n"


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out", "empty"], "no runs of mine lie in empty"),
        (["--out", "out", "train.steps=5"], "is not what the recipe"),
    ],
)
def test_a_batch_that_is_not_there_or_differs_is_not_gone_on_with(
    recipe: Path, trained: list[list[str]], capsys: Output, arguments: list[str], expected: str
) -> None:
    cli.main(["recipe", "run", str(recipe), "--out", "out"])
    assert cli.main(["recipe", "run", str(recipe), "--resume", *arguments]) == 2
    assert expected in capsys.readouterr().err


def test_a_mistake_in_any_arm_is_found_before_the_first_run(
    recipe: Path, trained: list[list[str]], capsys: Output
) -> None:
    (recipe / "claim.yaml").write_text(CLAIM.replace("optim.rank=4", "optim.rnak=4"))
    assert cli.main(["recipe", "run", str(recipe)]) == 2
    assert trained == [] and "did you mean optim.rank" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (("arm: b", "arm: c"), "no arm 'c'; known: a, b"),
        (("at_most: 0.6", "at_mots: 0.6"), "at_mots"),
        ((", at_most: 0.6", ""), "give expected and tolerance, or at_most, or at_least"),
        ((", tolerance: 0.1", ""), "give expected and tolerance"),
        (("seeds: [0, 1]", "seeds: [zero]"), "claim.yaml"),
        (("claim: b is half of a", "claim: ["), "cannot be read as YAML"),
        (("arms: {a: [optim=adamw], b: [optim=galore, optim.rank=4]}", "arms: {}"), "no arm 'b'"),
    ],
    ids=lambda change: change[1] if isinstance(change, tuple) else "",
)
def test_a_claim_of_another_form_is_named(recipe: Path, change: tuple[str, str], expected: str) -> None:
    (recipe / "claim.yaml").write_text(CLAIM.replace(*change))
    with pytest.raises(UserError, match="claim.yaml") as caught:
        recipes.read(str(recipe))
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("bound", "holding", "failing"),
    [
        ({"expected": 2.0, "tolerance": 0.1}, [1.81, 2.19], [1.79, 2.21]),
        ({"expected": -2.0, "tolerance": 0.1}, [-1.81], [-1.7, 2.0]),
        ({"at_most": 0.6}, [0.6, -1.0], [0.61, float("nan")]),
        ({"at_least": 0.6}, [0.6, 9.0], [0.59, float("nan")]),
    ],
    ids=str,
)
def test_bounds_hold_exactly_where_they_say(
    bound: dict[str, float], holding: list[float], failing: list[float]
) -> None:
    check = Check(name="c", arm="a", metric="m", **bound)  # type: ignore[arg-type]
    assert [check.holds(value) for value in holding] == [True] * len(holding)
    assert [check.holds(value) for value in failing] == [False] * len(failing)


def test_ratios_are_taken_seed_by_seed() -> None:
    check = Check(name="c", arm="b", metric="x.y", over_arm="a", expected=1, tolerance=1)
    runs = {("a", 0): {"x": {"y": 2}}, ("b", 0): {"x": {"y": 1}}, ("a", 1): {"x": {"y": 1}}, ("b", 1): {"x": {"y": 3}}}
    assert check.values(runs, [0, 1, 2]) == [0.5, 3.0]


def test_a_job_that_needs_what_another_leaves_begins_when_it_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun: list[str] = []

    class Leaves(Process):
        def poll(self) -> int | None:
            if begun == ["a", "c"]:  # and not yet b
                (tmp_path / "left").touch()
                self.returncode = 0
            return self.returncode

    def start(job: Job) -> Process:
        begun.append(job.name)
        return Leaves(None) if job.name == "a" else Process(0)

    monkeypatch.setattr(recipe_jobs, "start", start)
    run_jobs([Job("a", []), Job("b", [], needs=tmp_path / "left"), Job("c", [])], at_once=2)
    assert begun == ["a", "c", "b"]


STAGES = """
claim: b begins where a ends
arms:
  a: [model.max_length=256, optim=adamw]
  b:
    {after: a, ranks: 2, overrides: [model.rope.type=yarn, model.rope.factor=4, data.sequence_length=1024, optim=adamw]}
  c: {after: b, overrides: [model.rope.type=yarn, model.rope.factor=8, data.sequence_length=2048, optim=adamw]}
seeds: [0, 1]
metrics: [eval_loss]
checks: [{name: loss, arm: c, metric: eval_loss, over_arm: a, at_most: 1.0}]
"""


def test_a_stage_begins_with_the_weights_that_the_arm_before_it_ends_with(
    recipe: Path, trained: list[list[str]], monkeypatch: pytest.MonkeyPatch, capsys: Output
) -> None:
    (recipe / "claim.yaml").write_text(STAGES)
    fake, started = recipe_jobs.start, []

    def start(job: Job) -> Process:
        started.append("export" if job.arguments[0] == "export" else job.ranks)
        if started[-1] != "export":
            return fake(job)  # type: ignore[return-value]
        target = Path(job.arguments[-1])
        target.mkdir()
        longest = {"a": 256, "b": 1024}[target.parent.name[0]]
        scaled = {"rope_type": "yarn", "original_max_position_embeddings": 256}
        (target / "config.json").write_text(json.dumps({"max_position_embeddings": longest, "rope_parameters": scaled}))
        (target / "model.safetensors").write_bytes(b"weights")
        return Process(0)

    monkeypatch.setattr(recipe_jobs, "start", start)
    assert cli.main(["recipe", "run", str(recipe), "--out", "out"]) == 0
    assert started == [1, "export", 2, "export", 1] * 2
    paths = [cfg.model.path for cfg in map(load, trained)]
    assert [path and Path(path).parent.name for path in paths] == [
        None,
        "a-seed0",
        "b-seed0",
        None,
        "a-seed1",
        "b-seed1",
    ]
    assert cli.main(["recipe", "show", str(recipe)]) == 0
    said = capsys.readouterr().out
    assert (
        "b: torchrun --nproc-per-node 2 -m trainer recipe=mine model=hf model.path=EXPORT_OF_a model.rope.type" in said
    )


def test_a_stage_is_not_run_without_the_arm_it_begins_with(
    recipe: Path, trained: list[list[str]], capsys: Output
) -> None:
    (recipe / "claim.yaml").write_text(STAGES)
    assert cli.main(["recipe", "run", str(recipe), "--arms", "c"]) == 2
    assert "--arms c: c begins with the weights of b; add it: b,c" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (("data.sequence_length=2048", "data.sequence_length=2049"), "the model takes at most 2048 tokens"),
        (
            ("overrides: [model.rope.type=yarn, model.rope.factor=4", "overrides: [model.layers=2"),
            "has no effect with model=hf",
        ),
        (("ranks: 2, overrides: [", "ranks: 2, overrides: [train.global_batch=3, train.micro_batch=1, "), "x 2 ranks"),
        (("after: a", "after: c"), "after: c is no arm before it; those are: a"),
        (("ranks: 2", "ranks: 0"), "ranks: 0 must be at least 1"),
        (("ranks: 2", "rank: 2"), "rank"),
    ],
    ids=lambda change: change[1] if isinstance(change, tuple) else "",
)
def test_a_mistake_in_a_stage_is_found_before_there_are_weights_to_begin_with(
    recipe: Path, trained: list[list[str]], capsys: Output, change: tuple[str, str], said: str
) -> None:
    (recipe / "claim.yaml").write_text(STAGES.replace(*change))
    assert cli.main(["recipe", "run", str(recipe)]) == 2
    assert trained == [] and said in capsys.readouterr().err


@pytest.mark.slow
def test_stages_run_on_the_ranks_they_ask_for(recipe: Path, capfd: Output) -> None:
    sizes = "model.hidden_size=32, model.intermediate_size=48, model.layers=1, model.heads=2"
    stages = STAGES.replace("model.max_length=256", f"model.max_length=256, {sizes}").replace(
        "ranks: 2, overrides: [", "ranks: 2, overrides: [parallel.sequence=ring, "
    )
    (recipe / "claim.yaml").write_text(stages)
    (recipe / "config.yaml").write_text(
        "train: {steps: 2, global_batch: 2, micro_batch: 2}\ndata: {eval_rows: 2}\nrun: {device: cpu, threads: 1}\n"
    )
    assert cli.main(["recipe", "run", str(recipe), "--seeds", "0"]) == 0
    said = capfd.readouterr().out
    assert "2 ranks share each row" in said and "RoPE, yarn: 2,048 tokens, 8 times 256" in said


@pytest.mark.parametrize("name", recipes.names())
def test_every_recipe_that_comes_with_the_program_is_complete(name: str, capsys: Output) -> None:
    folder = recipes.find(name)
    assert recipes.read(name).claim.checks
    text = (folder / "README.md").read_text()
    assert f"stowage recipe run {name}" in text
    assert cli.main(["recipe", "show", name]) == 0
    assert cli.main(["recipe", "list"]) == 0
    assert name in capsys.readouterr().out
