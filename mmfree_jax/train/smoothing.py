"""Smoothing a metric for the eye."""

import math
from collections.abc import Sequence

import numpy as np


def smooth(values: Sequence[float] | np.ndarray, weight: float) -> np.ndarray:
    """Exponential average over as many values before as after, so that the curve does not lag.

    A neighbour k values away counts `weight`**k, and the sum is divided by that of its weights:
    nothing pulls the curve to 0, and a straight line stays as it is. Near the start, where a loss
    falls fastest, only the values in the nearer half of the way there count: the curve starts at
    the first value. At the end it is the average of the last values, since there is none after.

    A value that is NaN or infinite is left out of its neighbours' averages.

    Args:
      values: in order of time.
      weight: of the next neighbour, in [0, 1); 0 returns the values.

    Returns:
      The averages, float64 [len(values)]; NaN where the value is not finite.
    """
    values = np.asarray(values, float)
    result = np.full(len(values), np.nan)
    finite = np.isfinite(values)
    kept = values[finite]
    total, weights, n = kept.copy(), np.ones(len(kept)), len(kept)
    # Beyond this neighbours count less than 1/10,000.
    reach = math.ceil(math.log(1e-4) / math.log(weight)) if weight else 0
    for k in range(1, min(reach, (n - 1) // 2) + 1):
        total[2 * k :] += weight**k * kept[k : n - k]
        weights[2 * k :] += weight**k
        total[2 * k : n - k] += weight**k * kept[3 * k :]
        weights[2 * k : n - k] += weight**k
    result[finite] = total / weights
    return result


def recent_average(values: Sequence[float] | np.ndarray, weight: float) -> float:
    """Exponential average that ends at the last of finite values, debiased.

    Args:
      values: in order of time; at least one.
      weight: of a value to that of the next, in [0, 1).
    """
    weights = weight ** np.arange(len(values))[::-1]
    return float(np.average(values, weights=weights))
