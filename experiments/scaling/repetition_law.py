"""Loss of models that see their data several times (Muennighoff et al. 2023, arXiv 2305.16264).

    L = E + A / N'^alpha + B / D'^beta
    D' = U_D + U_D R*_D (1 - exp(-R_D / R*_D)),  R_D = D / U_D - 1
    N' = U_N + U_N R*_N (1 - exp(-R_N / R*_N)),  R_N = N / U_N - 1

U_D are the unique tokens (at most D). U_N is the size that is compute-optimal for them at
C = 6 N D (at most N): U_N^alpha = alpha A / (beta B) U_D^beta. Repeated tokens, and parameters in
excess of what the unique tokens deserve, count for less and less.
"""

from itertools import product

import numpy as np

from mmfree_jax.experiments.scaling.effective_models import (
    Effective,
    EffectiveTerm,
    effective_model,
)
from mmfree_jax.experiments.scaling.models import Inputs, Model

PARAMETERS = ("E", "A", "B", "alpha", "beta", "R_D", "R_N")
_A, _B, _ALPHA, _BETA, _R_D, _R_N = range(1, 7)


def effective_count(whole: np.ndarray, unique: np.ndarray, worth: np.ndarray) -> np.ndarray:
    """D' of D tokens of which U are unique, or N' of N parameters of which U are deserved.

    Args:
        whole, unique: counts; unique ones beyond the whole are the whole.
        worth: R*, how many repetitions it takes until new ones are worth 1/e.
    """
    unique = np.minimum(whole, unique)
    return unique * (1 - worth * np.expm1(-(whole / unique - 1) / worth))


def deserved_params(p: np.ndarray, unique_tokens: np.ndarray) -> np.ndarray:
    """The compute-optimal size for unique tokens [n], at parameters [..., 7]."""
    _, a, b, alpha, beta, *_ = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    return (alpha * a / (beta * b) * unique_tokens**beta) ** (1 / alpha)


def loss(p: np.ndarray, x: Inputs) -> np.ndarray:
    """The formula: parameters [..., 7], inputs `params`, `tokens` and `unique_tokens` [n]."""
    e, a, b, alpha, beta, r_d, r_n = np.moveaxis(np.asarray(p)[..., None], -2, 0)
    unique = np.minimum(x["unique_tokens"], x["tokens"])
    d = effective_count(x["tokens"], unique, r_d)
    n = effective_count(x["params"], deserved_params(p, unique), r_n)
    return e + a * n**-alpha + b * d**-beta


def build(x: Inputs) -> Model:
    """The law bound to runs."""
    log_n, log_d = np.log(x["params"]), np.log(x["tokens"])
    log_u = np.minimum(np.log(x["unique_tokens"]), log_d)

    def data(natural: np.ndarray) -> Effective:
        h = _diminishing(log_d, log_u, natural[:, _R_D, None])
        return Effective(h.value, {_R_D: h.first[1]}, {(_R_D, _R_D): h.second[1, 1]})

    def size(natural: np.ndarray) -> Effective:
        a, b, alpha, beta, _, worth = (natural[:, j, None] for j in range(1, 7))
        s = (np.log(alpha) + a - np.log(beta) - b + beta * log_u) / alpha
        one = np.ones_like(s)
        d_alpha, d_beta = (1 / alpha - s) / alpha, (log_u - 1 / beta) / alpha
        slope = {_A: one / alpha, _B: -one / alpha, _ALPHA: d_alpha, _BETA: d_beta}
        bend = {
            (_A, _ALPHA): -one / alpha**2, (_B, _ALPHA): one / alpha**2,
            (_ALPHA, _ALPHA): -(1 / alpha**2 + 2 * d_alpha) / alpha,
            (_ALPHA, _BETA): -d_beta / alpha, (_BETA, _BETA): 1 / (alpha * beta**2) * one,
        }  # fmt: skip
        h = _diminishing(log_n, s, worth)
        first = {j: h.first[0] * d for j, d in slope.items()} | {_R_N: h.first[1]}
        second = {(i, j): h.second[0, 0] * slope[i] * slope[j]
                  for i in slope for j in slope if i <= j}  # fmt: skip
        for pair, d in bend.items():
            second[pair] = second[pair] + h.first[0] * d
        second |= {(j, _R_N): h.second[0, 1] * d for j, d in slope.items()}
        second[_R_N, _R_N] = h.second[1, 1]
        return Effective(h.value, first, second)

    terms = [
        EffectiveTerm(_A, _ALPHA, x["params"], size),
        EffectiveTerm(_B, _BETA, x["tokens"], data),
    ]
    return effective_model(0, terms, len(log_n), (True, True, True, False, False, True, True))


def _diminishing(log_whole: np.ndarray, log_unique: np.ndarray, log_worth: np.ndarray) -> Effective:
    """log of `effective_count`, with derivatives by (0) log unique and (1) log worth."""
    worth = np.exp(np.clip(log_worth, -30.0, 30.0))  # beyond, nothing changes but overflows
    ratio = np.exp(np.clip(log_whole - log_unique, 0.0, 300.0))
    x = (ratio - 1) / worth
    decay, lost = np.exp(-x), -np.expm1(-x)
    y = 1 + worth * lost
    y_s, y_w = -ratio * decay, worth * (lost - x * decay)
    y_ss = ratio * decay * (1 - ratio / worth)
    y_sw, y_ww = -ratio * x * decay, y_w - worth * x * x * decay
    f_s, f_w = y_s / y, y_w / y
    repeated = log_whole > log_unique
    zero = np.zeros_like(y)
    value = np.where(repeated, log_unique + np.log(y), log_whole)
    first = {0: np.where(repeated, 1 + f_s, zero), 1: np.where(repeated, f_w, zero)}
    second = {
        (0, 0): np.where(repeated, y_ss / y - f_s**2, zero),
        (0, 1): np.where(repeated, y_sw / y - f_s * f_w, zero),
        (1, 1): np.where(repeated, y_ww / y - f_w**2, zero),
    }
    return Effective(value, first, second)


def starts(model: Model, x: Inputs, y: np.ndarray) -> np.ndarray:
    """1,215 starts: floors, shares of size and data, exponents, and worths of repetition."""
    low, middle = float(np.exp(y.min())), float(np.exp(np.median(y)))
    at_n, at_d = np.median(np.log(x["params"])), np.median(np.log(x["tokens"]))
    rows = []
    for floor, share, alpha, beta, r_d, r_n in product(
        (0.1, 0.5, 0.8, 0.95, 0.99), (0.2, 0.5, 0.8), (0.2, 0.4, 0.8), (0.2, 0.4, 0.8),
        (1.0, 5.0, 20.0), (1.0, 5.0, 20.0),
    ):  # fmt: skip
        rest = np.log(middle - floor * low)
        a = np.log(share) + rest + alpha * at_n
        b = np.log(1 - share) + rest + beta * at_d
        rows.append([np.log(floor * low), a, b, alpha, beta, np.log(r_d), np.log(r_n)])
    return model.from_natural(np.array(rows))
