import copy
import io

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from optim import AdamW, registry
from optim.config import Basis, Compat, OnRefresh, Refresh, States
from optim.config_lowrank import ProjectedConfig, TargetedConfig

NAMES = registry.names()


def config(name, **options):
    cls = registry.config_class(name)
    if issubclass(cls, TargetedConfig):
        options = {"rank": 1 if "mini" in name else 48, "targets": "mlp", **options}
    if issubclass(cls, ProjectedConfig):
        options = {"update_proj_gap": 3, **options}
    return cls(name=name, lr=1e-2, weight_decay=0.1, **options)


def model(dtype=torch.float32, seed=0):
    """Matrices large enough for every codec, a projected gradient of rank 48 included."""
    torch.manual_seed(seed)
    net = nn.ModuleDict({"embed": nn.Embedding(50, 96), "mlp": nn.Linear(96, 64), "norm": nn.LayerNorm(64)})
    return net.to(dtype)


def train(net, optimizer, steps):
    """Gradients are a function of the step alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
        optimizer.step()


def through_a_file(state_dict):
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def assert_same(a, b):
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


RESUMED = [
    *((name, {}) for name in NAMES),
    ("sgd", {"states": States.bf16}),
    ("galore", {"basis": Basis.int4, "lazy": True, "states": States.int4, "stagger": True}),
    ("galore", {"refresh": Refresh.randomized, "on_refresh": OnRefresh.rotate, "states": States.fp8}),
    ("galore", {"on_refresh": OnRefresh.reset}),
    ("apollo", {"refresh": Refresh.warm, "on_refresh": OnRefresh.procrustes}),
    ("apollo", {"compat": Compat.authors}),
    ("apollo", {"basis": Basis.regenerate}),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved_at", [2, 3, 5], ids=lambda k: f"saved after {k} (refresh each 3)")
@pytest.mark.parametrize(("name", "options"), RESUMED, ids=str)
def test_a_resumed_run_is_bit_equal_to_an_uninterrupted_one(name, options, saved_at, dtype):
    rounding = "stochastic" if dtype is torch.bfloat16 else "nearest"
    whole = model(dtype)
    train(whole, registry.build(config(name, **options), whole.named_parameters(), rounding=rounding), range(9))

    begun = model(dtype)
    optimizer = registry.build(config(name, **options), begun.named_parameters(), rounding=rounding)
    train(begun, optimizer, range(saved_at))
    saved = through_a_file({"model": begun.state_dict(), "optimizer": optimizer.state_dict()})

    resumed = model(dtype, seed=99)
    resumed.load_state_dict(saved["model"])
    optimizer = registry.build(config(name, **options), resumed.named_parameters(), rounding=rounding)
    optimizer.load_state_dict(saved["optimizer"])
    train(resumed, optimizer, range(saved_at, 9))
    assert_same(whole, resumed)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize("name", NAMES)
def test_a_distributed_checkpoint_resumes_bit_equal_and_needs_no_step_before_the_load(name, tmp_path):
    whole = model()
    train(whole, registry.build(config(name), whole.named_parameters()), range(7))

    begun = model()
    optimizer = registry.build(config(name), begun.named_parameters())
    train(begun, optimizer, range(4))
    dcp.save({"model": begun.state_dict(), "optim": get_optimizer_state_dict(begun, optimizer)}, checkpoint_id=tmp_path)

    resumed = model(seed=99)
    optimizer = registry.build(config(name), resumed.named_parameters())
    target = {"model": resumed.state_dict(), "optim": get_optimizer_state_dict(resumed, optimizer)}
    dcp.load(target, checkpoint_id=tmp_path)
    resumed.load_state_dict(target["model"])
    set_optimizer_state_dict(resumed, optimizer, target["optim"])
    train(resumed, optimizer, range(4, 7))
    assert_same(whole, resumed)


@pytest.mark.parametrize("name", NAMES)
def test_a_state_is_tensors_and_numbers_and_exists_before_the_first_step(name):
    net = model()
    optimizer = registry.build(config(name), net.named_parameters())
    assert {id(p) for p in optimizer.state} == {id(p) for p in net.parameters()}
    for state in optimizer.state.values():
        assert state and all(type(v) in (torch.Tensor, int, float) for v in state.values())


@pytest.mark.parametrize("name", NAMES)
def test_bf16_weights_keep_their_fp32_states_through_a_load(name):
    net = model(torch.bfloat16)
    optimizer = registry.build(config(name), net.named_parameters())
    train(net, optimizer, range(2))
    other = registry.build(config(name), model(torch.bfloat16).named_parameters())
    other.load_state_dict(through_a_file(optimizer.state_dict()))
    rounded = []
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        for key, value in a.items():
            if isinstance(value, torch.Tensor):
                assert b[key].dtype in (torch.float32, torch.float16, torch.uint8) and torch.equal(value, b[key])
                rounded.append(not torch.equal(value.float(), value.bfloat16().float()))
    assert any(rounded), "a cast would have shown"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("name", "options"), RESUMED, ids=str)
def test_steps_run_on_fake_tensors_through_a_refresh(name, options, dtype):
    """So that a memory plan can run the real step without the memory."""
    with FakeTensorMode():
        shapes = {"embed.weight": (50, 96), "mlp.weight": (64, 96), "norm.weight": (64,)}
        named = [(key, nn.Parameter(torch.empty(shape, dtype=dtype))) for key, shape in shapes.items()]
        more = {"update_proj_gap": 1} if issubclass(registry.config_class(name), ProjectedConfig) else {}
        optimizer = registry.build(config(name, **options, **more), named, rounding="stochastic")
        for _ in range(3):
            for _, p in named:
                p.grad = torch.empty_like(p)
            optimizer.step()
    assert {state["step"] for state in optimizer.state.values()} <= {1, 3}


@pytest.mark.parametrize("name", NAMES)
def test_a_loaded_state_shares_no_memory_with_its_source(name):
    first, second = model(), model()
    source = registry.build(config(name), first.named_parameters())
    train(first, source, range(2))
    loaded = registry.build(config(name), second.named_parameters())
    loaded.load_state_dict(source.state_dict())
    before = copy.deepcopy(source.state_dict()["state"])
    train(second, loaded, range(2, 5))
    for i, state in source.state_dict()["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[i][k])) for k, v in state.items())


def test_options_added_since_a_checkpoint_take_their_defaults():
    net = model()
    optimizer = registry.build(config("galore"), net.named_parameters())
    saved = through_a_file(optimizer.state_dict())
    for group in saved["param_groups"]:
        del group["compat"], group["refresh"]
    optimizer.load_state_dict(saved)
    assert {(g["compat"], g["refresh"]) for g in optimizer.param_groups} == {("torch", "warm")}


def test_a_checkpoint_of_torch_adamw_loads():
    first, second = model(), model()
    theirs = torch.optim.AdamW(first.parameters(), lr=1e-2, weight_decay=0.0, fused=True)
    train(first, theirs, range(4))
    ours = AdamW(second.parameters(), lr=1e-2, weight_decay=0.0)
    second.load_state_dict(first.state_dict())
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    train(first, theirs, range(4, 7))
    train(second, ours, range(4, 7))
    assert_same(first, second)


def _regrouped(saved, names, groups):
    """State of `saved` under the ids that `groups` gives to the same names."""
    own = {n: i for g in saved["param_groups"] for n, i in zip(g["param_names"], g["params"], strict=True)}
    ids = {n: i for g in groups for n, i in zip(g["param_names"], g["params"], strict=True)}
    return {"state": {ids[n]: saved["state"][own[n]] for n in names}, "param_groups": groups}


@pytest.mark.parametrize("change", ["rank", "optimizer", "codes"])
def test_a_state_that_does_not_fit_is_refused_by_name_and_nothing_changes(change):
    net, other = model(), model()
    optimizer = registry.build(config("galore"), net.named_parameters())
    train(net, optimizer, range(2))
    wrong = config("adamw") if change == "optimizer" else config("galore", rank=3 if change == "rank" else 48)
    source = registry.build(wrong, other.named_parameters())
    saved = source.state_dict()
    if change == "optimizer":  # with the same groups, so that it is the state that shows
        saved = _regrouped(saved, [n for n, _ in other.named_parameters()], optimizer.state_dict()["param_groups"])
    if change == "codes":
        saved["state"][0] = {k: v.to(torch.uint8) if k == "exp_avg" else v for k, v in saved["state"][0].items()}
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=r"saved state of .*weight does not fit in: .*exp_avg.*saved with"):
        optimizer.load_state_dict(saved)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    for i, state in after["state"].items():
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before["state"][i][k])) for k, v in state.items())


def test_hooks_of_the_user_see_the_whole_state_before_and_after_a_load():
    net = model()
    optimizer = registry.build(config("galore"), net.named_parameters())
    train(net, optimizer, range(2))
    seen = []
    optimizer.register_load_state_dict_pre_hook(lambda _, incoming: seen.append(len(incoming["state"])))
    optimizer.register_load_state_dict_post_hook(lambda held: seen.append(len(held.state)))
    optimizer.load_state_dict(through_a_file(optimizer.state_dict()))
    count = len(list(net.parameters()))
    assert seen == [count, count]


def test_a_parameter_without_saved_state_keeps_its_fresh_one():
    p, q = nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))
    theirs = torch.optim.AdamW([p, q])
    p.grad = torch.ones(3)
    theirs.step()
    ours = AdamW([p, q])
    ours.load_state_dict(theirs.state_dict())
    assert ours.state[p]["step"] == 1 and ours.state[q]["step"] == 0


def one_at_a_time(net, optimizer, steps):
    """As DeepSpeed's partitions are stepped: each parameter has values only while it is stepped itself."""
    whole = {p: p.data for p in net.parameters()}
    for p in whole:
        p.data = p.new_empty(0)
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in whole:
            p.data = whole[p]
            p.grad = torch.randn(p.shape, generator=generator).to(p.dtype)
            optimizer.step()
            p.data, p.grad = p.new_empty(0), None
    for p in whole:
        p.data = whole[p]


@pytest.mark.parametrize("name", NAMES)
def test_parameters_may_have_values_only_while_they_are_stepped(name):
    nets = model(), model()
    for net, way in zip(nets, (train, one_at_a_time), strict=True):
        way(net, registry.build(config(name), net.named_parameters()), range(4))
    for one, other in zip(*(net.parameters() for net in nets), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)
