"""Intervals that cover as often as they say, and the sentence that they become."""

import math

import numpy as np
import pytest

from w8a8.evaluation.intervals import Bootstrap, Estimate, _student, verdict


@pytest.mark.parametrize("windows", [pytest.param(n, marks=pytest.mark.slow) for n in (3, 8, 14, 15, 20, 40, 100)])
def test_the_interval_covers_the_true_difference_in_93_to_97_per_cent_of_a_thousand_cases(windows):
    chance, hits = np.random.default_rng(windows), 0
    draw = Bootstrap(windows, seed=0, resamples=1000)
    for _ in range(1000):
        counts = chance.integers(120, 256, windows)
        # a difference of two models: windows have a level of their own, and a few are far out, as texts have it
        levels = 0.004 + 0.003 * chance.standard_normal(windows) + 0.004 * (chance.exponential(1.0, windows) - 1)
        sums = counts * levels + 0.05 * np.sqrt(counts) * chance.standard_normal(windows)
        estimate = draw.ratio(sums, counts)
        hits += estimate.low <= 0.004 <= estimate.high
    assert 930 <= hits <= 970


def test_the_interval_of_a_quantile_covers_it_about_as_often():
    chance, hits = np.random.default_rng(1), 0
    truth = math.log(100)  # the 99 % point of an exponential
    draw = Bootstrap(60, seed=0, resamples=400)
    for _ in range(150):
        estimate = draw.quantile([chance.exponential(1.0, 200).astype(np.float32) for _ in range(60)], 0.99)
        hits += estimate.low <= truth <= estimate.high
    assert 0.91 < hits / 150 < 0.98


def test_a_quantile_is_the_least_value_with_so_many_at_or_below_it():
    values = [np.arange(1, 51, dtype=np.float32), np.arange(51, 101, dtype=np.float32)]
    assert Bootstrap(2).quantile(values, 0.99).mean == 99.0
    assert Bootstrap(2).quantile(values, 0.5).mean == 50.0
    assert Bootstrap(1).quantile([np.ones(7, np.float32)], 0.99).mean == 1.0


def test_the_same_seed_draws_the_same_and_another_does_not():
    sums, counts = np.arange(30.0), np.full(30, 7.0)
    first = Bootstrap(30, seed=1).ratio(sums, counts)
    assert Bootstrap(30, seed=1).ratio(sums, counts) == first
    assert Bootstrap(30, seed=2).ratio(sums, counts) != first
    assert first.mean == sums.sum() / counts.sum()


def test_equal_windows_have_an_interval_of_no_width():
    estimate = Bootstrap(10).ratio([0.0] * 10, [5] * 10)
    assert (estimate.low, estimate.mean, estimate.high) == (0.0, 0.0, 0.0)


@pytest.mark.parametrize(("degrees", "point"), [(1, 12.7062), (4, 2.7764), (39, 2.0227), (99, 1.9842), (999, 1.9623)])
def test_students_points_are_those_of_the_tables(degrees, point):
    assert _student(degrees) == pytest.approx(point, rel=1e-4)


@pytest.mark.parametrize(
    ("ratio", "sentence"),
    [
        (Estimate(1.006, 1.004, 1.009), "worse by 0.40 % to 0.90 %"),
        (Estimate(0.98, 0.97, 0.99), "better by 1.00 % to 3.00 %"),
        (Estimate(1.00001, 1.000004, 1.00002), "worse by 0.0004 % to 0.0020 %"),
        (Estimate(1.0, 0.999, 1.001), "indistinguishable at 95 %"),
        (Estimate(1.0, 1.0, 1.0), "indistinguishable at 95 %"),
        (Estimate(1.2, math.nan, math.nan), "one window: no interval, so nothing can be said"),
    ],
)
def test_the_verdict_is_plain(ratio, sentence):
    assert verdict(ratio) == sentence
