"""SGD, Adafactor and COSMOS."""

import numpy as np
import pytest
import torch

from optim import COSMOS, SGD, Adafactor
from optim.cosmos import newton_schulz
from optim.projection import orthonormality_error
from tests.reference import lowrank as reference


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def run(optimizer, p, grads):
    for grad in grads:
        p.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("shape", [(5, 4), (7,), ()], ids=str)
def test_sgd_is_torch_sgd(shape):
    ours, theirs = (torch.nn.Parameter(randn(*shape)) for _ in range(2))
    grads = [randn(*shape, seed=s) for s in range(6)]
    run(SGD([ours], lr=0.1, momentum=0.8), ours, grads)
    run(torch.optim.SGD([theirs], lr=0.1, momentum=0.8), theirs, grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-14)


def test_sgd_decays_the_old_weight():
    p = torch.nn.Parameter(torch.ones(3).double())
    run(SGD([p], lr=0.1, weight_decay=0.5), p, [torch.zeros(3).double()])
    torch.testing.assert_close(p.detach(), torch.full((3,), 0.95).double())


@pytest.mark.parametrize("beta1", [0.0, 0.9])
@pytest.mark.parametrize("shape", [(12, 9), (9, 12)], ids=str)
def test_adafactor_matches_the_float64_reference(shape, beta1):
    p = torch.nn.Parameter(randn(*shape))
    grads = [randn(*shape, seed=s) * (s + 1) for s in range(8)]
    options = {"lr": 0.02, "beta1": beta1, "decay_rate": 0.8, "weight_decay": 0.1}
    expected = reference.adafactor(p.detach().numpy().copy(), [g.numpy() for g in grads], clip=1.0, **options)
    optimizer = Adafactor([p], **options)
    run(optimizer, p, grads)
    assert ("exp_avg" in optimizer.state[p]) == (beta1 > 0)
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-13)


def test_adafactor_in_a_subspace_steps_the_projected_gradient():
    p = torch.nn.Parameter(torch.zeros(20, 12).double())
    optimizer = Adafactor([{"params": [p], "rank": 4, "refresh": "gram", "scale": 0.5}], lr=0.02)
    grads = [randn(20, 12, seed=s) for s in range(5)]
    run(optimizer, p, grads)
    basis = optimizer.state[p]["basis"]
    low = reference.adafactor(
        np.zeros((20, 4)), [(g @ basis.T).numpy() for g in grads], lr=0.02, beta1=0.9, decay_rate=0.8, clip=1.0,
        weight_decay=0.0,
    )  # fmt: skip
    np.testing.assert_allclose(p.detach().numpy(), 0.5 * low @ basis.numpy(), rtol=0, atol=1e-13)


def test_adafactor_of_vectors_and_convolutions_is_finite_and_factored_over_the_last_two_dims():
    shapes = [(7,), (), (3, 4, 5)]
    params = [torch.nn.Parameter(randn(*s)) for s in shapes]
    optimizer = Adafactor(params)
    for p in params:
        p.grad = randn(*p.shape, seed=1)
    params[0].grad.zero_()  # a dead row would divide by zero
    optimizer.step()
    assert all(p.isfinite().all() for p in params)
    assert optimizer.state[params[2]]["row"].shape == (3, 4, 1) and optimizer.state[params[2]]["col"].shape == (3, 1, 5)


def test_adafactor_refuses_to_turn_its_factored_moments():
    with pytest.raises(ValueError, match="on_refresh='rotate': the factored moments of AdafactorRule cannot be turned"):
        Adafactor([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "rank": 2}], on_refresh="rotate")


@pytest.mark.parametrize(
    ("build", "shown"),
    [
        (lambda p: SGD(p, momentum=1.0), "momentum=1.0"),
        (lambda p: Adafactor(p, beta1=1.0), "beta1=1.0"),
        (lambda p: Adafactor(p, clip_threshold=0.0), "clip_threshold=0.0"),
        (lambda p: COSMOS([{"params": p, "rank": 0}]), "rank=0"),
        (lambda p: COSMOS([{"params": p, "rank": 1}], gamma=-1.0), "gamma=-1.0"),
    ],
)
def test_options_that_make_no_sense_are_refused_with_their_value(build, shown):
    with pytest.raises(ValueError, match="^" + shown):
        build([torch.nn.Parameter(torch.zeros(2, 2))])


COSMOS_OPTIONS = {"lr": 2e-2, "betas": (0.95, 0.9), "eps": 1e-8, "weight_decay": 0.1}


@pytest.mark.parametrize("shape", [(16, 16), (20, 12), (12, 20), (40, 5)], ids=str)
def test_cosmos_matches_the_float64_reference_tall_and_wide(shape):
    p = torch.nn.Parameter(randn(*shape))
    wide = shape[0] < shape[1]
    grads = [randn(*shape, seed=s) for s in range(6)]
    turn = np.transpose if wide else np.asarray
    expected = turn(
        reference.cosmos(
            turn(p.detach().numpy().copy()),
            [turn(g.numpy()) for g in grads],
            rank=3,
            gamma=0.2,
            ratio=0.1,
            **COSMOS_OPTIONS,
        )  # fmt: skip
    )
    optimizer = COSMOS([{"params": [p], "rank": 3}], **COSMOS_OPTIONS)
    run(optimizer, p, grads)
    assert orthonormality_error(optimizer.state[p]["basis"]) <= 1e-12
    np.testing.assert_allclose(p.detach().numpy(), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("shape", [(30, 12), (12, 30)], ids=str)
def test_every_step_of_cosmos_has_the_same_norm(shape):
    p = torch.nn.Parameter(randn(*shape, dtype=torch.float32))
    optimizer = COSMOS([{"params": [p], "rank": 4, "lr_ratio": 0.2}], lr=1e-2)
    for seed in range(4):
        before = p.detach().clone()
        run(optimizer, p, [randn(*shape, seed=seed, dtype=torch.float32) * 10.0**seed])
        assert float((p.detach() - before).norm()) == pytest.approx(2e-3 * (30 * 12) ** 0.5, rel=1e-5)


def test_cosmos_of_full_rank_without_gamma_is_one_sided_soap():
    """A is Adam in the eigenbasis of the gradients' second moments; here by numpy's own eigenvectors at step 1."""
    p = torch.nn.Parameter(torch.zeros(9, 6).double())
    grad = randn(9, 6)
    run(COSMOS([{"params": [p], "rank": 6}], lr=1.0, betas=(0.0, 0.9), eps=1e-15, gamma=0.0), p, [grad])
    vectors = np.linalg.eigh(grad.numpy().T @ grad.numpy())[1]
    inside = grad.numpy() @ vectors
    adam = np.sign(inside) @ vectors.T  # m / sqrt(v) of a first step
    expected = -0.1 * np.sqrt(54) * adam / np.linalg.norm(adam)
    np.testing.assert_allclose(p.detach().numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 8), (8, 20)], ids=str)
def test_newton_schulz_brings_singular_values_near_one(shape):
    values = torch.linalg.svdvals(newton_schulz(randn(*shape), 1e-8))
    assert values.min() > 0.6 and values.max() < 1.3


def test_a_non_finite_gradient_leaves_cosmos_untouched():
    p = torch.nn.Parameter(randn(8, 6))
    optimizer = COSMOS([{"params": [("w", p)], "rank": 2}])
    run(optimizer, p, [randn(8, 6)])
    held = {k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in optimizer.state[p].items()}
    weight, bad = p.detach().clone(), randn(8, 6)
    bad[2, 2] = float("nan")
    run(optimizer, p, [bad])
    assert optimizer.skipped == 1 and torch.equal(p, weight)
    assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(held[k])) for k, v in optimizer.state[p].items())
