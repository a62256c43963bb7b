"""Training FLOPs a token as a function of size, so that a best size is found at exact compute.

    C / D = 6 N (1 + excess N^-shrink)

A head and a mixer that N does not count make small models dearer than 6 N a token, and less so
the larger they are (an embedding that N counts makes them cheaper: a negative excess). Each
family has its own.
"""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.frame import RunFrame, compute, sizes


@dataclass(frozen=True)
class TrainingCost:
    """FLOPs a token; `worst` is how far any run is from it, as a fraction."""

    excess: float = 0.0
    shrink: float = 1.0
    worst: float = 0.0

    def log_per_token(self, log_n: np.ndarray) -> np.ndarray:
        """log C / D at log N, elementwise; NaN where the form gives nothing positive."""
        return np.log(6) + log_n + np.log(1 + self._share(log_n))

    def slope(self, log_n: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """First and second derivative of `log_per_token`."""
        w = self._share(log_n)
        return 1 - self.shrink * w / (1 + w), self.shrink**2 * w / (1 + w) ** 2

    def _share(self, log_n: np.ndarray) -> np.ndarray:
        return self.excess * np.exp(-self.shrink * log_n)


SIX = TrainingCost()
"""C = 6 N D."""
NEAR = 1e-3
"""Runs within this fraction of 6 N D are taken to be at it."""


def training_cost(frame: RunFrame, size: str, flops: str) -> TrainingCost:
    """The cost that fits the runs of one family best, by conventions as in `frame.resolve`.

    Least squares on log C / D: over the excess in closed form and by Newton's method, over the
    shrinkage on a grid from 0.02 to 2.
    """
    n = sizes(frame, size)
    log_n, target = np.log(n), np.log(compute(frame, flops) / frame.tokens / n / 6)
    if not np.isfinite(target).all() or np.abs(target).max() < NEAR:
        return SIX
    middle = log_n.mean()
    best, least = SIX, np.inf
    for shrink in np.linspace(0.02, 2.0, 100):
        z = np.exp(-shrink * (log_n - middle))
        share = float(z @ np.expm1(target) / (z @ z))
        with np.errstate(all="ignore"):
            for _ in range(20):
                residual, weight = np.log1p(share * z) - target, z / (1 + share * z)
                share -= float(weight @ residual / (weight @ weight))
            residual = np.log1p(share * z) - target
        total = float(residual @ residual)
        if np.isfinite(total) and total < least:
            excess = share * np.exp(shrink * middle)
            best = TrainingCost(float(excess), float(shrink), float(np.abs(residual).max()))
            least = total
    return best
