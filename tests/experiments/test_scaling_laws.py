"""Laws: the formula, its fast evaluation, and analytic derivatives against differences."""

import numpy as np
import pytest
from synthetic_runs import isoflop_design

from mmfree_jax.experiments.scaling.descent import exact, huber_oracle
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.laws import LAWS, get_law
from mmfree_jax.experiments.scaling.objectives import OBJECTIVES, Objective, log_likelihood
from mmfree_jax.experiments.scaling.search import search

TRUTH = {
    "chinchilla": (1.7, 400.0, 1500.0, 0.34, 0.36),
    "power": (30.0, 0.06),
    "power-floor": (1.7, 4000.0, 0.19),
    "line": (9.68, -0.351),
    "gadre": (1.7, 900.0, 3000.0, 0.18),
    "broken": (1.5, 900.0, 0.15, 0.08, 1e20),
    "precision": (1.7, 400.0, 1500.0, 0.34, 0.36, 2.5),
    "repeated": (1.87, 521.0, 1488.0, 0.36, 0.35, 15.0, 5.0),
    "accuracy": (0.85, 2.6, 0.2),
}


def design(n=17, seed=0):
    rng = np.random.default_rng(seed)
    params, tokens = 10 ** rng.uniform(7, 10, n), 10 ** rng.uniform(8.5, 11, n)
    return {
        "params": params, "tokens": tokens, "compute": 6 * params * tokens * 1.3,
        "bits": rng.choice([1.58, 3, 4, 6, 16], n), "loss": rng.uniform(2, 3.5, n),
        "unique_tokens": tokens / rng.choice([0.5, 1, 3, 40], n), "chance": np.full(n, 0.25),
    }  # fmt: skip


@pytest.mark.parametrize("name", LAWS)
def test_model_is_the_formula_and_parameters_round_trip(name):
    law, x = LAWS[name], design()
    model = law.build(x)
    truth = np.array(TRUTH[name])
    point = model.from_parameters(truth)
    np.testing.assert_allclose(model.to_parameters(point), truth, rtol=1e-9)
    value = model.evaluate(point[None]).value[0]
    loss = np.exp(value) if model.space == "log" else value
    np.testing.assert_allclose(loss, law.loss(truth, x), rtol=1e-9)


@pytest.mark.parametrize("width", [np.inf, 0.05])
@pytest.mark.parametrize("space", ["log", "raw"])
@pytest.mark.parametrize("name", LAWS)
def test_gradient_and_hessian_match_differences(name, space, width):
    law, x = LAWS[name], design()
    rng = np.random.default_rng(1)
    truth = np.array(TRUTH[name])
    log_loss = np.log(law.loss(truth, x)) + 0.1 * rng.standard_normal(17)
    model = law.build(x)
    weights = rng.integers(0, 3, (1, 17)).astype(float)
    oracle = huber_oracle(model, space, log_loss, width, 1.7, weights)
    point = model.from_parameters(truth) + 0.02 * rng.standard_normal(len(truth))
    row = np.zeros(1, int)
    _, gradient, hessian = (part[0] for part in oracle(point[None], row))
    step = 1e-6
    for j in range(len(truth)):
        up, down = point.copy(), point.copy()
        up[j] += step
        down[j] -= step
        (f1, g1, _), (f0, g0, _) = oracle(up[None], row), oracle(down[None], row)
        scale = np.abs(gradient).max()
        assert (f1 - f0)[0] / (2 * step) == pytest.approx(gradient[j], abs=1e-6 * scale)
        np.testing.assert_allclose(
            (g1 - g0)[0] / (2 * step), hessian[j], atol=2e-6 * np.abs(hessian).max()
        )


@pytest.mark.parametrize("name", LAWS)
def test_exact_data_give_the_truth_back(name):
    law = LAWS[name]
    params, tokens, _ = isoflop_design(10.0 ** np.linspace(17, 22, 7), 6)
    x = design(len(params)) | {"params": params, "tokens": tokens, "compute": 6 * params * tokens}
    x["unique_tokens"] = tokens / np.tile([0.5, 1, 3, 20, 40, 100], 7)
    truth = np.array(TRUTH[name])
    y = np.log(law.loss(truth, x))
    found = search(law, x, y, Objective("lsq" if name in ("line", "accuracy") else "huber"))
    got = law.build(x).to_parameters(found.point)
    np.testing.assert_allclose(got, truth, rtol=1e-4 if name == "broken" else 1e-6)


def test_huber_objective_is_scipys():
    from scipy.special import huber, logsumexp

    law, x = LAWS["chinchilla"], design(40)
    e, a, b, alpha, beta = TRUTH["chinchilla"]
    y = np.log(law.loss(np.array(TRUTH["chinchilla"]), x))
    y += 0.02 * np.random.default_rng(3).standard_t(2, 40)
    log_fit = logsumexp(
        np.stack([
            np.full(40, np.log(e)),
            np.log(a) - alpha * np.log(x["params"]),
            np.log(b) - beta * np.log(x["tokens"]),
        ]),
        axis=0,
    )  # fmt: skip
    model = law.build(x)
    point = model.from_parameters(np.array(TRUTH["chinchilla"]))[None]
    ours = exact(model, Objective("huber", 1e-3), y, point)[0]
    assert ours == pytest.approx(huber(1e-3, log_fit - y).sum(), rel=1e-12)
    assert exact(model, Objective("lad"), y, point)[0] == pytest.approx(np.abs(log_fit - y).sum())


def test_hoffmann_grid():
    law, x = LAWS["chinchilla"], design()
    model = law.build(x)
    natural = model.to_natural(law.starts(model, x, np.zeros(17)))
    assert natural.shape == (4500, 5)
    assert len(np.unique(natural.round(9), axis=0)) == 4500
    np.testing.assert_allclose(natural.min(0), [-1, 0, 0, 0, 0], atol=1e-9)
    np.testing.assert_allclose(natural.max(0), [1, 25, 25, 2, 2], atol=1e-9)


@pytest.mark.parametrize("kind", OBJECTIVES)
def test_likelihood_density_integrates_to_one(kind):
    from mmfree_jax.experiments.scaling.objectives import log_partition, losses

    objective = Objective(kind, 0.3)
    r = np.linspace(-400, 400, 4_000_001)
    s = 0.7
    mass = np.trapezoid(np.exp(-losses(objective, r) / s), r)
    assert np.exp(log_partition(objective)(np.array(s))) == pytest.approx(mass, rel=1e-5)


def test_gaussian_likelihood_is_the_textbook_one():
    n, total = 30, 0.4
    value = log_likelihood(Objective("log-lsq"), np.array([total]), n)[0]
    variance = total / n
    assert value == pytest.approx(-n / 2 * (np.log(2 * np.pi * variance) + 1), abs=1e-3)


def test_unknown_names_are_one_line_errors():
    with pytest.raises(ScalingError, match="law: 'cubic' is unknown; choose one of chinchilla"):
        get_law("cubic")
    with pytest.raises(ScalingError, match="objective: 'l3' is unknown"):
        Objective("l3")
    with pytest.raises(ScalingError, match="delta: 0 must be a positive number"):
        Objective("huber", 0)
