"""Objectives: what a fit minimises, always a sum over runs.

Every objective is a multiple of a Huber function of the residual r, so that one set
of derivatives serves all of them:

    huber     sum Huber_delta(log L_fit - log L)      Hoffmann et al. 2022, equation 3
    lad       sum |log L_fit - log L|                 limit of Huber_delta / delta
    log-lsq   sum (log L_fit - log L)^2
    lsq       sum (L_fit - L)^2

with Huber_delta(r) = r^2 / 2 for |r| <= delta, else delta (|r| - delta / 2).
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError

OBJECTIVES = ("huber", "lad", "log-lsq", "lsq")


@dataclass(frozen=True)
class Objective:
    """A sum of losses of residuals; `delta` (in log loss) only matters to `huber`."""

    kind: str = "huber"
    delta: float = 1e-3

    def __post_init__(self) -> None:
        if self.kind not in OBJECTIVES:
            raise ScalingError(
                f"objective: {self.kind!r} is unknown; choose one of {', '.join(OBJECTIVES)}"
            )
        if not (self.delta > 0 and np.isfinite(self.delta)):
            raise ScalingError(f"delta: {self.delta} must be a positive number (of log loss)")

    @property
    def space(self) -> str:
        """Whether residuals are of the `log` loss or of the `raw` loss."""
        return "raw" if self.kind == "lsq" else "log"

    @property
    def formula(self) -> str:
        """The sum in words and symbols, for reports."""
        return {
            "huber": f"sum over runs of Huber_{self.delta:g}(log L_fit - log L)",
            "lad": "sum over runs of |log L_fit - log L|",
            "log-lsq": "sum over runs of (log L_fit - log L)^2",
            "lsq": "sum over runs of (L_fit - L)^2",
        }[self.kind]


def target_width(objective: Objective, scale: float) -> float:
    """Half-width of the quadratic zone at which the search ends.

    Exact for `huber` and least squares; least absolute deviation is approached to a
    millionth of the typical residual `scale` and then finished by linear programming.
    """
    if objective.kind == "huber":
        return objective.delta
    if objective.kind == "lad":
        return 1e-6 * max(scale, 1e-9)
    return np.inf


def losses(objective: Objective, residual: np.ndarray) -> np.ndarray:
    """The exact loss of each residual, elementwise; non-finite residuals give infinity."""
    with np.errstate(over="ignore", invalid="ignore"):
        if objective.kind == "huber":
            clipped = np.clip(residual, -objective.delta, objective.delta)
            value = clipped * (residual - 0.5 * clipped)
        elif objective.kind == "lad":
            value = np.abs(residual)
        else:
            value = residual * residual
    return np.where(np.isfinite(value), value, np.inf)


def multiplier(objective: Objective, width: float) -> float:
    """The factor that turns Huber_width into the objective's own scale."""
    if objective.kind == "huber":
        return 1.0
    if objective.kind == "lad":
        return 1.0 / width
    return 2.0


def log_partition(objective: Objective) -> Callable[[np.ndarray], np.ndarray]:
    """log of Z(s) = integral exp(-loss(r) / s) dr, the noise density that the objective implies.

    It makes any objective a likelihood with one scale s: Gaussian for least squares,
    Laplace for absolute deviation, Huber's density (Gaussian core, Laplace tails) between.
    """
    if objective.kind == "lad":
        return lambda s: np.log(2.0 * s)
    if objective.kind in ("log-lsq", "lsq"):
        return lambda s: 0.5 * np.log(np.pi * s)

    from scipy.special import erf

    delta = objective.delta

    def huber(s: np.ndarray) -> np.ndarray:
        core = np.sqrt(2 * np.pi * s) * erf(delta / np.sqrt(2 * s))
        tails = 2 * (s / delta) * np.exp(-(delta**2) / (2 * s))
        return np.log(core + tails)

    return huber


def log_likelihood(objective: Objective, total: np.ndarray, n: int) -> np.ndarray:
    """Greatest log-likelihood over the noise scale s, given objective values `total`.

    Args:
        objective: the loss of a residual.
        total: objective values, any shape; at least the smallest positive float.
        n: number of runs.
    """
    log_z = log_partition(objective)
    total = np.maximum(np.asarray(total, dtype=float), 1e-300)
    # The best s lies near total / n for heavy tails and 2 total / n for Gaussian ones.
    grid = np.exp(np.linspace(-8, 4, 1201))
    s = total[..., None] / n * grid
    return np.max(-total[..., None] / s - n * log_z(s), axis=-1)


def score_and_slope(
    objective: Objective, residual: np.ndarray, parameters: int
) -> tuple[np.ndarray, np.ndarray]:
    """Derivative of each residual's loss, and the derivative to expect of that, [n] each.

    The score of `huber` and `lad` jumps or bends, so that its expected slope is how densely
    residuals lie there. That is read off a normal kernel around each residual (Powell 1991),
    of the width of Silverman's normal reference rule.

    Args:
        objective: the loss of a residual.
        residual: at the optimum [n], not all 0.
        parameters: how many were fitted; so many residuals may be 0 for no other reason.
    """
    from scipy.special import ndtr

    if objective.kind in ("log-lsq", "lsq"):
        return 2 * residual, np.full(len(residual), 2.0)
    size = np.sort(np.abs(residual))
    typical = float(np.median(size[min(parameters, len(size) - 1) :])) / 0.6745
    spread = min(float(np.sqrt(np.mean(residual**2))), typical)
    width = objective.delta if objective.kind == "huber" else 0.02 * spread
    factor = multiplier(objective, width)
    kernel = 1.06 * spread * len(residual) ** -0.2
    slope = ndtr((width - residual) / kernel) - ndtr((-width - residual) / kernel)
    return factor * np.clip(residual, -width, width), factor * slope
