"""The search finds the optimum of the stated objective: nothing scipy tries is lower."""

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.special import huber
from synthetic_runs import draw_runs, isoflop_design

from mmfree_jax.experiments.scaling.descent import refit, typical_residual
from mmfree_jax.experiments.scaling.laws import LAWS
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.search import search
from mmfree_jax.experiments.scaling.trust_region import step

TRUTH = {"E": 1.82, "A": 482.0, "B": 2085.0, "alpha": 0.348, "beta": 0.366}


def runs(seed, n_sizes=6, budgets=6, noise=0.006, tail=0.15, ties=False):
    """Runs like those read off a published figure: heavy tails, sometimes quantised."""
    grid = 10 ** np.linspace(18.8, 21.5, budgets)
    params, tokens, _ = isoflop_design(grid, n_sizes, spread=5)
    rng = np.random.default_rng(seed)
    params = params * np.exp(0.3 * rng.standard_normal(len(params)))
    frame = draw_runs("chinchilla", TRUTH, params, tokens, noise=noise, tail=tail, seed=seed)
    loss = np.exp(np.round(np.log(frame.loss) / 0.005) * 0.005) if ties else frame.loss
    return {"params": params, "tokens": tokens}, np.log(loss)


def scipy_objective(kind, delta, x, y):
    n, d = np.log(x["params"]), np.log(x["tokens"])

    def value_and_gradient(theta):
        e, a, b, alpha, beta = theta
        terms = np.stack([np.full_like(n, e), a - alpha * n, b - beta * d])
        log_fit = np.logaddexp.reduce(terms)
        share = np.exp(terms - log_fit)
        r = log_fit - y
        if kind == "huber":
            value, force = huber(delta, r).sum(), np.clip(r, -delta, delta)
        elif kind == "log-lsq":
            value, force = (r**2).sum(), 2 * r
        elif kind == "lad":
            value, force = np.abs(r).sum(), np.sign(r)
        else:
            miss = np.exp(log_fit) - np.exp(y)
            value, force = (miss**2).sum(), 2 * miss * np.exp(log_fit)
        rows = np.stack([share[0], share[1], share[2], -share[1] * n, -share[2] * d])
        return value, rows @ force

    return value_and_gradient


def scipy_best(kind, delta, x, y, near, starts, seed):
    """The lowest of many BFGS and Nelder-Mead runs: random grid starts, and around `near`."""
    f = scipy_objective(kind, delta, x, y)
    rng = np.random.default_rng(seed)
    best = np.inf
    for k in range(starts):
        if k % 2:
            theta = near + rng.standard_normal(5) * [0.05, 0.6, 0.6, 0.03, 0.03]
        else:
            theta = np.array([rng.uniform(-1, 1), *rng.uniform(0, 25, 2), *rng.uniform(0, 2, 2)])
        with np.errstate(all="ignore"):
            for _ in range(3):  # BFGS gives up at kinks: restart it where it stopped
                theta = minimize(f, theta, jac=True, method="BFGS").x
            best = min(best, f(theta)[0])
    end = minimize(lambda t: f(t)[0], near, method="Nelder-Mead",
                   options={"maxiter": 3000, "xatol": 1e-12, "fatol": 1e-16})  # fmt: skip
    return min(best, end.fun)


CASES = [
    (seed, kind, delta, ties)
    for seed in range(3)
    for kind, delta, ties in [
        ("huber", 1e-3, False), ("huber", 1e-3, True), ("huber", 1e-5, False),
        ("huber", 0.1, False), ("log-lsq", 1.0, False), ("lsq", 1.0, False), ("lad", 1.0, False),
    ]
    if seed == 0 or (kind, delta) == ("huber", 1e-3)
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "kind", "delta", "ties"), CASES)
def test_scipy_finds_nothing_lower(seed, kind, delta, ties):
    x, y = runs(seed, ties=ties)
    found = search(LAWS["chinchilla"], x, y, Objective(kind, delta))
    model = LAWS["chinchilla"].build(x)
    theta = model.to_natural(found.point)
    value = scipy_objective(kind, delta, x, y)(theta)[0]
    assert value == pytest.approx(found.objective, rel=1e-9)
    lowest = scipy_best(kind, delta, x, y, theta, starts=12, seed=seed)
    assert found.objective <= lowest * (1 + 1e-9)
    if kind != "lad":
        assert found.slope < 1e-9 * max(found.objective, 1e-4)


# Fits to Chinchilla's runs: of Hoffmann et al. (2022, equation 10) and of Besiroglu et al. (2024).
PUBLISHED = {
    "hoffmann": {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28},
    "besiroglu": {"E": 1.8172, "A": 482.01, "B": 2085.43, "alpha": 0.3478, "beta": 0.3658},
}


def lbfgs_best(x, y, starts):
    """The lowest of L-BFGS from each start, as Hoffmann et al. fitted theirs."""
    f = scipy_objective("huber", 1e-3, x, y)
    with np.errstate(all="ignore"):
        return min(minimize(f, start, jac=True, method="L-BFGS-B").fun for start in starts)


@pytest.mark.slow
@pytest.mark.parametrize("name", PUBLISHED)
def test_chinchilla_like_runs_are_fitted_as_low_as_from_the_truth_and_from_a_grid(name):
    """Nine budgets of 27 runs, as many as were read off Chinchilla's figure."""
    truth = PUBLISHED[name]
    params, tokens, _ = isoflop_design(10 ** np.linspace(18.8, 21.5, 9), 27, spread=10)
    frame = draw_runs("chinchilla", truth, params, tokens, noise=0.004, tail=0.05, seed=1)
    x, y = {"params": params, "tokens": tokens}, np.log(frame.loss)
    found = search(LAWS["chinchilla"], x, y, Objective("huber", 1e-3))
    model = LAWS["chinchilla"].build(x)
    value = scipy_objective("huber", 1e-3, x, y)(model.to_natural(found.point))[0]
    assert value == pytest.approx(found.objective, rel=1e-9)

    at_truth = [[*np.log([truth[k] for k in "EAB"]), truth["alpha"], truth["beta"]]]
    grid = np.stack(np.meshgrid(
        [0.5], [0.0, 6.0, 20.0], [0.0, 6.0, 20.0], [0.1, 0.6], [0.1, 0.6], indexing="ij",
    ), axis=-1).reshape(-1, 5)  # fmt: skip
    assert found.objective <= lbfgs_best(x, y, at_truth) * (1 + 1e-9)
    assert found.objective <= lbfgs_best(x, y, grid) * (1 + 1e-9)
    fitted = dict(zip(LAWS["chinchilla"].parameters, model.to_parameters(found.point), strict=True))
    for key, tolerance in (("E", 0.03), ("alpha", 0.06), ("beta", 0.06)):
        assert fitted[key] == pytest.approx(truth[key], rel=tolerance), key


@pytest.fixture(scope="module")
def huber_fit():
    x, y = runs(5)
    return x, y, search(LAWS["chinchilla"], x, y, Objective("huber"))


def test_gradient_vanishes_at_the_optimum(huber_fit):
    found = huber_fit[2]
    assert found.slope < 1e-9 * max(found.objective, 1e-4)
    assert found.starts == 4500
    assert 450 < found.starts_at_best <= 4500


def test_least_absolute_deviation_ends_on_a_vertex():
    x, y = runs(6)
    model = LAWS["chinchilla"].build(x)
    found = search(LAWS["chinchilla"], x, y, Objective("lad"))
    residual = np.abs(model.evaluate(found.point[None]).value[0] - y)
    assert np.sum(residual < 1e-9) >= 5  # five parameters: five runs are met exactly
    assert found.slope < 1e-9  # no linear programme promises a decrease
    assert found.starts_at_best > 450


def test_a_term_that_the_data_do_not_have_is_set_to_nothing():
    """A pure power law read as one with a floor: descent in log E alone stops on its way to 0."""
    c = 10 ** np.linspace(18, 21, 12)
    x = {"compute": c}
    y = (
        np.log(30 * c**-0.05)
        + 0.002 * np.cos(7 * np.arange(12.0))
        - 3e-3 * np.log(c / c[6]) ** 2 / 10
    )
    law = LAWS["power-floor"]
    found = search(law, x, y, Objective("log-lsq"))
    floor, _, gamma = law.build(x).to_parameters(found.point)
    assert floor < 1e-15
    fit = np.polyfit(np.log(c), y, 1)
    assert gamma == pytest.approx(-fit[0], rel=1e-9)
    assert found.objective == pytest.approx(
        np.sum((np.polyval(fit, np.log(c)) - y) ** 2), rel=1e-12
    )
    # Refits start from a point with a floor as well: from nothing it could not come back.
    floors = law.build(x).to_parameters(found.optima)[:, 0]
    assert floors.max() > 0.1 * np.exp(y.min())


def test_units_do_not_matter(huber_fit):
    x, y, one = huber_fit
    millions = {k: v / 1e6 for k, v in x.items()}
    two = search(LAWS["chinchilla"], millions, y, Objective("huber"))
    assert two.objective == pytest.approx(one.objective, rel=1e-10)


def test_a_dead_term_does_not_stop_the_search():
    """No data term at all: the optimum sends it away, and the rest is still right."""
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(18, 21, 5), 6)
    x = {"params": params, "tokens": tokens}
    y = np.log(1.8 + 400 * params**-0.34)
    found = search(LAWS["chinchilla"], x, y, Objective("huber"))
    assert found.objective < 1e-12
    parameters = LAWS["chinchilla"].build(x).to_parameters(found.point)
    assert parameters[3] == pytest.approx(0.34, rel=1e-3)


def test_warm_started_refits_are_as_low_as_full_searches(huber_fit):
    x, y, found = huber_fit
    law, objective = LAWS["chinchilla"], Objective("huber")
    model = law.build(x)
    rng = np.random.default_rng(0)
    weights = rng.multinomial(len(y), np.full(len(y), 1 / len(y)), size=2).astype(float)
    scale = typical_residual(model, objective, y, found.point)
    _, values = refit(model, objective, y, weights, found.optima, scale=scale)
    for w, value in zip(weights, values, strict=True):
        rows = np.repeat(np.arange(len(y)), w.astype(int))
        full = search(law, {k: v[rows] for k, v in x.items()}, y[rows], objective, restarts=0)
        assert value <= full.objective * (1 + 1e-3)


def test_trust_region_step_is_the_minimum_in_the_ball():
    rng = np.random.default_rng(0)
    g = rng.standard_normal((200, 4))
    h = rng.standard_normal((200, 4, 4))
    h = h + h.transpose(0, 2, 1)
    radius = rng.uniform(0.05, 2, 200)
    s, decrease, _ = step(g, h, radius)
    assert np.all(np.linalg.norm(s, axis=1) <= radius * (1 + 1e-9))
    sphere = rng.standard_normal((200, 4000, 4))
    sphere *= (radius[:, None] * rng.random((200, 4000)) ** 0.25 / np.linalg.norm(sphere, axis=2))[
        ..., None
    ]
    tried = np.einsum("sp,skp->sk", g, sphere)
    tried += 0.5 * np.einsum("skp,spq,skq->sk", sphere, h, sphere)
    assert np.all(-decrease <= tried.min(1) + 0.03 * np.abs(decrease))
