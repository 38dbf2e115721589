import numpy as np
import pytest
import torch

from optim import AdamW, GaLoreAdamW
from optim.projection import orthonormality_error, project
from optim.warm import orthonormal_rows, sketch_basis, warm_basis
from tests.reference import optimizers as reference

SIDES = ["left", "right"]


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def spectrum(shape, power, seed=0, dtype=torch.float32):
    """A matrix with singular values i^-power, and its singular vectors."""
    u, s, vh = torch.linalg.svd(randn(*shape, seed=seed, dtype=torch.float64), full_matrices=False)
    s = torch.arange(1, len(s) + 1, dtype=torch.float64) ** -power
    return ((u * s) @ vh).to(dtype)


def drifting(shape, power, steps, seed=0):
    """A matrix whose singular vectors turn a little from one to the next."""
    u, _, vh = torch.linalg.svd(randn(*shape, seed=seed, dtype=torch.float64), full_matrices=False)
    s = torch.arange(1, u.shape[1] + 1, dtype=torch.float64) ** -power
    for step in range(steps):
        yield ((u * s) @ vh).float()
        u = torch.linalg.qr(u + 0.15 * randn(*u.shape, seed=100 + step, dtype=torch.float64) / shape[0] ** 0.5).Q
        vh = torch.linalg.qr(
            vh.T + 0.15 * randn(*vh.T.shape, seed=200 + step, dtype=torch.float64) / shape[1] ** 0.5
        ).Q.T


def share_of_best(grad, basis, side):
    best = torch.linalg.svdvals(grad.double())[: len(basis)].square().sum()
    return float(project(grad, basis, side).double().square().sum() / best)


def galore(p, name="w", *, rank=4, gap=5, proj_type="std", **kwargs):
    group = {"params": [(name, p)], "rank": rank, "update_proj_gap": gap, "proj_type": proj_type}
    return GaLoreAdamW([group], **kwargs)


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(96, 96), (80, 200), (200, 80)], ids=str)
def test_a_warm_pass_keeps_99_percent_of_the_best_energy_on_drifting_gradients(shape, side, power):
    basis = None
    for grad in drifting(shape, power, 6):
        basis = (
            sketch_basis(grad, 24, side, grad.dtype, ("w", 0), None) if basis is None else warm_basis(grad, basis, side)
        )
        assert orthonormality_error(basis) <= 1e-5
        assert share_of_best(grad, basis, side) >= 0.99


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", [(96, 96), (80, 200), (200, 80)], ids=str)
def test_a_sketch_finds_99_percent_of_the_best_energy_from_nothing(shape, side, power):
    grad = spectrum(shape, power)
    basis = sketch_basis(grad, 24, side, torch.float32, ("w", 0), None)
    assert orthonormality_error(basis) <= 1e-5 and share_of_best(grad, basis, side) >= 0.99


@pytest.mark.parametrize("side", SIDES)
def test_a_search_of_a_large_basis_finds_new_directions_in_place_of_its_weakest(side):
    """Of rank 160 the best 99 % again, after 20 of the leading directions are none that the old basis has."""
    left, right = (torch.linalg.qr(randn(size, 240, seed=size)).Q for size in (300, 260))
    sizes = torch.arange(1, 241).float().pow(-0.5)
    old = (left[:, 20:180] if side == "left" else right[:, 20:180]).T.contiguous()
    grad = (left * sizes) @ right.T
    found = sketch_basis(grad, 160, side, torch.float32, ("w", 9), old)
    assert orthonormality_error(found) <= 1e-5 and share_of_best(grad, found, side) >= 0.99
    assert share_of_best(grad, old, side) < 0.7
    kept = [i for i in range(160) if float(found[i] @ old[i]) > 0.9]
    assert len(kept) >= 30  # what is not among the weakest stays in its place


def test_the_first_basis_of_a_large_matrix_is_sketched_and_nearly_the_best(monkeypatch):
    monkeypatch.setattr("optim.subspace.LARGE", 200)
    monkeypatch.setattr("optim.subspace.find_basis", None)
    p = torch.nn.Parameter(torch.zeros(260, 220))
    optimizer = galore(p, rank=24)
    grad = spectrum((260, 220), 0.5)
    run(optimizer, p, [grad])
    assert share_of_best(grad, optimizer.state[p]["basis"], "right") >= 0.99


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("spread", [0, 6, 12])
def test_rows_become_orthonormal_however_unequal_and_keep_the_first_direction(spread, dtype):
    rows = randn(16, 60, dtype=dtype) * torch.logspace(0, -spread, 16, dtype=dtype)[:, None]
    found = orthonormal_rows(rows)
    assert orthonormality_error(found) <= (1e-5 if dtype is torch.float32 else 1e-13)
    torch.testing.assert_close(found[0], rows[0] / rows[0].norm())


@pytest.mark.parametrize("side", SIDES)
def test_dependent_rows_are_completed(side):
    grad = randn(40, 3) @ randn(3, 24, seed=1)
    old = torch.linalg.qr(randn(40 if side == "left" else 24, 8)).Q.T
    for basis in (warm_basis(grad, old, side), sketch_basis(grad, 8, side, grad.dtype, ("w", 0), old)):
        assert orthonormality_error(basis) <= 1e-5
        assert share_of_best(grad, basis, side) >= 0.9999


@pytest.mark.parametrize("side", SIDES)
def test_bf16_gradients_take_the_same_pass_by_chunks(side, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 7 * 30)
    grad = spectrum((20, 30), 0.7).bfloat16()
    old = torch.linalg.qr(randn(20 if side == "left" else 30, 4)).Q.T
    torch.testing.assert_close(warm_basis(grad, old, side), warm_basis(grad.float(), old, side), rtol=0, atol=1e-5)


def test_a_direction_that_appears_anew_is_found_by_the_search():
    """Warm power iteration alone never sees what is orthogonal to its basis."""
    left, right = torch.linalg.qr(randn(40, 40)).Q, torch.linalg.qr(randn(30, 30, seed=1)).Q
    first, second = left[:, :4] @ right[:4], left[:, 4:8] @ right[4:8]
    p = torch.nn.Parameter(torch.zeros(40, 30))
    optimizer = galore(p, gap=1)
    run(optimizer, p, [first, first])
    assert optimizer.state[p]["captured"] == pytest.approx(1.0, abs=1e-5)
    run(optimizer, p, [first + 3 * second])
    assert optimizer.state[p]["captured"] == pytest.approx(0.9, abs=1e-3)
    assert float(warm_basis(first + 3 * second, right[:4], "right").mul(right[4]).sum().abs()) < 1e-5


def test_captured_and_overlap_are_recorded_at_each_refresh():
    p = torch.nn.Parameter(torch.zeros(40, 30))
    optimizer = galore(p, rank=6, gap=2, refresh="gram")
    grads = [spectrum((40, 30), 0.5, seed=s) for s in range(3)]
    run(optimizer, p, grads[:2])
    state, before = optimizer.state[p], optimizer.state[p]["basis"].clone()
    assert state["overlap"] == 0 and state["refreshes"] == 1
    run(optimizer, p, grads[2:])
    assert state["overlap"] == pytest.approx(float((state["basis"] @ before.T).square().sum() / 6), rel=1e-5)
    energy = torch.linalg.svdvals(grads[2]).square()
    assert state["captured"] == pytest.approx(float(energy[:6].sum() / energy.sum()), rel=1e-4)
    assert state["refreshes"] == 2


@pytest.mark.parametrize("shape", [(24, 20), (20, 24)], ids=str)
@pytest.mark.parametrize("on_refresh", ["keep", "sign", "procrustes", "rotate", "reset"])
def test_moments_at_a_refresh_are_what_the_option_says(shape, on_refresh):
    """After the refresh: the new basis Q, and moments that are those of before, turned, or made of one gradient."""
    left = shape[0] < shape[1]
    p = torch.nn.Parameter(torch.zeros(shape, dtype=torch.float64))
    optimizer = galore(p, gap=3, refresh="svd", on_refresh=on_refresh, betas=(0.9, 0.99))
    grads = [randn(*shape, seed=s, dtype=torch.float64) for s in range(4)]
    run(optimizer, p, grads[:3])
    state = optimizer.state[p]
    old, m, v = (state[key].clone() for key in ("basis", "exp_avg", "exp_avg_sq"))
    run(optimizer, p, grads[3:])
    new = state["basis"]
    turn = new @ old.T
    if on_refresh == "sign":
        assert (turn.diagonal() >= 0).all()
    if on_refresh == "procrustes":
        torch.testing.assert_close(turn, turn.T)  # polar factor taken out: what is left is symmetric
        assert (torch.linalg.eigvalsh(turn) >= -1e-12).all()
    if on_refresh == "rotate":
        m = turn @ m if left else m @ turn.T
        v = turn.square() @ v if left else v @ turn.square().T
    if on_refresh == "reset":
        m, v = torch.zeros_like(m), torch.zeros_like(v)
        assert state["step"] == 1 and state["next_refresh"] == 3
    low = new @ grads[3] if left else grads[3] @ new.T
    torch.testing.assert_close(state["exp_avg"], 0.9 * m + 0.1 * low)
    torch.testing.assert_close(state["exp_avg_sq"], 0.99 * v + 0.01 * low.square())


def test_rotating_goes_through_the_codec():
    p = torch.nn.Parameter(torch.zeros(96, 96))
    coded = galore(p, rank=48, gap=1, on_refresh="rotate", states="fp8", proj_type="left")
    q = torch.nn.Parameter(torch.zeros(96, 96))
    exact = galore(q, rank=48, gap=1, on_refresh="rotate", proj_type="left")
    grads = list(drifting((96, 96), 0.5, 4))
    run(coded, p, grads)
    run(exact, q, grads)
    assert coded.state[p]["exp_avg"].dtype is torch.uint8
    assert (p - q).norm() <= 0.1 * q.norm()


def test_staggered_refreshes_come_at_different_steps_and_then_every_gap():
    params = [(f"layers.{i}.weight", torch.nn.Parameter(randn(12, 8, seed=i))) for i in range(6)]
    group = {"params": params, "rank": 2, "update_proj_gap": 5}
    optimizer = GaLoreAdamW([group], stagger=True, refresh="gram")
    seen = {name: [] for name, _ in params}
    for step in range(16):
        before = {name: optimizer.state[p]["basis"].clone() for name, p in params}
        for _, p in params:
            p.grad = randn(12, 8, seed=step)
        optimizer.step()
        for name, p in params:
            if not torch.equal(before[name], optimizer.state[p]["basis"]):
                seen[name].append(step)
    assert all(steps[0] == 0 for steps in seen.values())
    assert len({steps[1] for steps in seen.values()}) > 2
    assert all(b - a == 5 for steps in seen.values() for a, b in zip(steps[1:], steps[2:], strict=False))
    assert all(1 <= steps[1] <= 5 for steps in seen.values())


def test_a_lazy_gap_doubles_only_after_five_overlaps_above_the_threshold():
    p = torch.nn.Parameter(torch.zeros(24, 16))
    optimizer = galore(p, gap=2, lazy=True)
    refreshed, before = [], torch.zeros(0)
    grad = spectrum((24, 16), 1.0)
    for step in range(30):
        run(optimizer, p, [grad + 1e-4 * randn(24, 16, seed=step)])
        if not torch.equal(before, optimizer.state[p]["basis"]):
            refreshed.append(step)
            before = optimizer.state[p]["basis"].clone()
    assert refreshed == [0, 2, 4, 6, 8, 10, 14, 22]  # the sixth refresh is the fifth overlap
    assert optimizer.state[p]["gap"] == 16


def test_a_lazy_gap_stays_where_subspaces_change():
    p = torch.nn.Parameter(torch.zeros(48, 32))
    optimizer = galore(p, rank=2, gap=1, lazy=True, refresh="gram")
    run(optimizer, p, [randn(48, 32, seed=s) for s in range(12)])
    assert optimizer.state[p]["gap"] == 1


@pytest.mark.parametrize("shape", [(40, 33), (33, 40), (300, 520)], ids=str)
def test_a_packed_basis_takes_half_a_byte_a_value_and_stays_near_orthonormal(shape):
    p = torch.nn.Parameter(torch.zeros(shape))
    optimizer = galore(p, rank=8, basis="int4")
    run(optimizer, p, [spectrum(shape, 0.5)])
    state = optimizer.state[p]
    k = min(shape)
    assert state["basis"].dtype is torch.uint8 and state["basis"].shape == (8, -(-k // 2))
    held = sum(state[key].nbytes for key in ("basis", "basis_scale", "basis_zero"))
    assert held == 8 * (-(-k // 2) + 4 * -(-k // 256))
    assert p.abs().sum() > 0
    from optim.subspace import Subspace

    basis = Subspace(shape, optimizer.param_groups[0]).basis(state, torch.float32)
    assert basis.shape == (8, k)
    assert orthonormality_error(basis) <= 0.3  # specs: 0.17 in the 2-norm for 1024 x 256


def test_sgd_in_a_subspace_of_full_rank_is_sgd():
    from optim import SGD

    for shape in [(16, 16), (12, 20), (20, 12)]:
        ours, plain = torch.nn.Parameter(randn(*shape)), torch.nn.Parameter(randn(*shape))
        group = {"params": [ours], "rank": 12 if 12 in shape else 16, "scale": 1.0, "update_proj_gap": 100}
        first, second = SGD([group], lr=0.1, weight_decay=0.01), SGD([plain], lr=0.1, weight_decay=0.01)
        for seed in range(8):
            ours.grad = plain.grad = randn(*shape, seed=seed)
            first.step()
            second.step()
        torch.testing.assert_close(ours, plain, rtol=0, atol=1e-5)


def test_a_gradient_of_low_rank_is_reproduced_on_the_step_of_a_refresh():
    from optim import SGD

    grad = randn(20, 3) @ randn(3, 30, seed=1)
    p = torch.nn.Parameter(torch.zeros(20, 30))
    p.grad = grad
    SGD([{"params": [p], "rank": 4, "scale": 1.0}], lr=1.0, momentum=0.0).step()
    torch.testing.assert_close(p.detach(), -grad, rtol=0, atol=1e-5 * float(grad.abs().max()))


def test_two_matrices_in_one_group_do_not_share_anything():
    params = [torch.nn.Parameter(randn(12, 8, seed=i)) for i in range(2)]
    alone = [torch.nn.Parameter(p.detach().clone()) for p in params]
    together = GaLoreAdamW([{"params": [("a", params[0]), ("b", params[1])], "rank": 2}])
    apart = [GaLoreAdamW([{"params": [(name, p)], "rank": 2}]) for name, p in zip("ab", alone, strict=True)]
    for seed in range(4):
        for i, (p, q) in enumerate(zip(params, alone, strict=True)):
            p.grad = randn(12, 8, seed=10 * seed + i)
            q.grad = p.grad.clone()
        together.step()
        for optimizer in apart:
            optimizer.step()
    assert all(torch.equal(p, q) for p, q in zip(params, alone, strict=True))


@pytest.mark.parametrize(
    ("options", "shown"),
    [
        ({"rank": 0}, "rank=0"),
        ({"update_proj_gap": 0}, "update_proj_gap=0"),
        ({"refresh": "random"}, "refresh='random': a random basis only measures"),
        ({"refresh": "qr"}, "refresh='qr': must be one of svd, gram, warm, randomized, random"),
        ({"on_refresh": "turn"}, "on_refresh='turn': must be one of keep"),
        ({"basis": "int8"}, "basis='int8': must be one of fp32, int4"),
        ({"scale": 0.0}, "scale=0.0"),
    ],
    ids=str,
)
def test_options_that_make_no_sense_are_refused_with_their_value(options, shown):
    p = torch.nn.Parameter(torch.zeros(4, 4))
    with pytest.raises(ValueError, match="^" + shown.replace("(", r"\(")):
        GaLoreAdamW([{"params": [p], "rank": 2, **options}])


def test_an_unknown_option_is_refused_by_name():
    with pytest.raises(TypeError, match="AdamW has no option gap; it has states"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], gap=3)


def test_warm_bases_of_one_gradient_are_its_singular_vectors_in_order():
    """Orthogonal iteration: repeated, the rows turn into the ordered vectors, as the SVD gives them."""
    grad = spectrum((40, 30), 1.0, dtype=torch.float64)
    basis = torch.linalg.qr(randn(30, 4, dtype=torch.float64)).Q.T
    for _ in range(60):
        basis = warm_basis(grad, basis, "right")
    expected = reference.leading_left_vectors(grad.T.numpy(), 4).T
    np.testing.assert_allclose(basis.abs().numpy(), np.abs(expected), atol=1e-6)
