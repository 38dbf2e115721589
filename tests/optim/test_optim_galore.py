import numpy as np
import pytest
import torch

from optim import AdamW, GaLoreAdamW
from optim.projection import orthonormality_error, side_of
from tests.reference import optimizers as reference

SHAPES = [(24, 24), (13, 40), (40, 13), (31, 29)]
PROJ_TYPES = ["std", "reverse_std", "left", "right"]
REFRESH = ["svd", "gram"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def galore(p, name="w", *, rank=4, gap=5, scale=0.25, proj_type="std", **kwargs):
    group = {"params": [(name, p)], "rank": rank, "update_proj_gap": gap, "scale": scale, "proj_type": proj_type}
    return GaLoreAdamW([group], **kwargs)


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("refresh", REFRESH)
@pytest.mark.parametrize("proj_type", PROJ_TYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_galore_matches_the_float64_reference_through_refreshes(shape, proj_type, refresh):
    p = torch.nn.Parameter(randn(*shape, dtype=torch.float64))
    grads = [randn(*shape, seed=s, dtype=torch.float64) for s in range(1, 13)]
    options = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
    expected = reference.galore(
        p.detach().numpy().copy(),
        [g.numpy() for g in grads],
        left=side_of(shape, proj_type) == "left",
        rank=4,
        gap=5,
        scale=0.25,
        **options,
    )
    optimizer = galore(p, proj_type=proj_type, refresh=refresh, **options)
    run(optimizer, p, grads)
    assert all(v.dtype is torch.float64 for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
    # the Gram matrix squares the condition number, which costs half the digits of the small directions
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-12 if refresh == "svd" else 1e-9)


@pytest.mark.parametrize("shape", [(13, 40), (40, 13)], ids=str)
def test_reverse_std_works_where_the_projected_gradient_is_square(shape):
    """The authors guess the side from the shape of R, and fail here."""
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    grad = randn(*shape, dtype=torch.float64)
    run(galore(p, rank=13, proj_type="reverse_std", scale=1.0, lr=1.0), p, [grad])
    assert float((p.detach() * grad).sum()) < 0  # full rank: a descent direction of the whole gradient


def test_full_rank_with_the_identity_as_basis_is_adamw():
    ours, plain = torch.nn.Parameter(randn(16, 16)), torch.nn.Parameter(randn(16, 16))
    first = galore(ours, rank=16, scale=1.0, lr=1e-2)
    first.state[ours]["basis"].copy_(torch.eye(16))
    second = AdamW([plain], lr=1e-2, weight_decay=0.0)
    grads = [randn(16, 16, seed=s) for s in range(1, 7)]
    first._refresh = lambda *_: None  # the identity stays
    run(first, ours, grads)
    run(second, plain, grads)
    assert torch.equal(ours, plain)


@pytest.mark.parametrize("due", [0, 3, 6])
def test_the_basis_changes_exactly_when_due(due):
    p = torch.nn.Parameter(randn(12, 8))
    optimizer = galore(p, gap=3)
    basis = optimizer.state[p]["basis"]
    for count in range(due + 3):
        before = basis.clone()
        run(optimizer, p, [randn(12, 8, seed=count + 1)])
        changed = not torch.equal(before, basis)
        assert changed == (count % 3 == 0), f"count {count}"


@pytest.mark.parametrize("shape", [(13, 40), (40, 13)], ids=str)
def test_transposing_the_weight_transposes_the_update(shape):
    straight, turned = torch.nn.Parameter(randn(*shape)), torch.nn.Parameter(randn(*shape).T.contiguous())
    grads = [randn(*shape, seed=s) for s in range(1, 8)]
    run(galore(straight, lr=1e-2), straight, grads)
    run(galore(turned, lr=1e-2), turned, [g.T.contiguous() for g in grads])
    torch.testing.assert_close(straight.T, turned.data, rtol=0, atol=1e-5)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_the_update_lies_in_the_span_of_the_basis(proj_type):
    p = torch.nn.Parameter(torch.zeros(20, 30, dtype=torch.float64))
    optimizer = galore(p, proj_type=proj_type, lr=1e-2)
    run(optimizer, p, [randn(20, 30, seed=s, dtype=torch.float64) for s in (1, 2)])
    q, w = optimizer.state[p]["basis"], p.detach()
    inside = w @ q.T @ q if q.shape[1] == 30 else q.T @ (q @ w)
    torch.testing.assert_close(inside, w, rtol=0, atol=1e-14)


def test_decay_shrinks_the_old_weight_and_ignores_scale():
    p = torch.nn.Parameter(randn(12, 8))
    start = p.detach().clone()
    run(galore(p, lr=0.1, weight_decay=0.5, scale=1e-12), p, [randn(12, 8, seed=1)])
    torch.testing.assert_close(p.detach(), start * 0.95)


def test_authors_mode_decays_the_updated_weight():
    options = {"lr": 0.1, "eps": 1e-8, "refresh": "svd", "compat": "authors"}
    decayed, plain = torch.nn.Parameter(randn(12, 8)), torch.nn.Parameter(randn(12, 8))
    run(galore(decayed, weight_decay=0.5, **options), decayed, [randn(12, 8, seed=1)])
    run(galore(plain, weight_decay=0.0, **options), plain, [randn(12, 8, seed=1)])
    torch.testing.assert_close(decayed, plain * 0.95)


def test_eps_weighs_against_the_corrected_moment_and_for_the_authors_against_the_raw_one():
    """With eps far above the gradient the first step is lr g / eps, and the authors' is 1/sqrt(1-b2) times smaller."""
    moved = {}
    for compat in ("torch", "authors"):
        p = torch.nn.Parameter(torch.zeros(8, 8, dtype=torch.float64))
        run(galore(p, rank=8, eps=1e3, betas=(0.9, 0.99), compat=compat), p, [randn(8, 8, seed=1, dtype=torch.float64)])
        moved[compat] = p.norm().item()
    assert moved["torch"] / moved["authors"] == pytest.approx(10.0, rel=1e-2)


@pytest.mark.parametrize("proj_type", PROJ_TYPES)
def test_captured_energy_is_that_of_the_leading_singular_values(proj_type):
    grad = randn(20, 30, seed=4)
    p = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = galore(p, proj_type=proj_type)
    run(optimizer, p, [grad])
    energy = torch.linalg.svdvals(grad).square()
    assert optimizer.state[p]["captured"] == pytest.approx(float(energy[:4].sum() / energy.sum()), rel=1e-4)
    assert orthonormality_error(optimizer.state[p]["basis"]) <= 1e-5


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_non_finite_gradient_changes_nothing_and_a_due_refresh_is_made_up_for(bad, count):
    """`count` steps first: at 0 and 3 a refresh is due."""
    broken, clean = torch.nn.Parameter(randn(12, 8)), torch.nn.Parameter(randn(12, 8))
    first, second = galore(broken, gap=3, weight_decay=0.1), galore(clean, gap=3, weight_decay=0.1)
    grads = [randn(12, 8, seed=s) for s in range(1, 7)]
    run(first, broken, grads[:count])
    poisoned = randn(12, 8, seed=99)
    poisoned[3, 5] = bad
    before = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in first.state[broken].items()}
    weight = broken.detach().clone()
    run(first, broken, [poisoned])
    assert torch.equal(broken, weight)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(before[k])) for k, v in first.state[broken].items())
    assert first.skipped == 1
    run(first, broken, grads[count:])
    run(second, clean, grads)
    assert torch.equal(broken, clean)


def test_a_zero_gradient_keeps_the_basis_and_the_first_real_one_makes_it():
    p = torch.nn.Parameter(randn(12, 8))
    start = p.detach().clone()
    optimizer = galore(p, gap=3)
    run(optimizer, p, [torch.zeros(12, 8)])  # as behind a layer that is initialised to zero
    assert torch.equal(p, start) and optimizer.state[p]["captured"] == 0
    run(optimizer, p, [randn(12, 8, seed=1)])
    basis = optimizer.state[p]["basis"].clone()
    assert optimizer.state[p]["captured"] > 0 and not torch.equal(p, start)
    run(optimizer, p, [randn(12, 8, seed=2), torch.zeros(12, 8)])  # the second is due at count 3
    assert torch.equal(optimizer.state[p]["basis"], basis)


@pytest.mark.parametrize("size", [1e-22, 1e22])
def test_gradients_whose_squares_leave_fp32_still_give_their_leading_directions(size):
    grad = randn(20, 30, seed=5)
    bases = []
    for factor in (1.0, size):
        p = torch.nn.Parameter(torch.zeros(20, 30))
        optimizer = galore(p)
        run(optimizer, p, [grad * factor])
        bases.append(optimizer.state[p]["basis"])
        energy = torch.linalg.svdvals(grad).square()
        assert optimizer.state[p]["captured"] == pytest.approx(float(energy[:4].sum() / energy.sum()), rel=1e-4)
    overlap = (bases[0] @ bases[1].T).square().sum() / 4
    assert overlap > 0.9999


def test_vectors_and_convolutions_in_a_projected_group_take_adamw():
    shapes = [(8,), (4, 3, 2)]
    ours = [torch.nn.Parameter(randn(*s)) for s in shapes]
    plain = [torch.nn.Parameter(randn(*s)) for s in shapes]
    first = GaLoreAdamW([{"params": ours, "rank": 2}], lr=1e-2)
    second = AdamW(plain, lr=1e-2, weight_decay=0.0)
    for a, b in zip(ours, plain, strict=True):
        a.grad = b.grad = randn(*a.shape, seed=7)
    first.step()
    second.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, plain, strict=True))


def test_bf16_weights_keep_fp32_states_and_take_the_fp32_step_rounded_once():
    p = torch.nn.Parameter(randn(16, 24).bfloat16())
    wide = torch.nn.Parameter(p.detach().float())
    grad = randn(16, 24, seed=1).bfloat16()
    narrow = galore(p, lr=1e-2, weight_decay=0.1)
    run(narrow, p, [grad])
    run(galore(wide, lr=1e-2, weight_decay=0.1), wide, [grad.float()])
    assert {narrow.state[p][k].dtype for k in ("basis", "exp_avg", "exp_avg_sq")} == {torch.float32}
    torch.testing.assert_close(p, wide.bfloat16(), rtol=2**-8, atol=0)


def test_gradients_are_left_as_they_were():
    p, grad = torch.nn.Parameter(randn(16, 24)), randn(16, 24, seed=1)
    run(galore(p), p, [grad, grad])
    assert torch.equal(p.grad, grad)


def test_a_rank_beyond_the_smaller_side_is_cut_with_a_warning():
    p = torch.nn.Parameter(randn(12, 8))
    with pytest.warns(UserWarning, match=r"rank=99.*1 matrices, such as w \(12, 8\)"):
        optimizer = galore(p, rank=99)
    assert optimizer.state[p]["basis"].shape == (8, 8)


@pytest.mark.parametrize(
    ("option", "value"),
    [("rank", 0), ("rank", 2.5), ("gap", 0), ("scale", 0.0), ("proj_type", "ful"), ("refresh", "qr"), ("compat", "x")],
)
def test_options_that_make_no_sense_are_refused_with_their_value(option, value):
    shown = "update_proj_gap" if option == "gap" else option
    with pytest.raises(ValueError, match=rf"{shown}={value!r}: must be"):
        galore(torch.nn.Parameter(randn(4, 4)), **{option: value})


@pytest.mark.parametrize("refresh", REFRESH)
def test_two_runs_are_bitwise_equal(refresh):
    ends = []
    for _ in range(2):
        p = torch.nn.Parameter(randn(40, 30))
        run(galore(p, refresh=refresh, gap=2), p, [randn(40, 30, seed=s) for s in range(6)])
        ends.append(p.detach())
    assert torch.equal(*ends)


def test_a_sharded_matrix_is_never_taken_for_a_small_one():
    """4 x 6 shards of an 8 x 6 matrix look wide, and would be projected on the other side. The signs of a solver on the
    whole gradient, which compat="authors" promises, cannot be had."""
    from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        p = torch.nn.Parameter(distribute_tensor(torch.zeros(8, 6), mesh, [Shard(0)], src_data_rank=None))
        state = galore(p, rank=3).state[p]
        assert state["exp_avg"].shape == (8, 3) and state["exp_avg"].to_local().shape == (4, 3)
        assert state["basis"].shape == (3, 6)
        with pytest.raises(ValueError, match=r"w is sharded, and compat='authors'.*parallel.zero=0"):
            galore(p, compat="authors")
    finally:
        torch.distributed.destroy_process_group()


def test_a_step_runs_on_fake_tensors():
    """So that a memory plan can run the real step without the memory."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        p = torch.nn.Parameter(torch.empty(64, 32))
        b = torch.nn.Parameter(torch.empty(64))
        optimizer = GaLoreAdamW([{"params": [p], "rank": 4}, {"params": [b]}])
        p.grad, b.grad = torch.empty(64, 32), torch.empty(64)
        optimizer.step()
        optimizer.step()
    assert optimizer.state[p]["step"] == 2
