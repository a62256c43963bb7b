"""How far arrays are from what they should be."""

from typing import Any

import numpy as np


def relative_rms(got: Any, expected: Any) -> float:
    """RMS of the difference, as a share of what is expected; NaN where one of them holds any."""
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-30)
