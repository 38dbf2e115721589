import pytest
from hypothesis import given
from hypothesis import strategies as st

from optim.config import ScheduleConfig, ScheduleName
from optim.schedule import multiplier

FALLING = [ScheduleName.linear, ScheduleName.cosine, ScheduleName.wsd]


def curve(steps, **options):
    cfg = ScheduleConfig(**options)
    # one draw serves every schedule, those too that have no use for a floor or a decay and refuse the option
    assert [problem for problem in cfg.problems() if "has no effect" not in problem] == []
    return [multiplier(cfg, step, steps) for step in range(steps)]


def test_linear_by_hand():
    assert curve(6, name=ScheduleName.linear, warmup=2, floor=0.2) == pytest.approx([0.5, 1.0, 0.8, 0.6, 0.4, 0.2])


def test_cosine_by_hand():
    expected = [1.0, 0.5 + 0.5 * 2**-0.5, 0.5, 0.5 - 0.5 * 2**-0.5, 0.0]
    assert curve(5, name=ScheduleName.cosine, warmup=0, floor=0.0) == pytest.approx(expected, abs=1e-15)


def test_wsd_by_hand():
    expected = [0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 0.75, 0.5, 0.25, 0.0]
    assert curve(10, name=ScheduleName.wsd, warmup=2, floor=0.0, decay=0.4) == pytest.approx(expected)


def test_constant_stays_at_the_peak_after_warmup():
    assert curve(5, name=ScheduleName.constant, warmup=2, floor=0.1) == [0.5, 1.0, 1.0, 1.0, 1.0]


def test_warmup_is_a_fraction_below_one_and_a_number_of_steps_from_one_on():
    assert curve(20, warmup=0.1) == curve(20, warmup=2)
    assert curve(20, warmup=1)[0] == 1.0


@given(
    name=st.sampled_from(list(ScheduleName)),
    steps=st.integers(1, 300),
    warmup=st.one_of(st.floats(0, 0.999), st.integers(1, 400)),
    floor=st.floats(0, 1),
    decay=st.one_of(st.floats(0.001, 0.999), st.integers(1, 400)),
)
def test_every_schedule_rises_from_above_zero_to_one_and_never_rises_again(name, steps, warmup, floor, decay):
    factors = curve(steps, name=name, warmup=warmup, floor=floor, decay=decay)
    assert all(0 <= f <= 1 for f in factors)
    assert factors[0] > 0
    length = round(warmup * steps) if warmup < 1 else int(warmup)
    rising, falling = factors[:length], factors[max(length - 1, 0) :]
    assert all(a < b for a, b in zip(rising, rising[1:], strict=False))
    assert all(a >= b - 1e-12 for a, b in zip(falling, falling[1:], strict=False))
    if falling:
        assert falling[0] == 1.0
    if name in FALLING and len(falling) > 1:
        assert falling[-1] == pytest.approx(floor, abs=1e-15)
    cfg = ScheduleConfig(name=name, warmup=warmup, floor=floor, decay=decay)
    assert multiplier(cfg, steps + 50, steps) == factors[-1]


@pytest.mark.parametrize("name", FALLING)
def test_the_last_step_takes_exactly_the_floor(name):
    for floor in (0.0, 0.1, 0.3):
        assert curve(137, name=name, floor=floor)[-1] == floor


@pytest.mark.parametrize(
    ("option", "value"),
    [("warmup", -0.1), ("warmup", 2.5), ("warmup", float("inf")), ("floor", 1.5), ("decay", 0.0), ("decay", 1.5)],
)
def test_options_that_make_no_sense_are_named_with_their_value(option, value):
    (problem,) = ScheduleConfig(**{option: value}).problems()
    assert problem.startswith(f"schedule.{option}={value}:")


@pytest.mark.parametrize("options", [{"decay": 0.5}, {"name": ScheduleName.constant, "floor": 0.5}])
def test_an_option_a_schedule_has_no_use_for_is_refused(options):
    assert "has no effect" in "".join(ScheduleConfig(**options).problems())
    assert ScheduleConfig(name=ScheduleName.wsd, decay=0.5, floor=0.5).problems() == []
