import numpy as np
import pytest
import torch

from optim import AdamW
from tests.reference import optimizers as reference

SHAPES = [(), (7,), (16, 8), (3, 4, 5)]
OPTIONS = {"lr": 3e-3, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def make(shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in shapes]


def gradients(shapes, steps, dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return [[torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes] for _ in range(steps)]


def run(optimizer, params, grads):
    for step in grads:
        for p, grad in zip(params, step, strict=True):
            p.grad = grad.clone()
        optimizer.step()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_adamw_is_torch_adamw_bit_for_bit(dtype):
    grads = gradients(SHAPES, 12, dtype)
    ours, theirs = make(SHAPES, dtype), make(SHAPES, dtype)
    run(AdamW(ours, **OPTIONS), ours, grads)
    run(torch.optim.AdamW(theirs, fused=True, **OPTIONS), theirs, grads)
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b)


def test_adamw_matches_the_float64_reference():
    grads = gradients(SHAPES, 12, torch.float64)
    params = make(SHAPES, torch.float64)
    start = [p.detach().numpy().copy() for p in params]
    run(AdamW(params, **OPTIONS), params, grads)
    for i, p in enumerate(params):
        expected = reference.adamw(start[i], [g[i].numpy() for g in grads], **OPTIONS)
        np.testing.assert_allclose(p.detach().numpy(), expected, rtol=1e-12, atol=1e-14)


def test_bf16_weights_take_the_fp32_step_rounded_once(monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 40)  # 10 rows of 8 in chunks of 5
    shapes = [(10, 8), (3,)]
    params, wide = make(shapes, torch.bfloat16), make(shapes, torch.bfloat16)
    wide = [torch.nn.Parameter(p.detach().float()) for p in wide]
    ours, theirs = AdamW(params, **OPTIONS), torch.optim.AdamW(wide, fused=True, **OPTIONS)
    for grads in gradients(shapes, 5, torch.bfloat16):
        run(ours, params, [grads])
        run(theirs, wide, [[g.float() for g in grads]])
        for p, w in zip(params, wide, strict=True):
            assert torch.equal(p, w.bfloat16())
            w.data.copy_(p.data)  # ours goes on from the rounded weight
            assert ours.state[p]["exp_avg_sq"].dtype is torch.float32


def test_a_gradient_in_another_memory_layout_reaches_the_right_elements():
    """torch's fused kernel walks raw memory and would not."""
    straight, turned = make([(5, 3)]), make([(5, 3)])
    grads = gradients([(5, 3)], 3)
    run(AdamW(straight, **OPTIONS), straight, grads)
    run(AdamW(turned, **OPTIONS), turned, [[g.T.contiguous().T for g in step] for step in grads])
    assert torch.equal(straight[0], turned[0])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_transposed_weights_step_like_contiguous_ones(dtype, monkeypatch):
    monkeypatch.setattr("optim.base.CHUNK", 8)
    straight = make([(6, 4)], dtype)
    turned = [torch.nn.Parameter(straight[0].detach().clone().T.contiguous().T)]
    grads = gradients([(6, 4)], 3, dtype)
    run(AdamW(straight, **OPTIONS), straight, grads)
    run(AdamW(turned, **OPTIONS), turned, grads)
    assert torch.equal(straight[0], turned[0])


def test_stepping_one_parameter_at_a_time_is_the_same():
    together, apart = make(SHAPES), make(SHAPES)
    first, second = AdamW(together, **OPTIONS), AdamW(apart, **OPTIONS)
    for grads in gradients(SHAPES, 3):
        run(first, together, [grads])
        for p, grad in zip(apart, grads, strict=True):
            p.grad = grad.clone()
            second.step()
            p.grad = None
    for a, b in zip(together, apart, strict=True):
        assert torch.equal(a, b)


def test_closure_runs_with_gradients_enabled_and_its_loss_is_returned():
    p = torch.nn.Parameter(torch.ones(3))
    optimizer = AdamW([p])

    def closure():
        optimizer.zero_grad()
        loss = (p**2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 3.0
    assert p.sum().item() < 3.0


def test_sparse_gradients_are_refused_by_name():
    embedding = torch.nn.Embedding(5, 2, sparse=True)
    optimizer = AdamW(embedding.named_parameters())
    embedding(torch.tensor([1])).sum().backward()
    with pytest.raises(ValueError, match=r"dense gradients.*weight.*sparse_coo.*sparse=False"):
        optimizer.step()


def test_gradients_are_left_as_they_were():
    params = make(SHAPES)
    grads = gradients(SHAPES, 1)[0]
    run(AdamW(params, **OPTIONS), params, [grads])
    for p, grad in zip(params, grads, strict=True):
        assert torch.equal(p.grad, grad)


def test_a_parameter_unfrozen_later_is_stepped():
    p = torch.nn.Parameter(torch.ones(3), requires_grad=False)
    optimizer = AdamW([p, torch.nn.Parameter(torch.ones(2))])
    assert p not in optimizer.state
    p.requires_grad_(True)
    p.grad = torch.ones(3)
    optimizer.step()
    assert optimizer.state[p]["step"] == 1


@pytest.mark.parametrize(
    ("option", "value"), [("lr", -1.0), ("betas", (0.9, 1.0)), ("eps", -1e-8), ("weight_decay", float("nan"))]
)
def test_options_that_make_no_sense_are_refused_with_their_value(option, value):
    with pytest.raises(ValueError, match=option):
        AdamW(make([(2, 2)]), **{option: value})
