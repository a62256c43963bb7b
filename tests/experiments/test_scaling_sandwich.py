"""Sandwich variances against the textbook's matrices, and what intervals make of draws."""

import numpy as np
import pytest

from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.objectives import Objective, score_and_slope
from mmfree_jax.experiments.scaling.sandwich import scatter
from mmfree_jax.experiments.scaling.uncertainty import corrected_quantiles


def test_a_mean_has_its_textbook_variance():
    """Of 1, 2, 3, 4 and 10: s^2 / n = 12.5 / 5 with n - 1 = 4 degrees of freedom."""
    values = np.array([1.0, 2, 3, 4, 10])
    found = scatter(np.ones((5, 1)), values - 4, np.ones(5), np.arange(5), np.ones((1, 1)))
    assert found.variance == pytest.approx([2.5], rel=1e-6)
    assert found.curvature == pytest.approx([0.2], rel=1e-6)
    assert found.freedom == pytest.approx([4], rel=1e-6)


@pytest.mark.parametrize("clusters", [[0, 0, 1, 1, 1, 2, 3, 3, 4, 5], list(range(10))])
def test_clusters_as_by_bell_and_mccaffrey(clusters):
    """CR2 and its degrees of freedom with matrices of all rows, as the paper writes them."""
    rng = np.random.default_rng(0)
    x = np.column_stack([np.ones(10), rng.normal(5, 1, 10), rng.normal(-3, 2, 10)])
    y = rng.standard_normal(10)
    inverse = np.linalg.inv(x.T @ x)
    hat = x @ inverse @ x.T
    residual = y - hat @ y
    groups = [np.flatnonzero(np.array(clusters) == g) for g in np.unique(clusters)]
    meat, columns = np.zeros((3, 3)), []
    weights = np.array([0.0, 1.0, 1.0])
    for rows in groups:
        values, basis = np.linalg.eigh(np.eye(len(rows)) - hat[np.ix_(rows, rows)])
        root = (basis / np.sqrt(values)) @ basis.T
        part = x[rows].T @ root @ residual[rows]
        meat += np.outer(part, part)
        columns.append((np.eye(10) - hat)[:, rows] @ root @ x[rows] @ inverse @ weights)
    inner = np.stack(columns, axis=1)
    eigenvalues = np.linalg.eigvalsh(inner.T @ inner)

    found = scatter(x, residual, np.ones(10), np.array(clusters), weights[None])
    assert found.variance[0] == pytest.approx(weights @ inverse @ meat @ inverse @ weights, 1e-5)
    assert found.freedom[0] == pytest.approx(
        eigenvalues.sum() ** 2 / (eigenvalues**2).sum(), rel=1e-5
    )


@pytest.mark.parametrize(
    ("objective", "score", "slope"),
    [
        # Of normal noise: the density at 0 is 0.3989, and 0.6827 of it lies within one sd.
        (Objective("lad"), 0.8, 2 * 0.3989),
        (Objective("huber", 1e-3), 1e-3, 2e-3 * 0.3989),
        (Objective("huber", 1.0), None, 0.6827),
        (Objective("log-lsq"), None, 2.0),
    ],
)
def test_scores_expect_the_slope_of_their_density(objective, score, slope):
    noise = np.random.default_rng(0).standard_normal(20_000)
    scores, slopes = score_and_slope(objective, noise, 5)
    assert slopes.mean() == pytest.approx(slope, rel=0.04)
    if score is not None:
        assert scores[np.argmin(np.abs(noise - 0.8))] * np.sign(0.8) == pytest.approx(
            1 if objective.kind == "lad" else score
        )


def test_quantiles_are_corrected_for_bias():
    draws = np.linspace(0, 1, 10_001)[:, None]
    plain = corrected_quantiles(0.5, draws, 0.95)
    assert plain[:, 0] == pytest.approx([0.025, 0.975], abs=1e-3)
    # 69.15% of the draws lie below an estimate half a standard deviation above their median:
    # the ends are Phi(1 - 1.96) and Phi(1 + 1.96).
    moved = corrected_quantiles(0.6915, draws, 0.95)
    assert moved[:, 0] == pytest.approx([0.1685, 0.9985], abs=1e-3)
    # All of them: as far as is corrected, Phi(1.5 - 1.96) and Phi(1.5 + 1.96).
    assert corrected_quantiles(2.0, draws, 0.95)[:, 0] == pytest.approx([0.3228, 0.9997], abs=1e-3)


def test_a_bootstrap_counts_runs_and_not_their_rows():
    """Of three runs, 3! / 3^3 = 22% of the resamples hold all; two cannot fix two parameters."""
    c = 10.0 ** np.linspace(17, 20, 15)
    noise = 0.01 * np.random.default_rng(0).standard_normal(15)
    params = np.sqrt(c / 120)
    frame = make_frame(params=params, tokens=20 * params, loss=30 * c**-0.05 * np.exp(noise),
                       run=np.repeat(["a", "b", "c"], 5))  # fmt: skip
    fit = fit_law(frame, "power", resamples=400, profile=False, holdout=False, restarts=0)
    assert fit.bootstrap.clusters == 3
    assert 0.15 < len(fit.bootstrap.parameters) / 400 < 0.3
    assert any("resamples had at most 2 distinct runs and were left out" in w for w in fit.warnings)
    assert any("3 independent runs for 2 parameters" in w for w in fit.warnings)
