"""Loss of models trained with few bits a weight (Kumar et al. 2024, arXiv 2411.04330).

    L = E + A / N_eff^alpha + B / D^beta,  N_eff = N (1 - exp(-bits / gamma))

Their law for quantised weights alone; activations and the cache of keys and values, which have
factors of their own there, are taken to stay as they are.
"""

from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling.effective_models import (
    Effective,
    EffectiveTerm,
    effective_model,
)
from mmfree_jax.experiments.scaling.models import Inputs, Model

PARAMETERS = ("E", "A", "B", "alpha", "beta", "gamma")
_GAMMA = 5


def effective_params(params: np.ndarray, bits: np.ndarray, gamma: np.ndarray) -> np.ndarray:
    """N_eff: how many parameters of full precision `params` of `bits` bits are worth."""
    return params * -np.expm1(-bits / gamma)


def loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    """The formula: parameters [..., 6], inputs `params`, `tokens` and `bits` [n]."""
    e, a, b, alpha, beta, gamma = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    n = effective_params(x["params"], x["bits"], gamma)
    return e + a * n**-alpha + b * x["tokens"] ** -beta


def build(x: Inputs) -> Model:
    """The law bound to runs."""
    log_n, log_d, bits = np.log(x["params"]), np.log(x["tokens"]), x["bits"]

    def size(natural: np.ndarray) -> Effective:
        ratio = bits * np.exp(-natural[:, _GAMMA, None])
        decay = np.exp(-ratio)
        left = -np.expm1(-ratio)
        first = -ratio * decay / left
        second = first * (ratio - 1.0 - first)
        return Effective(log_n + np.log(left), {_GAMMA: first}, {(_GAMMA, _GAMMA): second})

    def data(natural: np.ndarray) -> Effective:
        return Effective(np.broadcast_to(log_d, (len(natural), len(log_d))))

    terms = [EffectiveTerm(1, 3, x["params"], size), EffectiveTerm(2, 4, x["tokens"], data)]
    return effective_model(0, terms, len(bits), (True, True, True, False, False, True))


def starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    """540 starts: floors, shares of size and data, exponents, and gammas about the bits tried."""
    low, middle = float(np.exp(y.min())), float(np.exp(np.median(y)))
    at_n, at_d = np.median(np.log(x["params"])), np.median(np.log(x["tokens"]))
    rows = []
    for floor, share, alpha, beta, gamma in product(
        (0.1, 0.5, 0.8, 0.95, 0.99), (0.2, 0.5, 0.8), (0.2, 0.4, 0.8), (0.2, 0.4, 0.8),
        np.array([0.2, 0.5, 1.0, 2.0]) * np.median(x["bits"]),
    ):  # fmt: skip
        rest = np.log(middle - floor * low)
        a = np.log(share) + rest + alpha * at_n
        b = np.log(1 - share) + rest + beta * at_d
        rows.append([np.log(floor * low), a, b, alpha, beta, np.log(gamma)])
    return model.from_natural(np.array(rows))
