"""APOLLO, APOLLO-Mini and Fira."""

import numpy as np
import pytest
import torch

from optim import APOLLO, AdamW, APOLLOMini, Fira
from optim.projection import side_of
from optim.subspace import Subspace
from tests.reference import lowrank as reference

SHAPES = [(24, 24), (13, 40), (40, 13), (31, 29)]
OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def build(cls, p, *, rank=4, gap=5, options=OPTIONS, **group):
    return cls([{"params": [("w", p)], "rank": rank, "update_proj_gap": gap, **group}], **options)


def run(optimizer, p, grads):
    """Step, and return the basis each step used."""
    bases = []
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()
        bases.append(Subspace(p.shape, optimizer.param_groups[0]).basis(optimizer.state[p], p.dtype).clone())
    return bases


def compare(reference_run, p, start, grads, bases, left):
    if left:
        expected = reference_run(start.numpy().T, [g.numpy().T for g in grads], [b.numpy() for b in bases]).T
    else:
        expected = reference_run(start.numpy(), [g.numpy() for g in grads], [b.numpy() for b in bases])
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-11)


@pytest.mark.parametrize("proj_type", ["std", "reverse_std", "left", "right"])
@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("q_compat", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_apollo_matches_the_float64_reference_through_refreshes(shape, q_compat, scale_type, proj_type):
    p = torch.nn.Parameter(randn(*shape))
    start = p.detach().clone()
    grads = [randn(*shape, seed=s) * s for s in range(1, 13)]  # growing, so that the limiter acts
    optimizer = build(APOLLO, p, scale=3.0, scale_type=scale_type, proj_type=proj_type, q_compat=q_compat)
    bases = run(optimizer, p, grads)
    assert all(v.dtype is torch.float64 for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))

    def by_hand(weight, gradients, used):
        kind = {"per_channel": scale_type == "channel", "corrected": q_compat}
        return reference.apollo(weight, gradients, used, scale=3.0, **kind, **OPTIONS)

    compare(by_hand, p, start, grads, bases, side_of(shape, proj_type) == "left")


@pytest.mark.parametrize("proj_type", ["std", "reverse_std"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_fira_matches_the_float64_reference_through_refreshes(shape, proj_type):
    p = torch.nn.Parameter(randn(*shape))
    start = p.detach().clone()
    grads = [randn(*shape, seed=s) * s for s in range(1, 13)]
    bases = run(build(Fira, p, proj_type=proj_type), p, grads)

    def by_hand(weight, gradients, used):
        return reference.fira(weight, gradients, used, scale=0.25, **OPTIONS)

    compare(by_hand, p, start, grads, bases, side_of(shape, proj_type) == "left")


@pytest.mark.parametrize("scale_type", ["channel", "tensor"])
@pytest.mark.parametrize("shape", [(16, 16), (20, 12), (12, 20)], ids=str)
def test_with_the_identity_as_basis_the_scale_is_that_of_full_adam(shape, scale_type):
    """Of the first step, which the limiter leaves alone."""
    p, q = torch.nn.Parameter(torch.zeros(shape).double()), torch.nn.Parameter(torch.zeros(shape).double())
    grad = randn(*shape)
    optimizer = build(APOLLO, p, rank=min(shape), scale_type=scale_type, options={"lr": 1.0})
    optimizer.state[p]["basis"].copy_(torch.eye(min(shape)))
    optimizer._refresh = lambda *_: None
    run(optimizer, p, [grad])
    q.grad = grad
    AdamW([q], lr=1.0, weight_decay=0.0).step()
    axis = (0, 1) if scale_type == "tensor" else (1 if shape[0] >= shape[1] else 0)
    norm = torch.linalg.vector_norm
    factor = norm(q.detach(), dim=axis, keepdim=True) / norm(grad, dim=axis, keepdim=True)
    torch.testing.assert_close(p.detach(), -grad * factor, rtol=1e-6, atol=0)


def test_the_scale_of_a_random_basis_is_that_of_full_adam_by_the_root_of_the_ratio_of_ranks():
    k = 256
    grads = [randn(512, k, seed=s) for s in range(3)]
    norms = {}
    for rank in (128, 64, 32, k):
        p = torch.nn.Parameter(torch.zeros(512, k).double())
        optimizer = build(APOLLO, p, rank=rank, gap=100, options={"lr": 1.0})
        if rank == k:
            optimizer.state[p]["basis"].copy_(torch.eye(k))
            optimizer._refresh = lambda *_: None
        run(optimizer, p, grads[:1])
        norms[rank] = float(p.detach().norm())
    for rank in (128, 64, 32):
        assert norms[rank] / norms[k] == pytest.approx((rank / k) ** 0.5, rel=0.05)


def test_the_update_of_mini_is_parallel_to_the_gradient():
    p = torch.nn.Parameter(torch.zeros(20, 30).double())
    optimizer = build(APOLLOMini, p, rank=1, options={"lr": 1e-2})
    for seed in range(3):
        before, grad = p.detach().clone(), randn(20, 30, seed=seed)
        run(optimizer, p, [grad])
        step = before - p.detach()
        cosine = (step * grad).sum() / step.norm() / grad.norm()
        assert float(cosine) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_factor_on_all_gradients_changes_nothing(factor):
    moved = []
    for by in (1.0, factor):
        p = torch.nn.Parameter(torch.zeros(20, 30).double())
        run(build(APOLLO, p, options={"lr": 1e-2, "eps": 1e-20}), p, [by * randn(20, 30, seed=s) for s in range(6)])
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini, Fira])
def test_the_norm_of_an_update_grows_by_a_hundredth_at_most_and_may_shrink_at_once(cls):
    p = torch.nn.Parameter(torch.zeros(20, 30).double())
    optimizer = build(cls, p, gap=100, options={"lr": 1e-2})
    norms = []
    for seed in [0, 1, 2, 3, 4, 4, 4, 4]:  # moments cancel out, then add up
        run(optimizer, p, [randn(20, 30, seed=seed)])
        norms.append(float(optimizer.state[p]["growth"]))
    assert all(b <= 1.01 * (a + 1e-8) * (1 + 1e-12) for a, b in zip(norms, norms[1:], strict=False))
    run(optimizer, p, [torch.zeros(20, 30).double()])
    norms.append(float(optimizer.state[p]["growth"]))
    ratios = [b / a for a, b in zip(norms, norms[1:], strict=False)]
    assert ratios[-1] == 0 and any(ratio == pytest.approx(1.01, rel=1e-6) for ratio in ratios)


def test_bases_are_redrawn_when_due_from_name_and_count_and_moments_stay():
    p = torch.nn.Parameter(torch.zeros(20, 30).double())
    bases = run(build(APOLLO, p, gap=3), p, [randn(20, 30, seed=s) for s in range(7)])
    same = [torch.equal(a, b) for a, b in zip(bases, bases[1:], strict=False)]
    assert same == [True, True, False, True, True, False]
    torch.manual_seed(99)
    q = torch.nn.Parameter(torch.zeros(20, 30).double())
    other = APOLLO([{"params": [("other", torch.nn.Parameter(torch.zeros(20, 30).double())), ("w", q)], "rank": 4}])
    assert torch.equal(run(other, q, [randn(20, 30)])[0], bases[0])
    r = torch.nn.Parameter(torch.zeros(20, 30).double())
    assert not torch.equal(run(APOLLO([{"params": [("v", r)], "rank": 4}]), r, [randn(20, 30)])[0], bases[0])


def test_random_bases_have_variance_one_over_rank():
    p = torch.nn.Parameter(torch.zeros(300, 200).double())
    (basis,) = run(build(APOLLO, p, rank=50), p, [randn(300, 200)])
    assert basis.shape == (50, 200) and float(basis.square().mean()) == pytest.approx(1 / 50, rel=0.05)


def test_the_authors_group_keys_choose_basis_and_scale():
    p = torch.nn.Parameter(torch.zeros(20, 30))
    optimizer = APOLLO([{"params": [p], "rank": 4, "proj": "svd", "scale_type": "tensor", "scale": 128}])
    (group,) = optimizer.param_groups
    assert (group["refresh"], group["scale_type"], group["scale"]) == ("svd", "tensor", 128) and "proj" not in group
    with pytest.raises(ValueError, match="proj='qr': must be one of random, svd"):
        APOLLO([{"params": [p], "rank": 4, "proj": "qr"}])
    with pytest.raises(ValueError, match="scale_type='row': must be one of channel, tensor"):
        APOLLO([{"params": [p], "rank": 4}, {"params": [torch.nn.Parameter(torch.zeros(1))], "scale_type": "row"}])


@pytest.mark.parametrize("option", [{"on_refresh": "rotate"}, {"lazy": True}])
def test_what_a_random_basis_cannot_do_is_refused(option):
    with pytest.raises(ValueError, match="refresh='random'"):
        APOLLO([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "rank": 2, **option}])


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini, Fira])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("count", [0, 1, 3])
def test_a_non_finite_gradient_changes_nothing(cls, bad, count):
    p, q = torch.nn.Parameter(randn(12, 8)), torch.nn.Parameter(randn(12, 8))
    first, second = build(cls, p, gap=3), build(cls, q, gap=3)
    grads = [randn(12, 8, seed=s) for s in range(1, 7)]
    run(first, p, grads[:count])
    poisoned = randn(12, 8)
    poisoned[3, 5] = bad
    run(first, p, [poisoned])
    assert first.skipped == 1
    run(first, p, grads[count:])
    run(second, q, grads)
    assert torch.equal(p, q)


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini, Fira])
def test_a_gradient_is_left_as_it_was_and_a_zero_one_moves_nothing(cls):
    p = torch.nn.Parameter(randn(12, 8))
    start, grad = p.detach().clone(), randn(12, 8, seed=1)
    optimizer = build(cls, p, options={"lr": 1e-2})
    run(optimizer, p, [torch.zeros(12, 8).double()])
    assert torch.equal(p, start)
    run(optimizer, p, [grad])
    assert torch.equal(p.grad, grad) and not torch.equal(p, start) and p.isfinite().all()


@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini, Fira])
@pytest.mark.parametrize("shape", [(30, 20), (20, 30)], ids=str)
def test_bf16_weights_take_the_fp32_step_rounded_once(cls, shape, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 100)
    p = torch.nn.Parameter(randn(*shape).bfloat16())
    wide = torch.nn.Parameter(p.detach().float())
    first, second = build(cls, p), build(cls, wide)
    for seed in range(4):
        grad = randn(*shape, seed=seed).bfloat16()
        run(first, p, [grad])
        run(second, wide, [grad.float()])
        # Chunked and whole sums of squares differ in the last bit of the scale.
        assert (p.float() - wide.bfloat16().float()).abs().max() <= 2.0**-7 * wide.abs().max()
        wide.data.copy_(p.data)
    assert first.state[p]["growth"].dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cls", [APOLLO, APOLLOMini])
def test_a_basis_drawn_again_at_each_step_gives_the_same_weights_and_takes_no_bytes(cls, dtype):
    ends = []
    for basis in ("fp32", "regenerate"):
        p = torch.nn.Parameter(torch.ones(24, 40, dtype=dtype))
        q = torch.nn.Parameter(torch.ones(40, 24, dtype=dtype))
        optimizer = cls([{"params": [("p", p), ("q", q)], "rank": 3, "update_proj_gap": 3}], lr=1e-2, basis=basis)
        for step in range(8):
            for each in (p, q):
                each.grad = torch.randn(each.shape, generator=torch.Generator().manual_seed(step)).to(dtype)
            optimizer.step()
        ends.append((p.detach(), q.detach()))
        held = sum(v.nbytes for v in optimizer.state[p].values() if isinstance(v, torch.Tensor))
        group = optimizer.param_groups[0]
        assert held == cls.state_bytes(p.shape, group, dtype) == 4 * (2 * 40 * 3 + 1) + 4 * 3 * 24 * (basis == "fp32")
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("options", [{"refresh": "warm"}, {"compat": "authors"}, {"basis_copies": True}], ids=str)
def test_only_a_basis_drawn_by_name_can_be_drawn_again(options):
    with pytest.raises(ValueError, match="only a random basis can be drawn again|there is no basis to copy"):
        APOLLO([{"params": [torch.nn.Parameter(torch.ones(4, 4))], "rank": 2}], basis="regenerate", **options)
