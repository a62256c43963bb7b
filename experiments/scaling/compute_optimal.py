"""The best size and tokens for a compute under a law, and the loss that they give."""

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.training_cost import SIX, TrainingCost


def optimal_allocation(parameters: np.ndarray) -> np.ndarray:
    """(log k_N, a, log k_D, b) of N* = k_N C^a and D* = k_D C^b, [..., 4], at C = 6 N D.

    From chinchilla's (E, A, B, alpha, beta) [..., 5]: a = beta / (alpha + beta), b = alpha /
    (alpha + beta), G = (alpha A / beta B)^(1 / (alpha + beta)). NaN unless both exponents are
    positive.
    """
    _, a_, b_, alpha, beta = np.moveaxis(np.asarray(parameters, dtype=float), -1, 0)
    with np.errstate(all="ignore"):
        total = alpha + beta
        log_g = (np.log(alpha * a_) - np.log(beta * b_)) / total
        a, b = beta / total, alpha / total
        out = np.stack([log_g - a * np.log(6), a, -log_g - b * np.log(6), b], axis=-1)
        return np.where(((alpha > 0) & (beta > 0))[..., None], out, np.nan)


def allocate(
    law: Law, parameters: np.ndarray, log10_c: np.ndarray, cost: TrainingCost = SIX
) -> tuple[np.ndarray, np.ndarray]:
    """Size N and tokens D of least loss at a compute.

    For `chinchilla` at C = 6 N D as `optimal_allocation`, at another cost by Newton's method from
    there; `gadre` has one best ratio D / N = (b / a)^(1 / 2 eta)
    at every compute.

    Args:
        law: of N and D.
        parameters: [P] or [R, P].
        log10_c: computes [m], or one a row [R, 1].
        cost: FLOPs a token, by which C is the family's own and not 6 N D.

    Returns:
        N, D: [R, m]; NaN where exponents are not positive, so that no optimum exists.

    Raises:
        ScalingError: the law has no size or no best size.
    """
    p = np.atleast_2d(parameters)
    if law.name == "chinchilla":
        k_n, a, k_d, b = optimal_allocation(p).T[:, :, None]
    elif law.name == "gadre":
        with np.errstate(all="ignore"):
            _, over, under, eta = p.T[:, :, None]
            half = np.where(eta > 0, np.log(under / over) / (4 * eta), np.nan)
        k_n, a, k_d, b = -half - 0.5 * np.log(6), 0.5, half - 0.5 * np.log(6), 0.5
    else:
        raise ScalingError(f"law: {law.name} ({law.formula}) has no best size for a compute; fit "
                           "chinchilla or gadre")  # fmt: skip
    log_c = np.log(10) * log10_c
    log_n, log_d = k_n + a * log_c, k_d + b * log_c
    with np.errstate(all="ignore"):
        if cost != SIX and law.name == "chinchilla":
            log_n = _stationary(p, log_n, log_c, cost)
            log_d = log_c - cost.log_per_token(log_n)
        return np.exp(log_n), np.exp(log_d)


def local_exponents(parameters: np.ndarray, log_n: np.ndarray, cost: TrainingCost) -> np.ndarray:
    """a and b of N* ~ C^a, D* ~ C^b [2, R, m] around best sizes [R, m] of the law chinchilla.

    At 6 N D the same everywhere: beta / (alpha + beta) and alpha / (alpha + beta).
    """
    p = np.atleast_2d(parameters)
    alpha, beta = p.T[3:, :, None]
    slope, bend = cost.slope(np.atleast_2d(log_n))
    a = beta / (alpha + beta * slope + bend / slope)
    return np.stack([a, 1 - slope * a])


def _stationary(
    p: np.ndarray, log_n: np.ndarray, log_c: np.ndarray, cost: TrainingCost
) -> np.ndarray:
    """log N [R, m] at which A / N^alpha + B / D^beta is least with D = C / cost(N).

    There alpha A / N^alpha = beta B / D^beta times the slope of log cost: Newton's method on the
    logarithm of both sides, which is monotone, from the optimum at 6 N D.
    """
    _, a, b, alpha, beta = p.T[:, :, None]
    sides = np.log(alpha * a) - np.log(beta * b)
    for _ in range(30):
        slope, bend = cost.slope(log_n)
        excess = sides - alpha * log_n - np.log(slope)
        excess = excess - beta * (cost.log_per_token(log_n) - log_c)
        step = np.clip(excess / (alpha + beta * slope + bend / slope), -2.0, 2.0)
        log_n = log_n + step
        if not np.any(np.abs(step) > 1e-10):
            break
    return log_n


def curve(
    law: Law, parameters: np.ndarray, log10_c: np.ndarray, cost: TrainingCost = SIX
) -> np.ndarray:
    """A family's loss [R, m] at computes 10^log10_c [m], compute-optimal where N is free.

    `gadre` has C among its inputs, so that its least loss is the same at any cost. NaN where
    exponents are not positive, so no optimum exists.
    """
    p = np.atleast_2d(parameters)
    with np.errstate(all="ignore"):
        x = {"compute": 10.0**log10_c}
        if "params" in law.inputs:
            x["params"], x["tokens"] = allocate(law, p, log10_c, cost)
        loss = law.loss(p, x)
        if law.name == "broken":  # a loss that rises without end is no law
            loss = np.where((p[:, 2] + p[:, 3] > 0)[:, None], loss, np.nan)
        return loss
