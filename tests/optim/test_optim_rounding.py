import pytest
import torch

from optim import AdamW, GaLoreAdamW
from optim.rounding import Stochastic, keyed_bits, keyed_normal, round_to_bf16_, seed_of

LSB = 2.0**-7
"""Of bf16 between 1 and 2."""


def rounded(wide, seed=0):
    target = torch.empty(wide.shape, dtype=torch.bfloat16)
    round_to_bf16_(target, wide, keyed_bits(seed_of("w", seed), wide.shape, wide.device))
    return target.float()


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_the_mean_of_many_draws_is_the_number_within_four_sigma(share):
    draws = 20000
    x = torch.full((draws,), 1.0 + share * LSB)
    found = rounded(x)
    assert set(found.tolist()) == {1.0, 1.0 + LSB}
    sigma = LSB * (share * (1 - share) / draws) ** 0.5
    assert abs(float(found.double().mean()) - (1.0 + share * LSB)) <= 4 * sigma


@pytest.mark.parametrize("value", [0.0, -0.0, 1.0, -3.0, float("inf"), float("-inf"), 2.0**-130])
def test_what_bf16_holds_stays_as_it_is(value):
    x = torch.full((1000,), value)
    assert torch.equal(rounded(x), x)


def test_negative_numbers_round_evenly_too_and_nan_stays():
    x = torch.full((20000,), -(1.0 + 0.3 * LSB))
    assert abs(float(rounded(x).double().mean()) + 1.0 + 0.3 * LSB) <= 4 * LSB * (0.21 / 20000) ** 0.5
    assert rounded(torch.tensor([float("nan")])).isnan().all()


def test_a_hundred_updates_of_a_twentieth_of_a_digit_move_the_weight():
    weight = torch.ones(50000, dtype=torch.bfloat16)
    nearest = weight.clone()
    for step in range(100):
        Stochastic("w", step, weight)(weight, weight.float() + 0.05 * LSB)
        nearest.copy_(nearest.float() + 0.05 * LSB)
    moved = float((weight.double() - 1).mean()) / (5 * LSB)
    assert 0.99 <= moved <= 1.01
    assert (nearest == 1).all()


def test_draws_depend_on_name_and_step_alone():
    x = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)

    def draw(name, step):
        target = torch.empty(1000, dtype=torch.bfloat16)
        Stochastic(name, step, target)(target, x)
        return target

    first = draw("a", 3)
    torch.manual_seed(2)
    assert torch.equal(first, draw("a", 3))
    assert not torch.equal(first, draw("a", 4)) and not torch.equal(first, draw("b", 3))
    assert seed_of("w", 1, 2) == 5644937176967058213  # the same in every process, on every machine
    assert seed_of("w", 12) != seed_of("w1", 2)


def test_a_value_has_its_draw_whatever_piece_of_its_parameter_is_rounded():
    x = torch.randn(30, 8, generator=torch.Generator().manual_seed(0))
    whole, pieces = (torch.empty(30, 8, dtype=torch.bfloat16) for _ in range(2))
    Stochastic("w", 3, whole)(whole, x)
    for begin, end in ((0, 7), (7, 8), (8, 30)):
        Stochastic("w", 3, pieces)(pieces[begin:end], x[begin:end])
    shards = [x[:11].bfloat16(), x[11:11].bfloat16(), x[11:].bfloat16()]
    for row, shard in zip((0, 11, 11), shards, strict=True):
        Stochastic("w", 3, shard, row=row)(shard, x[row : row + len(shard)])
    assert torch.equal(whole, pieces) and torch.equal(whole, torch.cat(shards))


def test_draws_are_even_in_every_bit_and_without_relation_between_neighbours_and_steps():
    count, cpu = 1 << 18, torch.device("cpu")
    steps = [keyed_bits(seed_of("w", step), (count,), cpu) for step in range(8)]
    for bits in steps:
        shares = torch.stack([((bits >> place) & 1).double().mean() for place in range(32)])
        assert float((shares - 0.5).abs().max()) < 5 * 0.5 / count**0.5
    level = [(bits.double() / 2**31) for bits in steps]  # uniform in [-1, 1), variance 1/3
    for one, other in [(level[0], level[1]), *((level[0], level[0].roll(lag)) for lag in (1, 2, 256, 4096))]:
        assert abs(float((one * other).mean()) * 3) < 5 / count**0.5
    assert keyed_bits(seed_of("w", 3), (2,), cpu, 2**31).tolist() == [642659290, -297109921]  # on every machine


def test_normal_numbers_of_a_name_have_variance_one_and_the_dtype_asked_for():
    found = keyed_normal((200, 300), torch.empty(0, dtype=torch.float64), "w", 0)
    assert found.dtype is torch.float64 and abs(float(found.var()) - 1) < 0.02
    assert torch.equal(found, keyed_normal((200, 300), torch.empty(0, dtype=torch.float64), "w", 0))
    assert not torch.equal(found, keyed_normal((200, 300), torch.empty(0, dtype=torch.float64), "w", 1))


def test_normal_numbers_have_the_moments_of_a_normal_and_no_relation_to_each_other():
    count = 2**19
    found = keyed_normal((1, 2 * count - 1), torch.empty(0), "w", 3).double()[0]
    size = len(found) ** 0.5
    for power, (mean, variance) in {1: (0, 1), 2: (1, 2), 3: (0, 15), 4: (3, 96), 6: (15, 10170)}.items():
        assert abs(float((found**power).mean()) - mean) < 5 * variance**0.5 / size, power
    assert found.isfinite().all() and 4.5 < float(found.abs().max()) < 6
    for lag in (1, 2, 256, count - 1, count):  # `count` apart are the two of a pair
        for power in (1, 2):
            values = found**power - float((found**power).mean())
            assert abs(float((values * values.roll(lag)).mean())) < 5 * (1 if power == 1 else 2) / size, (lag, power)


@pytest.mark.parametrize("build", [AdamW, lambda p, **k: GaLoreAdamW([{"params": p, "rank": 4}], **k)])
def test_bf16_weights_follow_fp32_ones_on_average_where_nearest_rounding_stands_still(build):
    """One step far below a digit, on many weights: their mean moves as the fp32 step says."""
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(8192, 8, generator=generator)  # one sigma of their mean is 2% of the motion
    moved = {}
    for kind in ("fp32", "nearest", "stochastic"):
        dtype = torch.float32 if kind == "fp32" else torch.bfloat16
        p = torch.nn.Parameter(torch.ones(8192, 8, dtype=dtype))
        options = {"rounding": kind} if kind != "fp32" else {}
        optimizer = build([("w", p)], lr=1e-4, weight_decay=0.0, **options)
        for _ in range(30):
            p.grad = grad.to(dtype)
            optimizer.step()
        moved[kind] = float(((p.detach().double() - 1) * -grad.sign()).mean())
    assert moved["fp32"] > 0 and abs(moved["nearest"]) < 0.1 * moved["fp32"]
    assert moved["stochastic"] == pytest.approx(moved["fp32"], rel=0.1)


def test_stochastic_rounding_is_the_same_one_parameter_at_a_time():
    """As in a backward hook."""
    shapes = [(40, 30), (7,), ()]
    grads = [torch.randn(s, generator=torch.Generator().manual_seed(i)) for i, s in enumerate(shapes)]
    runs = []
    for together in (True, False):
        params = [torch.nn.Parameter(torch.ones(s, dtype=torch.bfloat16)) for s in shapes]
        optimizer = AdamW([(str(i), p) for i, p in enumerate(params)], lr=1e-3, rounding="stochastic")
        for _ in range(3):
            if together:
                for p, grad in zip(params, grads, strict=True):
                    p.grad = grad.bfloat16()
                optimizer.step()
                continue
            for p, grad in zip(params, grads, strict=True):
                p.grad = grad.bfloat16()
                optimizer.step()
                p.grad = None
        runs.append(params)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_unknown_rounding_is_refused():
    with pytest.raises(ValueError, match="rounding='up': must be one of nearest, stochastic"):
        AdamW([torch.nn.Parameter(torch.zeros(2))], rounding="up")
