"""Departures from a law: how large they are taken to be, what residuals tell, and what refits get.

Every reference is written out here: covariances, the kriging of a textbook, and draws by Cholesky.
"""

import numpy as np
import pytest

from mmfree_jax.experiments.scaling.misfit import (
    Beside,
    Departures,
    Inverses,
    Misfit,
    Places,
    estimate_misfit,
)

SIZES = np.repeat(np.geomspace(1e6, 3e7, 6), 5)
TOKENS = SIZES * np.tile([5.0, 10, 20, 40, 80], 6)
PARAMS, D = np.tile(SIZES, 2), np.tile(TOKENS, 2)
FAMILY = np.repeat([0, 1], len(SIZES))
PLACES = Places.of(PARAMS, D, FAMILY)
NOISE = 0.001


def kernel(a, b, length, shared):
    """Written out once more: squared distances in logs, families that share a part."""
    apart = (a.logs[:, None, 0] - b.logs[None, :, 0]) ** 2
    apart = apart + (a.logs[:, None, 1] - b.logs[None, :, 1]) ** 2
    same = a.family[:, None] == b.family[None, :]
    return np.exp(-apart / 2 / length**2) * np.where(same, 1, shared)


def gradient():
    """A law whose log loss is a plane of each family's own in log N and log D."""
    x = np.column_stack([np.ones(len(PARAMS)), PLACES.logs - PLACES.logs.mean(0)])
    return np.concatenate([x * np.equal(FAMILY, k)[:, None] for k in (0, 1)], axis=1)


def misfit_at(deviation, length=1.4, shared=0.5, noise=NOISE):
    one = np.ones(1)
    return Misfit(PLACES, noise**2 * np.eye(len(PARAMS)), deviation * one, length * one,
                  shared * one, one, deviation * one)  # fmt: skip


def drawn(deviation, length, shared, rng):
    covariance = deviation**2 * kernel(PLACES, PLACES, length, shared)
    covariance += NOISE**2 * np.eye(len(PARAMS))
    return np.linalg.cholesky(covariance) @ rng.standard_normal(len(PARAMS))


def test_the_size_of_departures_is_found():
    rng, x = np.random.default_rng(0), gradient()
    cases = ((0.0, 40), (0.004, 40), (0.02, 40))
    typical = {}
    for deviation, count in cases:
        found = []
        for _ in range(count):
            residuals = drawn(deviation, 1.4, 0.5, rng)
            residuals = residuals - x @ np.linalg.lstsq(x, residuals, rcond=None)[0]
            misfit = estimate_misfit(residuals, x, NOISE**2 * np.eye(len(x)), PLACES, [1.4], [0.5])
            found.append(misfit.weights @ misfit.deviations)
        typical[deviation] = np.median(found)
    assert typical[0.0] < 0.0008
    assert typical[0.004] == pytest.approx(0.004, rel=0.25)
    assert typical[0.02] == pytest.approx(0.02, rel=0.25)


def test_what_parameters_take_up_is_no_evidence():
    x, rng = gradient(), np.random.default_rng(1)
    noise = NOISE * rng.standard_normal(len(x))
    args = (x, NOISE**2 * np.eye(len(x)), PLACES)
    few, many = (estimate_misfit(noise + add, *args) for add in (0.0, x @ np.full(6, 0.1)))
    assert many.weights == pytest.approx(few.weights, abs=1e-6)
    assert many.deviations == pytest.approx(few.deviations, rel=1e-6, abs=1e-9)


def test_noise_that_runs_share_is_no_departure():
    """A level of each family by its own trunk or documents, as large as the noise says."""
    rng, x = np.random.default_rng(2), gradient()[:, [1, 2, 4, 5]]  # no level in this law
    level = 0.02 * (FAMILY[:, None] == FAMILY[None])
    residuals = NOISE * rng.standard_normal(len(x)) + 0.03 * (FAMILY == 1)
    known, unknown = (
        estimate_misfit(residuals, x, NOISE**2 * np.eye(len(x)) + share * level**2, PLACES)
        for share in (1, 0)
    )
    assert known.weights @ known.visible < 0.1 * (unknown.weights @ unknown.visible)


def test_departures_have_the_covariance_that_is_said():
    misfit = misfit_at(0.01, length=1.4, shared=0.5)
    departures = misfit.draw(20_000, ["a", "b"], np.random.default_rng(0))
    own = np.concatenate([departures[name].at(SIZES, TOKENS) for name in ("a", "b")], axis=1)
    expected = 1e-4 * kernel(PLACES, PLACES, 1.4, 0.5)
    # 256 features make a covariance to about a sixteenth.
    assert np.cov(own, rowvar=False) == pytest.approx(expected, abs=0.25e-4)
    assert own.std() == pytest.approx(0.01, rel=0.1)


def test_residuals_tell_departures_as_kriging_has_it():
    misfit = misfit_at(0.01, noise=0.002)
    telling = misfit.inverses().telling()
    at = Places.of(np.array([2e6, 5e7]), np.array([4e7, 1e9]), np.array([0, 1]))
    residuals = np.random.default_rng(0).standard_normal((3, len(PARAMS)))
    v = 1e-4 * kernel(PLACES, PLACES, 1.4, 0.5) + 4e-6 * np.eye(len(PARAMS))
    expected = 1e-4 * kernel(at, PLACES, 1.4, 0.5) @ np.linalg.solve(v, residuals.T)
    assert telling.at(at, residuals) == pytest.approx(expected.T, rel=1e-6)
    far = Places.of(np.array([1e12]), np.array([2e13]), np.array([0]))
    assert telling.at(far, residuals) == pytest.approx(np.zeros((3, 1)), abs=1e-9)


def test_the_step_is_generalised_least_squares():
    misfit, x = misfit_at(0.01, noise=0.002), gradient()
    v = 1e-4 * kernel(PLACES, PLACES, 1.4, 0.5) + 4e-6 * np.eye(len(PARAMS))
    inverse = np.linalg.inv(v)
    expected = np.linalg.solve(x.T @ inverse @ x, x.T @ inverse)
    assert misfit.inverses().least_squares(x) == pytest.approx(expected, rel=1e-5, abs=1e-8)


def test_points_of_the_grid_count_by_their_weights():
    two = Misfit(PLACES, 1e-6 * np.eye(len(PARAMS)), np.array([0.0, 0.01]), np.array([1.4, 1.4]),
                 np.zeros(2), np.array([0.25, 0.75]), np.zeros(2))  # fmt: skip
    residuals = np.ones((1, len(PARAMS)))
    whole = misfit_at(0.01, shared=0.0).inverses().telling().at(PLACES, residuals)
    assert two.inverses().telling().at(PLACES, residuals) == pytest.approx(0.75 * whole, rel=1e-6)


def test_refits_are_compared_with_the_departures_that_they_were_given():
    """With little noise an estimate finds them at the runs: no error is left there."""
    misfit = misfit_at(0.02, noise=1e-4)
    departures = misfit.draw(50, ["a", "b"], np.random.default_rng(3))
    given = np.concatenate([departures[name].at(SIZES, TOKENS) for name in ("a", "b")], axis=1)
    telling = Inverses(misfit, np.array([0]), misfit.inverses().inverse).telling()
    beside = Beside(("a", "b"), {}, telling, given[:1], given, departures)
    for k, name in enumerate(("a", "b")):
        own = given[:, np.equal(FAMILY, k)]
        assert beside.of_refits(name, SIZES, TOKENS) == pytest.approx(0 * own, abs=2e-3)
        assert beside.of_fit(name, SIZES, TOKENS) == pytest.approx(own[:1], abs=2e-3)
    # Far away nothing is told, and the whole departure is the estimate's error.
    far = beside.of_refits("a", np.array([1e12]), np.array([2e13]))
    assert far == pytest.approx(-departures["a"].at(np.array([1e12]), np.array([2e13])), abs=1e-9)
    assert far.std() == pytest.approx(0.02, rel=0.3)


def test_departures_of_some_refits_are_those():
    every = misfit_at(0.01).draw(5, ["a"], np.random.default_rng(0))["a"]
    assert isinstance(every, Departures)
    some = every.of(np.array([3, 1])).at(SIZES, TOKENS)
    assert some == pytest.approx(every.at(SIZES, TOKENS)[[3, 1]])
