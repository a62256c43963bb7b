"""Smoothing curves."""

import math

import numpy as np
import pytest

from mmfree_jax.train.smoothing import recent_average, smooth


def test_neighbours_on_both_sides_count_alike():
    # From the third value on there is one behind in the nearer half of the way to the first, from
    # the fifth on there are two. Behind the last there is none.
    values = [8.0, 2.0, 5.0, 4.0, 9.0]
    expected = [8, 2, (0.5 * 2 + 5 + 0.5 * 4) / 2, (0.5 * 5 + 4 + 0.5 * 9) / 2,
                (0.25 * 5 + 0.5 * 4 + 9) / 1.75]  # fmt: skip
    np.testing.assert_allclose(smooth(values, 0.5), expected, rtol=1e-12)
    values = [0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.0]
    # At 4 two on either side: 1 / (1 + 2 (0.5 + 0.25)). At 3 one. At 5 two behind and one after.
    # At 6 three behind.
    expected = [0, 0, 0, 0.25, 0.4, 0.5 / 2.25, 0.25 / 1.875]
    np.testing.assert_allclose(smooth(values, 0.5), expected, rtol=1e-12)


@pytest.mark.parametrize("weight", [0.0, 0.5, 0.8, 0.99, 0.999999])
def test_a_curve_starts_at_its_data_and_does_not_lag(weight):
    assert smooth([3.0] * 50, weight) == pytest.approx([3.0] * 50)
    line = 7 - 0.05 * np.arange(101)
    found = smooth(line, weight)
    np.testing.assert_allclose(found[:34], line[:34], rtol=1e-12)
    if weight <= 0.8:
        np.testing.assert_allclose(found[:60], line[:60], rtol=1e-12)
        # At the end the average is of the past: late by weight / (1 - weight) values.
        assert found[-1] == pytest.approx(line[-1] + 0.05 * weight / (1 - weight), abs=1e-3)
    noise = np.random.default_rng(0).normal(size=101)
    found = smooth(line + noise, weight)
    assert found[0] == line[0] + noise[0]
    if weight >= 0.8:
        assert np.std((found - line)[20:80]) < 0.5 * np.std(noise)


def test_nothing_is_smoothed_at_weight_zero_and_nothing_breaks_on_little():
    np.testing.assert_array_equal(smooth([1.0, 2.0, 4.0], 0.0), [1, 2, 4])
    for few in ([], [1.0], [1.0, 5.0]):
        np.testing.assert_array_equal(smooth(few, 0.9), few)
    np.testing.assert_allclose(smooth([1.0, 5.0, 2.0], 0.5), [1, 5, (0.5 * 5 + 2) / 1.5])


def test_what_is_not_finite_leaves_a_gap_and_no_more():
    values = [1.0, math.nan, 3.0, math.inf, -math.inf, 8.0, 4.0]
    # The third of 1, 3, 8, 4 has a neighbour on either side, the fourth one behind.
    third, fourth = (0.5 * 3 + 8 + 0.5 * 4) / 2, (0.5 * 8 + 4) / 1.5
    expected = [1.0, math.nan, 3.0, math.nan, math.nan, third, fourth]
    np.testing.assert_allclose(smooth(values, 0.5), expected, rtol=1e-12)
    np.testing.assert_array_equal(smooth([math.inf, 2.0], 0.0), [math.nan, 2.0])
    assert np.isnan(smooth([math.nan] * 3, 0.9)).all()


def test_the_recent_average_is_debiased():
    assert recent_average([3.0], 0.9) == 3.0
    assert recent_average([1.0, 4.0], 0.5) == pytest.approx((0.5 * 1 + 4) / 1.5)
    assert recent_average([1.0, 4.0], 0.0) == 4.0
