"""Approaches 1, 2 and 3 recover a known allocation; false minima are refused."""

import numpy as np
import pytest
from synthetic_runs import draw_runs

from mmfree_jax.experiments.scaling.compute_optimal import optimal_allocation
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import join, make_frame
from mmfree_jax.experiments.scaling.isoflop import (
    envelope,
    fit_parabola,
    isoflop,
    parametric,
)

TRUTH = {"E": 1.7, "A": 400.0, "B": 1500.0, "alpha": 0.34, "beta": 0.28}
A = 0.28 / 0.62


@pytest.fixture(scope="module")
def runs():
    budgets = 10.0 ** np.linspace(17, 20, 4)
    best = optimal_allocation(np.array(list(TRUTH.values())))
    params = np.concatenate([
        np.exp(best[0] + best[1] * np.log(c)) * np.geomspace(0.25, 4, 7) for c in budgets
    ])  # fmt: skip
    c = np.repeat(budgets, 7)
    return draw_runs("chinchilla", TRUTH, params, c / 6 / params, noise=0.0005, budget=c, seed=3)


def test_isoflop_recovers_exponents_and_fractional_minima(runs):
    result = isoflop(runs, resamples=200)
    assert [p.status for p in result.budgets] == ["minimum"] * 4
    assert result.exponents["a"] == pytest.approx(A, abs=0.03)
    assert result.exponents["b"] == pytest.approx(1 - A, abs=0.03)
    for name, value in result.exponents.items():
        low, high = result.intervals[name]
        assert low <= value <= high
    for p in result.budgets:
        truth = np.exp(np.dot(optimal_allocation(np.array(list(TRUTH.values())))[:2],
                              [1, np.log(p.compute)]))  # fmt: skip
        assert p.params == pytest.approx(truth, rel=0.12)
        assert not np.any(np.isclose(p.params, runs.params, rtol=1e-6))  # between sizes tried


def test_a_given_budget_is_the_compute():
    """Vertices over the budget itself, by numpy alone; over 6 N D the slope is another."""
    budgets = 10.0 ** np.linspace(16, 19, 4)
    c = np.repeat(budgets, 7)
    n = np.concatenate([np.sqrt(b / 120) * np.geomspace(0.2, 5, 7) for b in budgets])
    d = c / (6 * n * (1 + (3e7 / n) ** 0.6))  # a head whose share falls with size
    loss = 1.75 + 420 * n**-0.34 + 1900 * d**-0.36
    at = [np.polyfit(np.log(n[c == b]), loss[c == b], 2) for b in budgets]
    best = [-p[1] / (2 * p[0]) for p in at]
    slope = np.polyfit(np.log(budgets), best, 1)[0]
    six = np.polyfit([np.log(6 * n * d)[c == b].mean() for b in budgets], best, 1)[0]
    assert abs(slope - six) > 0.02
    frame = make_frame(params=n, tokens=d, flops=1.5 * c, loss=loss, budget=c)
    result = isoflop(frame, resamples=0)
    assert result.exponents["a"] == pytest.approx(slope, rel=1e-9)
    assert [p.compute for p in result.budgets] == pytest.approx(list(budgets))
    assert result.definitions["C"] == "the budget given for each run (column 'budget')"
    assert isoflop(frame, flops="6nd", resamples=0).exponents["a"] == pytest.approx(six, rel=1e-9)


def test_exponents_are_fitted_separately(runs):
    """Under another convention of C the exponents need not sum to one."""
    embedded = make_frame(params=runs.params, tokens=runs.tokens, loss=runs.loss,
                          flops=(6 * runs.params * runs.tokens) ** 1.2,
                          budget=runs.budget)  # fmt: skip
    result = isoflop(embedded, flops="exact", resamples=0)
    assert result.exponents["a_plus_b"] == pytest.approx(1 / 1.2, abs=0.01)
    assert "no intervals" in " ".join(result.warnings)


def test_false_minima():
    n = np.geomspace(1e7, 1e9, 5)
    c = np.full(5, 1e19)
    x = np.log(n)
    d = c / 6 / n
    assert fit_parabola(n, d, c, 3 + 0.1 * (x - x[2]) ** 2).status == "minimum"
    assert fit_parabola(n, d, c, 3 - 0.1 * (x - x[2]) ** 2).status == "maximum"
    assert fit_parabola(n, d, c, 3 + 0.1 * (x - x[0] + 1) ** 2).status == "edge"
    assert fit_parabola(n, d, c, 3 + 0.1 * (x - x[4]) ** 2).status == "edge"
    assert fit_parabola(n[:2], d[:2], c[:2], np.array([3.0, 2.9])).status == "few"


def test_budgets_without_minimum_are_left_out_and_named(runs):
    rising = runs.budget == runs.budget.min()
    loss = np.where(rising, 3 + 0.1 * np.log(runs.params / 1e5) ** 2, runs.loss)
    spoiled = make_frame(params=runs.params, tokens=runs.tokens, loss=loss, budget=runs.budget)
    result = isoflop(spoiled, resamples=50)
    assert sum(p.status == "minimum" for p in result.budgets) == 3
    assert "at an edge of the sizes tried" in " ".join(result.warnings)
    falling = make_frame(params=runs.params, tokens=runs.tokens, loss=1 / np.log(runs.params))
    with pytest.raises(ScalingError, match="0 of 4 budgets have a minimum and two are needed"):
        isoflop(falling)


def test_budgets_are_found_without_their_column(runs):
    jitter = np.exp(0.02 * np.random.default_rng(0).standard_normal(len(runs)))
    bare = make_frame(params=runs.params, tokens=runs.tokens * jitter, loss=runs.loss)
    assert len(isoflop(bare, resamples=0).budgets) == 4


def test_parametric_matches_its_closed_form(runs):
    result = parametric(fit_law(runs, resamples=100, profile=False, holdout=False))
    assert result.exponents["a"] == pytest.approx(A, abs=0.03)
    assert result.exponents["a_plus_b"] == pytest.approx(1)
    low, high = result.intervals["a"]
    assert low < A < high


def test_envelope_recovers_the_exponent():
    frames = []
    for k, size in enumerate(np.geomspace(3e6, 3e9, 13)):
        tokens = size * np.geomspace(1, 400, 40)
        frame = draw_runs("chinchilla", TRUTH, np.full(40, size), tokens)
        frames.append(make_frame(params=size, tokens=tokens, loss=frame.loss, run=f"run {k}"))
    runs = join(frames)
    result = envelope(runs, resamples=100)
    assert result.exponents["a"] == pytest.approx(A, abs=0.05)
    assert result.exponents["b"] == pytest.approx(1 - A, abs=0.05)
    assert result.intervals["a"][0] < A < result.intervals["a"][1]
    with pytest.raises(ScalingError, match="every run has one row"):
        envelope(make_frame(params=[1e7, 1e8], tokens=[1e9, 1e9], loss=[3.0, 2.8]))
