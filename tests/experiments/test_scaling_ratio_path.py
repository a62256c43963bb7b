"""Gaps along a number of tokens a parameter: known laws, known slopes."""

import numpy as np
import pytest

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.joint import fit_joint
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.ratio_path import (
    losses_on_path,
    measured_slope,
    path_gap,
    refit_jointly,
    size_on_path,
)
from mmfree_jax.experiments.scaling.training_cost import SIX, TrainingCost

LAW = get_law("chinchilla")
FIRST = np.array([2.0, 180.0, 560.0, 0.345, 0.36])
SECOND = np.array([2.0, 120.0, 560.0, 0.32, 0.36])
PARAMS = np.array([1e6, 2.7e6, 6.8e6, 1.8e7, 4e7])
COST = TrainingCost(excess=30.0, shrink=0.3)


def runs(parameters, noise, rng):
    n, ratio = (a.ravel() for a in np.meshgrid(PARAMS, [5.0, 20.0, 80.0]))
    loss = LAW.loss(parameters, {"params": n, "tokens": ratio * n})
    per_token = np.exp(COST.log_per_token(np.log(n)))
    return make_frame(params=n, params_non_embedding=n, tokens=ratio * n,
                      flops=per_token * ratio * n,
                      loss=loss * np.exp(noise * rng.standard_normal(len(n))))  # fmt: skip


def gap_at(ratio, log10_c):
    """The true gap, the sizes found by bisection and not by the code under test."""
    sizes = []
    for c in log10_c:
        low, high = 1e3, 1e13
        for _ in range(200):
            n = np.sqrt(low * high)
            spent = ratio * n * 6 * n * (1 + 30.0 * n**-0.3)
            low, high = (n, high) if spent < 10.0**c else (low, n)
        sizes.append(n)
    n = np.array(sizes)
    first, second = (p[0] + p[1] * n ** -p[3] + p[2] * (ratio * n) ** -p[4]
                     for p in (FIRST, SECOND))  # fmt: skip
    return first - second


def test_a_size_on_a_path_costs_the_compute():
    at = np.array([14.0, 17.0, 23.0])
    assert size_on_path(SIX, 20, at) == pytest.approx(np.sqrt(10**at / 120), rel=1e-9)
    n = size_on_path(COST, 80, at)
    assert 80 * n * 6 * n * (1 + 30 * n**-0.3) == pytest.approx(10**at, rel=1e-7)
    assert np.isnan(size_on_path(TrainingCost(excess=-1e9, shrink=0.3), 20, at)).all()


def test_losses_on_a_path_are_the_laws():
    (loss,) = losses_on_path(LAW, FIRST, SIX, 20, np.array([np.log10(120e12)]))  # N is 1e6
    assert loss == pytest.approx(2 + 180 * 1e6**-0.345 + 560 * 2e7**-0.36, rel=1e-9)


@pytest.fixture(scope="module")
def known():
    rng = np.random.default_rng(3)
    frames = {"first": runs(FIRST, 0.002, rng), "second": runs(SECOND, 0.002, rng)}
    return fit_joint(frames, size="non-embedding", flops="exact", resamples=0, profile=False,
                     restarts=8)  # fmt: skip


def test_a_known_slope_is_found_within_its_interval(known):
    fit, rng = known, np.random.default_rng(4)
    frames = {name: fit.fits[name].frame for name in fit.fits}
    own = np.log(np.concatenate([f.loss for f in frames.values()]))
    noisy = own + 0.002 * rng.standard_normal((100, len(own)))
    draws = refit_jointly(fit, noisy).parameters
    costs = dict.fromkeys(frames, COST)
    for ratio in (20, 80):
        ends = (14.5, 17.0)
        true = gap_at(ratio, ends)
        found = path_gap(fit, draws, costs, ("first", "second"), ratio, ends, np.arange(14, 24.05))
        slope = (true[1] - true[0]) / 2.5
        assert -0.06 < slope < -0.03  # the gap closes
        low, high = found.slope_interval
        assert low < slope < high < 0
        assert high - low < 0.04
        for value, (a, b) in zip(true, found.gap_intervals, strict=True):
            assert a < value < b
        # The second is ahead at the least compute; where the law has it behind, P says so.
        assert found.lead.first[0] < 0.01
        assert found.lead.first[-1] > 0.9
        assert gap_at(ratio, [23.0])[0] < 0


def test_equal_families_have_no_slope():
    rng = np.random.default_rng(0)
    frames = {"first": runs(FIRST, 0.002, rng), "second": runs(FIRST, 0.002, rng)}
    fit = fit_joint(frames, size="non-embedding", flops="exact", resamples=0, profile=False,
                    restarts=8)  # fmt: skip
    own = np.log(np.concatenate([f.loss for f in frames.values()]))
    noisy = own + 0.002 * rng.standard_normal((100, len(own)))
    draws = refit_jointly(fit, noisy).parameters
    found = path_gap(fit, draws, dict.fromkeys(frames, COST), ("first", "second"), 20, (14.5, 17.0),
                     [15.0, 16.0])  # fmt: skip
    assert found.slope_interval[0] < 0 < found.slope_interval[1]
    assert abs(found.slope) < 0.01


def test_few_refits_give_no_interval(known):
    draws = {name: known.fits[name].vector()[None] for name in known.fits}
    with pytest.raises(ScalingError, match="1 refits succeeded"):
        path_gap(known, draws, dict.fromkeys(draws, SIX), ("first", "second"), 20, (14, 17), [15.0])


def test_a_slope_without_a_law():
    # Powers of C are straight where they are interpolated, at computes that the other has not.
    a, b = np.array([14.0, 15.0, 16.0, 17.0]), np.array([14.2, 15.2, 16.2, 17.2])
    first, second = 40 * 10 ** (-0.070 * a), 30 * 10 ** (-0.063 * b)
    found = measured_slope((a, b), (np.stack([first, 2 * first]), np.stack([second, 2 * second])))
    at = np.array([14.2, 15.0, 15.2, 16.0, 16.2, 17.0])
    expected = np.polyfit(at, 40 * 10 ** (-0.070 * at) - 30 * 10 ** (-0.063 * at), 1)[0]
    assert found == pytest.approx([expected, 2 * expected], rel=1e-9)
    with pytest.raises(ScalingError, match="overlapping compute"):
        measured_slope((a, b + 4), (first[None], second[None]))
