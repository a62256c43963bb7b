"""The loss that a law gives at a compute, with the best size and tokens for it."""

import numpy as np

from mmfree_jax.experiments.scaling.laws import Law


def curve(law: Law, parameters: np.ndarray, log10_c: np.ndarray) -> np.ndarray:
    """A family's loss [R, m] at computes 10^log10_c [m], compute-optimal where N is free.

    For `chinchilla`, N* = G (C / 6)^(beta / (alpha + beta)) with G = (alpha A / beta B)^(1 /
    (alpha + beta)) (Hoffmann et al., equation 4); for `gadre` the best ratio gives
    L = E + 2 sqrt(a b) C^-eta. NaN where exponents are not positive, so no optimum exists.
    """
    p = np.atleast_2d(parameters)
    c = 10.0**log10_c
    with np.errstate(all="ignore"):
        if law.name == "chinchilla":
            e, a, b, alpha, beta = p.T[:, :, None]
            g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
            n = g * (c / 6) ** (beta / (alpha + beta))
            loss = e + a * n**-alpha + b * (c / 6 / n) ** -beta
            return np.where((alpha > 0) & (beta > 0), loss, np.nan)
        if law.name == "gadre":
            e, a, b, eta = p.T[:, :, None]
            return np.where(eta > 0, e + 2 * np.sqrt(a * b) * c**-eta, np.nan)
        loss = law.loss(p, {"compute": c})
        if law.name == "broken":  # a loss that rises without end is no law
            loss = np.where((p[:, 2] + p[:, 3] > 0)[:, None], loss, np.nan)
        return loss
