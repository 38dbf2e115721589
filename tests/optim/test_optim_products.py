import pytest
import torch

from optim import APOLLO, Fira, GaLoreAdamW
from optim.config import ApolloConfig, CosmosConfig, GaLoreConfig, Products
from optim.config_lowrank import Compat
from optim.products import add_product_, product
from optim.projection import add_back_, project
from trainer.cli.compose import load
from trainer.precision import settled

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def rounded(x):
    return x.bfloat16().double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_product_is_that_of_rounded_operands_summed_without_rounding(dtype):
    a, b, c = randn(30, 50, dtype=dtype), randn(50, 21, seed=1, dtype=dtype), randn(30, 21, seed=2, dtype=dtype)
    exact, tolerance = rounded(a) @ rounded(b), 1e-6 if dtype is torch.float32 else 1e-14
    found = product(a, b, dtype)
    assert found.dtype is dtype
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=tolerance * float(exact.abs().max()))
    expected = 0.9 * c.double() + 0.5 * exact
    add_product_(c, a, b, beta=0.9, alpha=0.5)
    torch.testing.assert_close(c.double(), expected, rtol=0, atol=tolerance * float(exact.abs().max()))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_projection_and_way_back_round_their_operands_alone(side, dtype, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 7 * 30)
    grad, weight = randn(20, 30).to(dtype), randn(20, 30, seed=1).to(dtype)
    basis = torch.linalg.qr(randn(20 if side == "left" else 30, 4, seed=2)).Q.T
    low = project(grad, basis, side, "bf16")
    turned = rounded(basis)
    exact = turned @ rounded(grad) if side == "left" else rounded(grad) @ turned.T
    torch.testing.assert_close(low.double(), exact, rtol=1e-5, atol=1e-5)
    back = turned.T @ rounded(low) if side == "left" else rounded(low) @ turned
    expected = (0.9 * weight.double() + 0.5 * back).to(dtype)
    add_back_(weight, low, basis, side, beta=0.9, alpha=0.5, products="bf16")
    torch.testing.assert_close(weight, expected, rtol=1e-5 if dtype is torch.float32 else 2**-7, atol=1e-5)


@pytest.mark.parametrize("kind", [GaLoreAdamW, Fira, APOLLO])
def test_steps_differ_from_those_in_fp32_by_the_rounding_alone(kind):
    """By less than a hundredth of the way after 20 steps through refreshes, and by something."""
    weights = []
    for products in ("fp32", "bf16"):
        p = torch.nn.Parameter(randn(48, 32))
        optimizer = kind([{"params": [("w", p)], "rank": 8, "update_proj_gap": 7}], lr=1e-2, products=products)
        for step in range(20):
            p.grad = randn(48, 8, seed=90) @ randn(8, 32, seed=91) + 0.3 * randn(48, 32, seed=step)
            optimizer.step()
        weights.append(p.detach().clone())
    exact, found = weights
    assert 0 < float((exact - found).norm()) < 1e-2 * float((exact - randn(48, 32)).norm())


def test_unknown_products_are_refused():
    with pytest.raises(ValueError, match="products='fp8': must be one of fp32, bf16"):
        GaLoreAdamW([{"params": [torch.nn.Parameter(torch.zeros(4, 4))], "rank": 2}], products="fp8")


def test_the_authors_packages_have_none_but_their_own():
    for cfg in (GaLoreConfig, ApolloConfig):
        problems = cfg(compat=Compat.authors, products=Products.bf16).problems()
        assert any("products=fp32; add optim.products=fp32" in text for text in problems)


@pytest.mark.parametrize(
    ("overrides", "device", "expected"),
    [
        ((), CUDA, "fp32"),
        (("precision=bf16",), CPU, "fp32"),
        (("precision=bf16",), CUDA, "bf16"),
        (("precision=fp8",), CUDA, "bf16"),
        (("precision=bf16", "optim.products=fp32"), CUDA, "fp32"),
        (("optim.products=bf16",), CPU, "bf16"),
        (("precision=bf16", "optim.compat=authors", "optim.refresh=svd"), CUDA, "fp32"),
    ],
    ids=str,
)
def test_what_is_left_open_follows_from_precision_and_device(overrides, device, expected):
    cfg = load(["optim=galore", *overrides])
    assert settled(cfg, device).target_options()["products"] == expected


def test_an_optimizer_without_a_basis_has_no_such_option():
    assert "products" not in CosmosConfig(rank=4).target_options()
