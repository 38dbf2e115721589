import pytest
import torch

from optim import projection
from optim.projection import add_back_, basis_shape, find_basis, low_shape, orthonormality_error, project, side_of

SHAPES = [(48, 48), (33, 70), (70, 33), (64, 7)]
SIDES = ["left", "right"]
METHODS = list(projection.METHODS)


def decaying(shape, power=0.7, seed=0, dtype=torch.float32):
    """A matrix whose singular values fall as i^-power, like a gradient's."""
    generator = torch.Generator().manual_seed(seed)
    u, s, vh = torch.linalg.svd(torch.randn(shape, generator=generator, dtype=torch.float64), full_matrices=False)
    s = torch.arange(1, len(s) + 1, dtype=torch.float64) ** -power
    return ((u * s) @ vh).to(dtype)


def basis_of(grad, rank, side, method, **kwargs):
    return find_basis(grad, rank, side, method, grad.dtype, fix_signs=True, **kwargs)


@pytest.mark.parametrize(
    ("shape", "sides"),
    [
        ((8, 8), ("right", "left", "left", "right")),
        ((9, 8), ("right", "left", "left", "right")),
        ((8, 9), ("left", "right", "left", "right")),
    ],
    ids=str,
)
def test_side_follows_the_authors_rule_and_square_goes_right(shape, sides):
    assert tuple(side_of(shape, name) for name in ("std", "reverse_std", "left", "right")) == sides


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_basis_is_orthonormal_and_captures_what_the_svd_does(shape, side, method):
    grad = decaying(shape)
    for rank in (1, 5, min(shape)):
        basis = basis_of(grad, rank, side, method)
        assert basis.shape == basis_shape(shape, rank, side)
        assert orthonormality_error(basis) <= 1e-5
        low = project(grad, basis, side)
        assert low.shape == low_shape(shape, rank, side)
        best = torch.linalg.svdvals(grad.double())[:rank].square().sum()
        assert low.double().square().sum() >= 0.9999 * best


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gram_and_svd_find_the_same_basis_in_fp64(shape, side):
    grad = decaying(shape, dtype=torch.float64)
    torch.testing.assert_close(basis_of(grad, 5, side, "gram"), basis_of(grad, 5, side, "svd"), rtol=0, atol=1e-9)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("rank_of_grad", [1, 3])
def test_rank_deficient_gradients_give_a_full_orthonormal_basis_that_loses_nothing(rank_of_grad, side, method):
    generator = torch.Generator().manual_seed(3)
    grad = torch.randn(40, rank_of_grad, generator=generator) @ torch.randn(rank_of_grad, 24, generator=generator)
    basis = basis_of(grad, 8, side, method)
    assert orthonormality_error(basis) <= 1e-5
    back = torch.zeros_like(grad)
    add_back_(back, project(grad, basis, side), basis, side, beta=0.0, alpha=1.0)
    torch.testing.assert_close(back, grad, rtol=0, atol=1e-5 * float(grad.abs().max()))


@pytest.mark.parametrize("side", SIDES)
def test_projecting_twice_is_projecting_once_and_more_rank_captures_more(side):
    grad = decaying((30, 50))
    captured = []
    for rank in (2, 8, 20):
        basis = basis_of(grad, rank, side, "gram")
        once, twice = torch.zeros_like(grad), torch.zeros_like(grad)
        add_back_(once, project(grad, basis, side), basis, side, beta=0.0, alpha=1.0)
        add_back_(twice, project(once, basis, side), basis, side, beta=0.0, alpha=1.0)
        torch.testing.assert_close(twice, once, rtol=0, atol=1e-6)
        captured.append(float(once.norm()))
    assert captured == sorted(captured)


@pytest.mark.parametrize("method", METHODS)
def test_signs_do_not_depend_on_the_solver(method, monkeypatch):
    grad = decaying((20, 30))
    expected = basis_of(grad, 4, "left", method)
    solver = projection.METHODS[method]
    flips = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]])
    monkeypatch.setitem(projection.METHODS, method, lambda *args: solver(*args) * flips)
    assert torch.equal(basis_of(grad, 4, "left", method), expected)


def test_a_solver_that_fails_in_fp32_is_called_again_in_fp64(monkeypatch):
    grad = decaying((20, 30))
    expected = basis_of(grad, 4, "left", "gram")
    solver, called = projection.METHODS["gram"], []

    def fails_in_fp32(matrix, *more):
        called.append(matrix.dtype)
        if matrix.dtype is torch.float32:
            raise torch.linalg.LinAlgError("did not converge")
        return solver(matrix, *more)

    monkeypatch.setitem(projection.METHODS, "gram", fails_in_fp32)
    torch.testing.assert_close(basis_of(grad, 4, "left", "gram"), expected, rtol=0, atol=1e-5)
    assert called == [torch.float32, torch.float64]


@pytest.mark.parametrize("side", SIDES)
def test_bf16_matrices_are_projected_in_fp32_by_chunks(side, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 7 * 30)  # 20 rows in chunks of 7
    grad, weight = decaying((20, 30)).bfloat16(), decaying((20, 30), seed=1).bfloat16()
    basis = basis_of(grad.float(), 4, side, "gram")
    low = project(grad, basis, side)
    torch.testing.assert_close(low, project(grad.float(), basis, side), rtol=1e-5, atol=1e-6)
    wide = weight.float()
    add_back_(wide, low, basis, side, beta=0.9, alpha=0.5)
    add_back_(weight, low, basis, side, beta=0.9, alpha=0.5)
    torch.testing.assert_close(weight, wide.bfloat16(), rtol=0, atol=0)


def test_the_projected_update_of_fp32_weights_allocates_nothing_of_their_size():
    weight, low, basis = torch.zeros(256, 256), torch.ones(256, 4), torch.ones(4, 256)
    with torch.profiler.profile(profile_memory=True, activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        add_back_(weight, low, basis, "right", beta=0.9, alpha=1.0)
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.events()) == 0
