from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_fast.training.statistics import (
    Interval,
    format_interval,
    mean_interval,
    paired_difference,
    pooled_difference,
    seeds_interval,
)


def test_mean_interval_in_closed_form() -> None:
    # 1, 2, 3, 4: mean 2.5, sample variance 5/3.
    mean, half = mean_interval([1, 2, 3, 4])
    assert mean == 2.5
    assert half == pytest.approx(1.96 * math.sqrt(5 / 3) / 2, rel=1e-15)


@pytest.mark.parametrize(
    "values", [torch.tensor([0.2, 0.4, 0.9]), np.array([0.2, 0.4, 0.9]), (0.2, 0.4, 0.9)]
)
def test_any_kind_of_vector_serves(values: object) -> None:
    mean, half = mean_interval(values)
    # float32 input: the mean keeps that rounding, not more.
    assert mean == pytest.approx(0.5, abs=1e-7)
    assert isinstance(mean, float)
    assert isinstance(half, float)


def test_the_interval_agrees_with_the_bootstrap() -> None:
    rng = np.random.default_rng(5)
    x = rng.beta(6, 3, size=600)
    means = x[rng.integers(0, 600, size=(4000, 600))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    interval = mean_interval(x)
    # With 4000 draws a quantile has a standard error of about 2.7 % of the half-width; five of them.
    assert abs(interval.low - low) < 0.135 * interval.half
    assert abs(interval.high - high) < 0.135 * interval.half


def test_the_interval_covers_as_often_as_it_says() -> None:
    rng = np.random.default_rng(6)
    n_trials = 4000
    hits = sum(
        interval.low <= 0.7 <= interval.high
        for interval in (mean_interval(rng.normal(0.7, 0.1, size=600)) for _ in range(n_trials))
    )
    # Binomial: 0.95 ± 5 standard errors.
    assert abs(hits / n_trials - 0.95) < 5 * math.sqrt(0.95 * 0.05 / n_trials)


def test_pairing_cancels_what_the_tasks_share() -> None:
    rng = np.random.default_rng(7)
    task = rng.normal(0.6, 0.2, size=600)
    a, b = task + 0.03 + rng.normal(0, 0.01, 600), task + rng.normal(0, 0.01, 600)
    paired = paired_difference(a, b)
    assert paired.excludes_zero
    assert abs(paired.mean - 0.03) < paired.half * 2.5
    unpaired = math.hypot(mean_interval(a).half, mean_interval(b).half)
    assert paired.half < unpaired / 10
    flipped = paired_difference(b, a)
    assert flipped.mean == -paired.mean
    assert flipped.half == pytest.approx(paired.half, rel=1e-12)


def test_seeds_are_pooled_by_concatenation() -> None:
    a, b = [[1.0, 2.0], [4.0, 6.0]], [[0.0, 0.0], [1.0, 1.0]]
    found = pooled_difference(a, b)
    assert found.pooled == mean_interval([1.0, 2.0, 3.0, 5.0])
    assert [interval.mean for interval in found.per_seed] == [1.5, 4.0]
    assert found.spread == pytest.approx(2.5 / math.sqrt(2), rel=1e-15)
    # Tasks that the seeds share: averaged over seeds first.
    assert pooled_difference(a, b, same_tasks=True).pooled == mean_interval([2.0, 3.5])


def test_identical_seeds_on_the_same_tasks_give_no_narrower_interval() -> None:
    x = np.random.default_rng(1).normal(size=100)
    once = paired_difference(x, 0 * x)
    thrice = pooled_difference([x] * 3, [0 * x] * 3, same_tasks=True)
    assert thrice.pooled.half == pytest.approx(once.half, rel=1e-12)
    assert pooled_difference([x] * 3, [0 * x] * 3).pooled.half < 0.6 * once.half
    assert thrice.spread == 0


def test_one_task_and_one_seed_claim_nothing() -> None:
    single = mean_interval([0.9])
    assert single == Interval(0.9, math.inf)
    assert not single.excludes_zero
    found = pooled_difference([[0.9, 0.7]], [[0.1, 0.2]])
    assert math.isnan(found.spread)
    assert found.percent() == "+65.0 ± 29.4 (excludes 0; one seed)"
    assert not mean_interval([math.nan, 1.0]).excludes_zero


@pytest.mark.parametrize(
    ("mean", "half", "text", "signed"),
    [(0.7391, 0.0081, "73.9 ± 0.8", "+73.9 ± 0.8"), (-0.0123, 0.02, "-1.2 ± 2.0", "-1.2 ± 2.0")],
)
def test_percent(mean: float, half: float, text: str, signed: str) -> None:
    assert str(Interval(mean, half)) == format_interval(mean, half) == text
    assert Interval(mean, half).percent(signed=True) == signed


def test_a_line_for_several_seeds() -> None:
    found = pooled_difference([[0.5, 0.6], [0.6, 0.7], [0.4, 0.2]], [[0.4, 0.5], [0.5, 0.5], [0.4, 0.4]])
    text = found.percent()
    assert text.startswith("+5.0 ± ")
    assert "includes 0; seeds +10.0, +15.0, -10.0, their standard deviation 13.2" in text


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: mean_interval([]), r"values must be a non-empty vector \[n\], it is \[0\]"),
        (lambda: mean_interval([[1.0]]), r"it is \[1, 1\]"),
        (lambda: paired_difference([1.0, 2.0], [1.0]), "a has 2, b has 1"),
        (lambda: pooled_difference([], []), "at least one: a has 0, b has 0"),
        (lambda: pooled_difference([[1.0]], [[1.0], [2.0]]), "a has 1, b has 2"),
        (lambda: pooled_difference([[1.0], [1, 2]], [[1.0], [2, 1]], same_tasks=True), r"here \[1, 2\]"),
    ],
)
def test_wrong_input_is_named(call: object, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        call()  # type: ignore[operator]


def test_an_interval_over_few_seeds_is_that_of_students_t() -> None:
    # s/√n is 1/√3; t at 97.5 % with two degrees of freedom is 4.303.
    assert seeds_interval([1.0, 2.0, 3.0]) == pytest.approx((2, 4.303 / 3**0.5))
    assert seeds_interval([1.0]) == (1, math.inf)
    many = [float(i % 2) for i in range(40)]
    assert seeds_interval(many).half == pytest.approx(mean_interval(many).half * 2.262 / 1.96)
