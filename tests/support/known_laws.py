"""Laws of known parameters, written out, and fits that are made up of them."""

import numpy as np
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from mmfree_jax.experiments.scaling.fitted_law import FittedLaw
from mmfree_jax.experiments.scaling.laws import LAWS

FLOAT = (1.7, 400.0, 1500.0, 0.34, 0.36)
TERNARY = (1.7, 520.0, 1800.0, 0.34, 0.36)
GADRE = (1.8, 900.0, 3000.0, 0.18)
N, D, C = 2e9, 5e10, 3e21


def chinchilla(p, n, d):
    e, a, b, alpha, beta = p
    return e + a / n**alpha + b / d**beta


def gadre(p, n, d):
    e, a, b, eta = p
    return e + (a * (d / n) ** eta + b * (n / d) ** eta) / (6 * n * d) ** eta


def best(formula, p, c):
    """Size and loss of least loss at C = 6 N D, by search."""
    found = minimize_scalar(lambda x: formula(p, np.exp(x), c / 6 / np.exp(x)),
                            bounds=(np.log(1e5), np.log(1e15)), method="bounded",
                            options={"xatol": 1e-10})  # fmt: skip
    return np.exp(found.x), found.fun


def interval_of(value, refits, level=0.95):
    """Efron's bias-corrected percentiles."""
    z = np.clip(norm.ppf(np.mean(np.array(refits) < value)), -0.75, 0.75)
    return np.quantile(refits, norm.cdf(2 * z + norm.ppf([(1 - level) / 2, (1 + level) / 2])))


def law(p, *, name="chinchilla", source="one", family="float", refits=400, spread=0.01, seed=0):
    """A fitted law at known parameters, its refits scattered around them."""
    rng = np.random.default_rng(seed)
    p = np.array(p)
    scattered = p * np.exp(spread * rng.standard_normal((refits, len(p))))
    return FittedLaw(
        family=family, source=source, law=LAWS[name], parameters=p, resamples=scattered,
        log_residuals=0.01 * rng.standard_normal(200),
        ranges={"params": (1e8, 1e9), "tokens": (1e9, 1e11), "6nd": (6e17, 6e20),
                "tokens_per_param": (1.0, 1000.0)},
        conventions={"params": "total", "flops": "6nd"},
        definitions={"N": "all parameters", "C": "6 N D"}, level=0.95,
    )  # fmt: skip
