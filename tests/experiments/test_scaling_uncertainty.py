"""Intervals mean what they say, and what cannot be known is said."""

import numpy as np
import pytest
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.joint import fit_joint
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.uncertainty import clusters_of, groups_of, resampling_weights

TRUTH = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.35}


@pytest.fixture(scope="module")
def runs():
    params, tokens, budget = isoflop_design(10.0 ** np.linspace(17, 20, 5), 6)
    return draw_runs("chinchilla", TRUTH, params, tokens, noise=0.004, budget=budget, seed=1)


@pytest.fixture(scope="module")
def fit(runs):
    return fit_law(runs, resamples=400)


def test_intervals_hold_the_truth_and_the_estimate(fit):
    for name, truth in TRUTH.items():
        low, high = fit.intervals[name]
        assert low < fit.parameters[name] < high
        assert low - (high - low) < truth < high + (high - low)
        profile = fit.profiles[name].interval
        assert profile[0] < fit.parameters[name] < profile[1]


def test_seeded(runs, fit):
    again = fit_law(runs, resamples=400, profile=False, holdout=False)
    assert again.intervals == fit.intervals
    other = fit_law(runs, resamples=400, seed=5, profile=False, holdout=False)
    assert other.intervals != fit.intervals
    assert other.parameters["alpha"] == pytest.approx(fit.parameters["alpha"], rel=1e-6)


def test_line_intervals_match_ordinary_least_squares():
    """For the line and least squares, profile and bootstrap approximate textbook intervals."""
    rng = np.random.default_rng(0)
    c = 10 ** rng.uniform(18, 21, 200)
    loss = 9.0 - 0.3 * np.log10(c) + 0.02 * rng.standard_normal(200)
    frame = make_frame(params=np.sqrt(c / 120), tokens=np.sqrt(c / 120) * 20, loss=loss)
    fit = fit_law(frame, "line", resamples=2000)
    x = np.log10(c)
    slope, intercept = np.polyfit(x, loss, 1)
    assert fit.parameters["slope"] == pytest.approx(slope, rel=1e-9)
    assert fit.parameters["intercept"] == pytest.approx(intercept, rel=1e-9)
    residual = loss - intercept - slope * x
    error = np.sqrt(residual.var() / x.var() / 200)
    for low, high in (fit.intervals["slope"], fit.profiles["slope"].interval):
        assert (high - low) / (2 * 1.96 * error) == pytest.approx(1, abs=0.12)


def test_rows_of_a_run_are_resampled_together():
    frame = make_frame(loss=np.ones(5), run=["a", "a", "b", "", ""])
    clusters = clusters_of(frame)
    assert clusters[0] == clusters[1]
    assert len(set(clusters)) == 4
    weights = resampling_weights(clusters, 50, np.random.default_rng(0))
    np.testing.assert_array_equal(weights[:, 0], weights[:, 1])
    assert set(weights[:, [0, 2, 3, 4]].sum(1)) == {4.0}


def test_losses_that_are_all_alike_are_refused():
    """Any E + A + B fits them, and each resample is the same: the intervals would be points."""
    size, tokens = (v.ravel() for v in np.meshgrid([1e7, 1e8, 1e9], [1e9, 1e10, 1e11]))
    frame = make_frame(params=size, tokens=tokens, loss=np.full(9, 3.0))
    with pytest.raises(ScalingError, match="'loss' is 3 in all 9 runs"):
        fit_law(frame, resamples=20)
    other = make_frame(params=size, tokens=tokens, loss=2 + 1e3 * size**-0.4 + 1e3 * tokens**-0.4)
    with pytest.raises(ScalingError, match="'loss' is 3 in all 9 runs of flat"):
        fit_joint({"good": other, "flat": frame}, resamples=0)


def test_one_size_sets_nothing_of_sizes():
    frame = make_frame(params=1e7, tokens=np.geomspace(1e9, 1e11, 9),
                       loss=np.geomspace(3.5, 2.5, 9))  # fmt: skip
    fit = fit_law(frame, resamples=0, profile=False, holdout=False)
    assert any("all runs have the same params" in w for w in fit.warnings)


def test_three_points_cannot_fix_a_floor():
    frame = make_frame(params=[1e7, 1e8, 1e9], tokens=[1e9, 1e10, 1e11], loss=[3.5, 2.8, 2.4])
    fit = fit_law(frame, "power-floor", resamples=100)
    said = " ".join(fit.warnings)
    assert "three points cannot fix a floor" in said
    assert "passes through every run" in said
    assert "says next to nothing" in said
    assert fit.profiles == {}


def test_collinear_design_and_dead_term_are_flagged():
    params = 10 ** np.linspace(7, 9, 12)
    frame = draw_runs("chinchilla", TRUTH, params, 20 * params, noise=0.003)
    said = " ".join(fit_law(frame, resamples=50, profile=False, holdout=False, restarts=0).warnings)
    assert "cannot be told apart" in said
    n, d, _ = isoflop_design(10.0 ** np.linspace(18, 21, 5), 6)
    dead = draw_runs("chinchilla", {**TRUTH, "B": 1e-9}, n, d, noise=0.001)
    assert "on its bound at 0" in " ".join(
        fit_law(dead, resamples=50, profile=False, holdout=False, restarts=0).warnings
    )


def test_no_floor_in_the_data_is_said():
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 21, 8), 4)
    frame = draw_runs("power", {"K": 40.0, "gamma": 0.06}, params, tokens, noise=0.003)
    fit = fit_law(frame, "power-floor", resamples=200)
    assert any("floor" in w for w in fit.warnings)


def test_too_few_runs_is_an_error_and_no_bootstrap_is_a_warning(runs):
    with pytest.raises(ScalingError, match="4 runs cannot determine the 5 parameters"):
        fit_law(runs.take(np.arange(4)))
    fit = fit_law(runs, "power", resamples=0)
    assert fit.intervals == {}
    assert any("no intervals" in w for w in fit.warnings)


def test_noise_bootstrap_uses_the_standard_errors(runs):
    with pytest.raises(ScalingError, match="'noise' needs the standard error"):
        fit_law(runs, "power-floor", resample="noise")
    sharp = make_frame(params=[1e7, 1e8, 1e9], tokens=[1e9, 1e10, 1e11], loss=[3.5, 2.8, 2.4],
                       loss_sd=1e-4)  # fmt: skip
    blunt = make_frame(params=[1e7, 1e8, 1e9], tokens=[1e9, 1e10, 1e11], loss=[3.5, 2.8, 2.4],
                       loss_sd=1e-2)  # fmt: skip
    widths = []
    for frame in (sharp, blunt):
        low, high = fit_law(frame, "power", resample="noise", resamples=200).intervals["gamma"]
        widths.append(high - low)
    assert widths[1] > 20 * widths[0] > 0


def test_leave_one_size_out_predicts_the_held_out_size(runs):
    params = np.repeat(10 ** np.linspace(7, 9, 5), 4)
    tokens = np.tile(10 ** np.linspace(9, 10.5, 4), 5)
    good = draw_runs("chinchilla", TRUTH, params, tokens, noise=0.001)
    folds = fit_law(good, resamples=0, profile=False, restarts=0).holdout
    assert [f.runs for f in folds] == [4] * 5
    assert [f.extrapolated for f in folds] == [False] * 4 + [True]
    assert all(abs(f.error) < 0.02 for f in folds)
    loss = np.where(params == params.max(), 1.1 * good.loss, good.loss)
    bad = make_frame(params=params, tokens=tokens, loss=loss)
    folds = fit_law(bad, resamples=0, profile=False, restarts=0).holdout
    assert folds[-1].error == pytest.approx(-0.1, abs=0.03)


def test_groups_of_sizes():
    np.testing.assert_array_equal(groups_of(np.array([10.0, 1.0, 1.01, 5.0])), [2, 0, 0, 1])
    assert groups_of(10 ** np.linspace(6, 9, 60)).max() == 5


def test_profile_of_an_unbounded_parameter_is_open():
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(20, 20.3, 3), 3, spread=1.5)
    frame = draw_runs("chinchilla", TRUTH, params, tokens, noise=0.02, seed=4)
    fit = fit_law(frame, objective=Objective("log-lsq"), resamples=0, restarts=0)
    assert any(None in p.interval for p in fit.profiles.values())


def test_a_floor_that_the_data_do_not_show_keeps_its_upper_bound():
    """At the optimum E is 0, where it has no slope: refits and the profile must still find it."""
    c = 10 ** np.linspace(18, 20, 16)
    rng = np.random.default_rng(3)
    wave = 0.01 * rng.standard_normal(16)
    loss = np.exp(np.log(30 * c**-0.05) + wave - 0.002 * np.log(c / c[8]) ** 2)
    frame = make_frame(params=np.sqrt(c / 120), tokens=np.sqrt(c * 20 / 6), loss=loss)
    fit = fit_law(frame, "power-floor", Objective("log-lsq"), resamples=300, holdout=False)
    assert fit.parameters["E"] < 1e-9
    assert any("E = " in w and "on its bound at 0" in w for w in fit.warnings)
    assert fit.intervals["E"][1] > 0.05
    low, high = fit.profiles["E"].interval
    assert low is None
    # The profile's end by hand: least squares with E fixed, against the sandwich variance of E
    # in the textbook's matrices (White's HC2, Bell and McCaffrey's degrees of freedom).
    best = _squares_at(0.0, frame, loss)
    grid = np.linspace(0.0, loss.min() * 0.999, 400)
    rise = np.array([_squares_at(e, frame, loss) for e in grid]) - best
    fitted = fit.predict(fit.inputs)
    x = np.stack([1 / fitted, np.ones(16), np.log(c / c.mean())], axis=1)
    inverse = np.linalg.inv(x.T @ x)
    rest = np.eye(16) - x @ inverse @ x.T
    weights = (x @ inverse)[:, 0]
    each = np.diag(weights**2 / np.diag(rest))
    variance = np.sum(np.diag(each) * np.log(fitted / loss) ** 2)
    form = rest @ each @ rest
    freedom = np.trace(form) ** 2 / np.trace(form @ form)
    assert freedom == pytest.approx(6.35, abs=0.01)
    statistic = rise / (variance / inverse[0, 0])
    by_hand = grid[np.argmax(statistic > 2.4143**2)]  # Student's t, 97.5% at 6.35 degrees
    assert high == pytest.approx(by_hand, rel=0.02)


def _squares_at(floor, frame, loss):
    """Least sum of squared log residuals of E + K C^-gamma at a fixed E."""
    from scipy.optimize import least_squares

    z = np.log(6 * frame.params * frame.tokens)
    z = (z - z.mean()) / z.std()
    start = np.polyfit(z, np.log(loss - floor), 1)

    def residual(q):
        return np.log(floor + np.exp(q[1] + q[0] * z)) - np.log(loss)

    return 2 * least_squares(residual, start, xtol=1e-14, ftol=1e-14, gtol=1e-14).cost
