"""Products of powers, against numbers worked out by hand and against their own coverage."""

import math

import numpy as np
import pytest

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.power_law import fit_power_law

N, D = np.repeat([1e6, 4e6, 16e6], 2), np.tile([1e7, 1e8], 3)


def test_the_truth_is_found_where_there_is_no_noise():
    law = fit_power_law(3.2 * N**-0.4 * D**0.1, {"params": N, "tokens": D})
    assert law.constant == pytest.approx(3.2)
    assert law.exponent("params") == pytest.approx(-0.4)
    assert law.exponent("tokens") == pytest.approx(0.1)
    assert law.at(params=1e9, tokens=2e10) == pytest.approx(3.2 * 1e9**-0.4 * 2e10**0.1)


def test_the_interval_of_a_slope_is_the_textbook_one():
    # log y is 0, 1, 1, 2 at log x 0, 1, 2, 3: slope 0.6, residuals -0.1, 0.3, -0.3, 0.1, so that
    # s^2 = 0.2 / 2 and the slope's error is sqrt(0.1 / 5)
    # t at 97.5% and two degrees of freedom is 4.30265273.
    x = np.exp(np.arange(4.0))
    law = fit_power_law(np.exp([0.0, 1.0, 1.0, 2.0]), {"x": x})
    assert law.exponent("x") == pytest.approx(0.6)
    assert law.constant == pytest.approx(math.exp(0.1))
    assert law.residual == pytest.approx(math.sqrt(0.1))
    half = 4.30265273 * math.sqrt(0.1 / 5)
    assert law.exponent_interval("x") == pytest.approx((0.6 - half, 0.6 + half), rel=1e-6)
    # At the mean of log x the error is that of a mean: sqrt(0.1 / 4).
    low, high = law.interval_at(x=math.exp(1.5))
    assert math.log(high / low) == pytest.approx(2 * 4.30265273 * math.sqrt(0.1 / 4), rel=1e-6)


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), 0
    for _ in range(400):
        y = 3.2 * N**-0.4 * D**0.1 * np.exp(rng.normal(0, 0.2, len(N)))
        low, high = fit_power_law(y, {"params": N, "tokens": D}).exponent_interval("params")
        covered += low < -0.4 < high
    assert 0.92 < covered / 400 < 0.98


def test_as_many_rows_as_numbers_leave_no_interval():
    law = fit_power_law(np.array([1.0, 2.0]), {"x": np.array([1.0, 4.0])})
    assert law.exponent("x") == pytest.approx(0.5)
    assert all(map(math.isnan, law.exponent_interval("x")))


@pytest.mark.parametrize(
    ("y", "inputs", "message"),
    [
        ([1.0, -2.0], {"x": [1.0, 2.0]}, "y is -2 in a row"),
        ([1.0, 2.0], {"x": [1.0, 0.0]}, "x is 0 in a row"),
        ([1.0], {"x": [1.0]}, "1 rows for 2 numbers"),
        ([1.0, 2.0, 3.0], {"x": [1.0, 2.0, 4.0], "z": [20.0, 40.0, 80.0]}, "x and z do not vary"),
        ([1.0, 2.0, 3.0], {"x": [5.0, 5.0, 5.0]}, "x does not vary"),
    ],
)
def test_what_cannot_be_fitted_is_refused(y, inputs, message):
    with pytest.raises(ScalingError, match=message):
        fit_power_law(np.array(y), {k: np.array(v) for k, v in inputs.items()})
