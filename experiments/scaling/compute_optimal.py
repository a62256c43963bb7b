"""The best size and tokens for a compute under a law, and the loss that they give."""

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.laws import Law


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
    law: Law, parameters: np.ndarray, log10_c: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Size N and tokens D of least loss at C = 6 N D.

    For `chinchilla` as `optimal_allocation`; `gadre` has one best ratio D / N = (b / a)^(1 / 2
    eta) at every compute.

    Args:
        law: of N and D.
        parameters: [P] or [R, P].
        log10_c: computes [m], or one a row [R, 1].

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
    with np.errstate(over="ignore"):
        return np.exp(k_n + a * log_c), np.exp(k_d + b * log_c)


def curve(law: Law, parameters: np.ndarray, log10_c: np.ndarray) -> np.ndarray:
    """A family's loss [R, m] at computes 10^log10_c [m], compute-optimal where N is free.

    NaN where exponents are not positive, so no optimum exists.
    """
    p = np.atleast_2d(parameters)
    with np.errstate(all="ignore"):
        x = {"compute": 10.0**log10_c}
        if "params" in law.inputs:
            x["params"], x["tokens"] = allocate(law, p, log10_c)
        loss = law.loss(p, x)
        if law.name == "broken":  # a loss that rises without end is no law
            loss = np.where((p[:, 2] + p[:, 3] > 0)[:, None], loss, np.nan)
        return loss
