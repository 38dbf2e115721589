import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from optim import registry
from optim.config import (
    AdamWConfig,
    Basis,
    Compat,
    GaLoreConfig,
    LibraryConfig,
    OnRefresh,
    OptimConfig,
    ProjType,
    Refresh,
    States,
)
from optim.config_lowrank import ProjectedConfig, TargetedConfig

ROOT = Path(__file__).parents[2]
SHAPES = [(96, 32), (32, 96), (40, 40), (7, 50), (50,), (), (80, 300), (300, 80), (64, 65), (70, 10, 8)]


def config(name, **options):
    cls = registry.config_class(name)
    if issubclass(cls, TargetedConfig):
        options = {"rank": 1 if "mini" in name else 6, "targets": "w", **options}
    return cls(name=name, **options)


def parameters(dtype=torch.float32):
    return [(f"w{i}", nn.Parameter(torch.ones(s, dtype=dtype))) for i, s in enumerate(SHAPES)]


def held_bytes(optimizer):
    storages = {
        v.untyped_storage().data_ptr(): v.untyped_storage().nbytes()
        for state in optimizer.state.values()
        for v in state.values()
        if isinstance(v, torch.Tensor)
    }
    return sum(storages.values())


def variants():
    """Every name as it is, with every codec, and projections also with what changes their states."""
    for name in registry.names():
        yield name, {}
        if issubclass(registry.config_class(name), LibraryConfig):
            continue
        yield from ((name, {"states": states}) for states in States)
        if issubclass(registry.config_class(name), ProjectedConfig):
            yield name, {"basis": Basis.int4, "rank": 64, "states": States.int8}
            if "apollo" not in name:
                yield name, {"lazy": True}
            else:
                yield name, {"basis": Basis.regenerate}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options"), variants(), ids=str)
@pytest.mark.filterwarnings("ignore:rank=")
def test_states_are_as_large_as_documented_before_and_after_a_step(name, options, dtype):
    if dtype is torch.float64 and issubclass(registry.config_class(name), LibraryConfig):
        pytest.skip("refused; see test_optim_library.py")
    named = parameters(dtype)
    cfg = config(name, **options)
    assert cfg.problems() == []
    optimizer = registry.build(cfg, named)
    expected = registry.state_bytes(cfg, [(n, p.shape) for n, p in named], dtype)
    assert held_bytes(optimizer) == expected
    for _, p in named:
        p.grad = torch.randn(p.shape).to(dtype)
    optimizer.step()
    assert held_bytes(optimizer) == expected


@pytest.mark.parametrize("proj_type", list(ProjType))
def test_galore_bytes_by_hand(proj_type):
    cfg = GaLoreConfig(rank=4, targets="w", proj_type=proj_type)
    right = {ProjType.std: True, ProjType.reverse_std: False, ProjType.left: False, ProjType.right: True}[proj_type]
    m, n, r = 30, 20, 4
    expected = 4 * (2 * m * r + r * n) if right else 4 * (2 * r * n + r * m)
    assert registry.state_bytes(cfg, [("w", (m, n))]) == expected


def test_galore_7b_states_are_those_of_the_papers_formula():
    """specs: 2b nr + 2mr a matrix with m <= n; here b = 4 and the basis in fp32 too."""
    shapes = [("attn.q.weight", (4096, 4096))] * 4 + [("mlp.up.weight", (11008, 4096))] * 3
    expected = 4 * (4 * 3 * 1024 * 4096 + 3 * 1024 * (2 * 11008 + 4096))
    assert registry.state_bytes(GaLoreConfig(rank=1024), shapes) == expected


@pytest.mark.parametrize("name", registry.names())
def test_every_name_has_a_config_of_that_name_and_steps(name):
    cfg = registry.config_class(name)()
    assert cfg.name == name and isinstance(cfg, OptimConfig) and cfg.problems() == []
    named = parameters()
    optimizer = registry.build(config(name), named)
    before = [p.detach().clone() for _, p in named]
    for _, p in named:
        p.grad = torch.randn(p.shape)
    optimizer.step()
    assert not any(torch.equal(a, p) for a, (_, p) in zip(before, named, strict=True))


@pytest.mark.parametrize("name", registry.names())
def test_every_name_builds_on_the_meta_device(name):
    named = [(n, nn.Parameter(p.detach().to("meta"))) for n, p in parameters()]
    optimizer = registry.build(config(name), named)
    assert all(v.is_meta for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("adamw", 8 * 1024 * 512),
        ("adamw_8bit", 2 * (1024 * 512 + 4 * 1024 * 2)),
        ("adamw_4bit", 2 * (1024 * 512 // 2 + 4 * 1024 * 4)),
        ("adamw_fp8", 2 * (1024 * 512 + 8 * 1024 * 4)),
        ("sgd", 4 * 1024 * 512),
        ("adafactor", 4 * (1024 * 512 + 1024 + 512)),
        ("galore", 4 * (2 * 1024 * 128 + 128 * 512)),
        ("galore_8bit", 2 * (1024 * 128 + 4 * 1024) + 4 * 128 * 512),
        ("galore_adafactor", 4 * (1024 * 128 + 1024 + 128 + 128 * 512)),
        ("qgalore", 2 * (1024 * 128 + 4 * 1024) + 128 * (512 // 2 + 4 * 2) + 4 * 5),
        ("apollo", 4 * (2 * 1024 * 128 + 128 * 512 + 1)),
        ("apollo_mini", 4 * (2 * 1024 + 512 + 1)),
        ("qapollo", 4 * (2 * 1024 * 128 + 128 * 512 + 1)),
        ("qapollo_mini", 4 * (2 * 1024 + 512 + 1)),
        ("fira", 4 * (2 * 1024 * 128 + 128 * 512 + 1)),
        ("cosmos", 4 * (1024 * 512 + 1024 * 128 + 128 * 512 + 128 * 128)),
        ("bnb_adamw_8bit", 2 * (1024 * 512 + 4 * 2048)),
        ("bnb_paged_adamw_8bit", 2 * (1024 * 512 + 4 * 2048)),
        ("bnb_paged_adamw", 8 * 1024 * 512),
        ("bnb_lion_8bit", 1024 * 512 + 4 * 2048),
        ("bnb_paged_lion_8bit", 1024 * 512 + 4 * 2048),
        ("torchao_adamw_8bit", 2 * (1024 * 512 + 4 * 2048)),
        ("torchao_adamw_4bit", 2 * (1024 * 512 // 2 + 4 * 4096)),
        ("torchao_adamw_fp8", 2 * (1024 * 512 + 4 * 2048)),
    ],
)
def test_bytes_of_a_tall_matrix_by_hand(name, expected):
    cfg = registry.config_class(name)()
    if hasattr(cfg, "rank") and "mini" not in name:
        cfg.rank = 128
    assert registry.state_bytes(cfg, [("mlp.up.weight", (1024, 512))]) == expected


def test_bytes_by_hand_cover_every_name():
    (mark,) = test_bytes_of_a_tall_matrix_by_hand.pytestmark
    assert {name for name, _ in mark.args[1]} == set(registry.names())


def test_options_of_the_config_reach_the_groups():
    cfg = GaLoreConfig(
        lr=0.5, betas=[0.8, 0.9], eps=1e-3, weight_decay=0.2, rank=3, scale=2.0, update_proj_gap=7, targets="w"
    )
    optimizer = registry.build(cfg, parameters())
    projected, _, vectors = optimizer.param_groups
    assert projected["betas"] == (0.8, 0.9) and projected["lr"] == 0.5 and projected["eps"] == 1e-3
    assert (projected["rank"], projected["scale"], projected["update_proj_gap"]) == (3, 2.0, 7)
    assert projected["weight_decay"] == 0.2 and vectors["weight_decay"] == 0.0 and vectors["rank"] is None


def test_an_unknown_name_lists_the_known_ones_and_the_nearest():
    for call in (lambda: registry.config_class("adam"), lambda: registry.build(OptimConfig(name="adam"), [])):
        with pytest.raises(
            ValueError, match=r"optim\.name=adam: unknown; known are adamw, .*galore.* Did you mean adamw"
        ):
            call()


def test_every_config_has_a_class_and_a_yaml():
    assert set(registry.CLASSES) == set(registry.names())
    assert {p.stem for p in (ROOT / "configs/optim").glob("*.yaml")} == set(registry.names())


def test_configs_and_names_cost_no_import_of_torch():
    code = "import sys, optim, optim.config, optim.registry, optim.schedule; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"rank": 0}, "optim.rank=0"),
        ({"update_proj_gap": 0}, "optim.update_proj_gap=0"),
        ({"scale": 0.0}, "optim.scale=0.0"),
        ({"targets": "("}, "optim.targets='('"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"betas": [0.9]}, "optim.betas=[0.9]"),
        ({"eps": 0.0}, "optim.eps=0.0"),
        ({"weight_decay": -1.0}, "optim.weight_decay=-1.0"),
    ],
    ids=str,
)
def test_config_problems_name_option_and_value(options, shown):
    (problem,) = GaLoreConfig(**options).problems()
    assert problem.startswith(shown)


@pytest.mark.parametrize(
    ("name", "options", "shown"),
    [
        ("galore", {"refresh": Refresh.random}, "optim.refresh=random: a random basis only measures"),
        ("galore", {"compat": Compat.authors}, "optim.compat=authors: the authors' package has refresh=svd"),
        ("galore_8bit", {"compat": Compat.authors, "refresh": Refresh.svd}, "optim.compat=authors: .*states=fp32"),
        ("galore", {"lazy_threshold": 1.5}, "optim.lazy_threshold=1.5"),
        ("galore_adafactor", {"on_refresh": OnRefresh.rotate}, "optim.on_refresh=rotate: factored moments"),
        ("galore", {"basis": Basis.regenerate}, "optim.basis=regenerate: a basis of optim.refresh=warm follows"),
        ("apollo", {"basis": Basis.regenerate, "refresh": Refresh.warm}, "optim.basis=regenerate: .*optim=apollo"),
        ("galore_adafactor", {"rank": 0}, "optim.rank=0"),
        ("apollo", {"on_refresh": OnRefresh.sign}, "optim.on_refresh=sign: a new random basis"),
        ("apollo", {"lazy": True}, "optim.lazy=true: random bases do not settle"),
        ("apollo", {"compat": Compat.authors, "refresh": Refresh.warm}, "optim.compat=authors: .*refresh=random"),
        ("cosmos", {"gamma": -1.0}, "optim.gamma=-1.0"),
        ("cosmos", {"lr_ratio": 0.0}, "optim.lr_ratio=0.0"),
        ("cosmos", {"rank": 0}, "optim.rank=0"),
        ("sgd", {"momentum": 1.0}, "optim.momentum=1.0"),
        ("adafactor", {"beta1": 1.0}, "optim.beta1=1.0"),
        ("adafactor", {"clip_threshold": 0.0}, "optim.clip_threshold=0.0"),
    ],
    ids=str,
)
def test_config_problems_of_the_other_methods_too(name, options, shown):
    (problem,) = registry.config_class(name)(**options).problems()
    assert re.match(shown, problem)


def test_a_decay_for_adamw_is_what_the_config_says():
    optimizer = registry.build(AdamWConfig(weight_decay=0.0), parameters())
    assert {g["weight_decay"] for g in optimizer.param_groups} == {0.0}
