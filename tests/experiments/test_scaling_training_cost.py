"""The best size at exact compute, against scipy's minimiser and the counts of real models."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from mmfree_jax.experiments.scaling.compute_optimal import allocate, curve, local_exponents
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import make_frame
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.experiments.scaling.training_cost import SIX, TrainingCost, training_cost

LAW = LAWS["chinchilla"]
TRUTH = np.array([1.7, 400.0, 1500.0, 0.34, 0.36])
RESULTS = Path(__file__).parents[2] / "experiments" / "results"


@pytest.mark.parametrize(
    "cost", [TrainingCost(30.0, 0.3), TrainingCost(2e4, 0.7), TrainingCost(-40.0, 0.3), SIX]
)
def test_least_loss_is_another_minimisers(cost):
    log10_c = np.array([16.0, 18.0, 21.0, 25.0])
    n, d = (part[0] for part in allocate(LAW, TRUTH, log10_c, cost))
    best = curve(LAW, TRUTH, log10_c, cost)[0]
    for k, c in enumerate(10.0**log10_c):

        def loss(log_n, c=c):
            size = np.exp(log_n)
            per_token = 6 * size * (1 + cost.excess * size**-cost.shrink)
            return 1.7 + 400 * size**-0.34 + 1500 * (c / per_token) ** -0.36

        bounds = np.log(n[k]) - 1, np.log(n[k]) + 1
        other: Any = minimize_scalar(loss, bounds=bounds, method="bounded", options={"xatol": 1e-9})
        assert best[k] == pytest.approx(other.fun, rel=1e-12)
        assert np.log(n[k]) == pytest.approx(other.x, abs=1e-5)
        spent = 6 * n[k] * d[k] * (1 + cost.excess * n[k] ** -cost.shrink)
        assert spent == pytest.approx(c, rel=1e-9)
    step = 1e-4
    far = np.log([part[0] for part in allocate(LAW, TRUTH, log10_c + step, cost)])
    slopes = (far - np.log([n, d])) / (step * np.log(10))
    np.testing.assert_allclose(local_exponents(TRUTH, np.log(n), cost)[:, 0], slopes, rtol=1e-3)


def test_a_cost_is_recovered_and_six_recognised():
    n, d = np.geomspace(1e6, 1e9, 8), np.full(8, 1e10)
    exact = 6 * n * d * (1 + 900.0 * n**-0.5)
    got = training_cost(make_frame(params=n, tokens=d, flops=exact, loss=n), "total", "exact")
    assert got.excess * 1e7**-got.shrink == pytest.approx(900 * 1e7**-0.5, rel=1e-6)
    assert got.shrink == pytest.approx(0.5, abs=0.01)
    assert got.worst < 1e-6
    plain = make_frame(params=n, tokens=d, flops=6 * n * d * 1.0005, loss=n)
    assert training_cost(plain, "total", "exact") == SIX
    one = make_frame(params=1e7, tokens=1e9, flops=7.2e16, loss=[3.0])
    assert np.exp(training_cost(one, "total", "exact").log_per_token(np.log(1e7))) == (
        pytest.approx(7.2e7)
    )


@pytest.mark.parametrize("size", ["non-embedding", "total"])
@pytest.mark.parametrize("family", ["matmulfree", "transformer"])
def test_models_of_the_study_are_met(family, size):
    frame = read_runs([RESULTS / "study" / "results.csv"], where=[f"family = {family}"])
    assert training_cost(frame, size, "exact").worst < 0.03


def test_a_fit_has_the_cost_of_its_convention():
    n = np.geomspace(1e7, 1e9, 6)
    d = np.array([1e9, 3e9, 2e9, 8e9, 5e9, 9e9])
    loss = LAW.loss(TRUTH, {"params": n, "tokens": d})
    frame = make_frame(params=n, tokens=d, flops=6 * n * d * (1 + 900 * n**-0.5), loss=loss)
    quick = {"resamples": 0, "profile": False, "holdout": False, "restarts": 0}
    assert fit_law(frame, "gadre", **quick).cost.shrink == pytest.approx(0.5, abs=0.01)
    assert fit_law(frame, "gadre", flops="6nd", **quick).cost == SIX
    assert fit_law(frame, "power", **quick).cost == SIX
