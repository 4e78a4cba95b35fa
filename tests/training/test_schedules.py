"""Schedules against torch's and transformers' formulas, at every step of trainings of many lengths."""

from __future__ import annotations

import warnings

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftarray import training
from peftarray.errors import ConfigError

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BEYOND = 5


def factors(make, steps):
    """What torch multiplies the rate by, step after step."""
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that no step of the optimiser goes before the schedule's
        schedule = make(optimizer)
        found = []
        for _ in range(steps):
            found.append(optimizer.param_groups[0]["lr"])
            schedule.step()
    return found


@given(total=st.integers(1, 60), share=st.floats(0, 1), cycles=st.integers(1, 4), power=st.floats(0.5, 3))
def test_factors_are_those_of_transformers(total, share, cycles, power):
    warmup = int(share * (total - 1))
    same = {"num_warmup_steps": warmup, "num_training_steps": total}
    mine = {"warmup": warmup, "total": total}
    pairs = [
        (training.constant(warmup=warmup), lambda o: transformers.get_constant_schedule_with_warmup(o, warmup)),
        (training.linear(**mine), lambda o: transformers.get_linear_schedule_with_warmup(o, **same)),
        (training.cosine(**mine), lambda o: transformers.get_cosine_schedule_with_warmup(o, **same)),
        (
            training.cosine(**mine, cycles=cycles / 2),
            lambda o: transformers.get_cosine_schedule_with_warmup(o, **same, num_cycles=cycles / 2),
        ),
        (
            training.cosine_with_restarts(**mine, cycles=cycles),
            lambda o: transformers.get_cosine_with_hard_restarts_schedule_with_warmup(o, **same, num_cycles=cycles),
        ),
        (
            training.polynomial(**mine, power=power, floor=0.01),
            lambda o: transformers.get_polynomial_decay_schedule_with_warmup(o, **same, lr_end=0.01, power=power),
        ),
        (training.inverse_sqrt(warmup=warmup), lambda o: transformers.get_inverse_sqrt_schedule(o, warmup)),
        (
            training.inverse_sqrt(warmup=warmup, timescale=7),
            lambda o: transformers.get_inverse_sqrt_schedule(o, warmup, timescale=7),
        ),
    ]
    for schedule, make in pairs:
        expected = factors(make, total + BEYOND)
        found = [schedule(step) for step in range(total + BEYOND)]
        assert found == pytest.approx(expected, rel=1e-12, abs=1e-12), schedule.name


@given(total=st.integers(4, 60), share=st.floats(0.3, 0.9), anneal=st.sampled_from(["cosine", "linear"]))
def test_one_cycle_is_that_of_torch(total, share, anneal):
    schedule = training.one_cycle(warmup=share, total=total, start=0.1, end=0.002, anneal=anneal)
    expected = factors(
        lambda o: torch.optim.lr_scheduler.OneCycleLR(
            o,
            1.0,
            total_steps=total,
            pct_start=share,
            anneal_strategy=anneal.replace("cosine", "cos"),
            div_factor=10,
            final_div_factor=50,
            cycle_momentum=False,
        ),
        total,
    )
    assert [schedule(step) for step in range(total)] == pytest.approx(expected, rel=1e-9, abs=1e-12)
    assert schedule(total + 10) == pytest.approx(0.002)


def test_one_cycle_may_be_a_step_long_or_never_fall():
    assert training.one_cycle(warmup=1, total=1)(0) == 1
    assert training.one_cycle(warmup=4, total=4)(3) == 1


def test_a_cosine_falls_to_its_floor():
    schedule = training.cosine(total=10, floor=0.25)
    assert schedule(0) == 1
    assert schedule(10) == pytest.approx(0.25)


def test_a_warmup_may_be_a_share():
    schedule = training.linear(warmup=0.25, total=8)
    assert [schedule(step) for step in (0, 1, 2, 8)] == [0, 0.5, 1, 0]


def test_the_loop_may_give_the_total():
    assert training.linear().over(4)(1) == 0.75
    assert training.linear(total=2).over(4)(1) == 0.5
    assert training.linear().over(None).total is None


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: training.linear()(0), "linear depends on the number of steps, and total is None; give total"),
        (lambda: training.constant(warmup=0.1)(0), "give total"),
        (lambda: training.cosine(warmup=-1), "Schedule.warmup is -1; it must be a whole number of steps, or a share"),
        (lambda: training.cosine(warmup=1.5), "Schedule.warmup is 1.5"),
        (lambda: training.cosine(warmup=20, total=10), "warmup is 20; of 10 steps"),
        (lambda: training.cosine(total=0), "Schedule.total is 0"),
        (lambda: training.cosine(cycles=-1.0), "cycles of a schedule is -1.0"),
        (lambda: training.cosine_with_restarts(cycles=0), "cycles of a schedule is 0"),
        (lambda: training.polynomial(power=-1.0), "power of a schedule is -1.0"),
        (lambda: training.inverse_sqrt(timescale=0), "timescale of a schedule is 0"),
        (lambda: training.one_cycle(anneal="sine"), "it must be one of 'cosine', 'linear'"),
    ],
)
def test_bad_arguments_are_refused(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    assert words in str(caught.value)
