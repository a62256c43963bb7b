"""A positive quantity as a product of powers: y = c x_1^k_1 x_2^k_2 ..., with errors in log y.

Least squares in logs, which has a closed form and exact intervals (Student's t) where the errors
of log y are independent, normal and of one size. For learning rates and batch sizes over
parameters and tokens, N* over C, and the like; a law with a floor is `fit_law`'s.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError


@dataclass(frozen=True)
class PowerLaw:
    """A fitted product of powers.

    Attributes:
        inputs: names of the x.
        coefficients: (log c, k_1, k_2, ...).
        covariance: of the coefficients; NaN where there are no more rows than coefficients.
        residual: standard deviation of log y about the law; NaN as well.
        rows: that it was fitted to.
    """

    inputs: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray
    residual: float
    rows: int

    @property
    def constant(self) -> float:
        """c."""
        return math.exp(self.coefficients[0])

    def exponent(self, name: str) -> float:
        """Of one input."""
        return float(self.coefficients[1 + self.inputs.index(name)])

    def exponent_interval(self, name: str, level: float = 0.95) -> tuple[float, float]:
        """Interval of an exponent; NaN without spare rows."""
        direction = np.zeros(len(self.coefficients))
        direction[1 + self.inputs.index(name)] = 1.0
        return self._interval(direction, level)

    def at(self, **values: float) -> float:
        """y at a value of each input."""
        return math.exp(float(self.coefficients @ self._row(values)))

    def interval_at(self, level: float = 0.95, **values: float) -> tuple[float, float]:
        """Interval of the law at a value of each input (not of another observation)."""
        low, high = self._interval(self._row(values), level)
        return math.exp(low), math.exp(high)

    def _row(self, values: Mapping[str, float]) -> np.ndarray:
        return np.array([1.0, *(math.log(values[name]) for name in self.inputs)])

    def _interval(self, direction: np.ndarray, level: float) -> tuple[float, float]:
        from scipy.stats import t

        middle = float(self.coefficients @ direction)
        spare = self.rows - len(self.coefficients)
        if spare < 1:
            return math.nan, math.nan
        error = math.sqrt(float(direction @ self.covariance @ direction))
        half = float(t.ppf(0.5 + level / 2, spare)) * error
        return middle - half, middle + half


def fit_power_law(y: np.ndarray, inputs: Mapping[str, np.ndarray]) -> PowerLaw:
    """Fits y = c x_1^k_1 x_2^k_2 ... by least squares in logs.

    Args:
        y: [n], above zero.
        inputs: name -> [n], above zero.

    Raises:
        ScalingError: a value is not above zero, there are too few rows, or the inputs do not
            vary apart, so that their exponents cannot be told from each other.
    """
    columns = {"y": np.asarray(y, float)} | {k: np.asarray(v, float) for k, v in inputs.items()}
    for name, values in columns.items():
        if bad := [v for v in values.tolist() if not 0 < v < math.inf]:
            raise ScalingError(f"power law: {name} is {bad[0]:g} in a row: give values above 0")
    logs = {name: np.log(values) for name, values in columns.items()}
    target, names = logs.pop("y"), tuple(inputs)
    if len(target) < 1 + len(names):
        raise ScalingError(f"power law: {len(target)} rows for {1 + len(names)} numbers: give more")
    # About the means the columns are of one size, and the rank is that of what varies.
    varying = np.array([logs[name] for name in names]).reshape(len(names), -1).T
    means = varying.mean(axis=0)
    if np.linalg.matrix_rank(varying - means, tol=1e-6) < len(names):
        what = "do not vary apart" if len(names) > 1 else "does not vary"
        raise ScalingError(f"power law: {' and '.join(names)} {what} in {len(target)} rows: give "
                           "rows in which each input varies while the others stay")  # fmt: skip
    design = np.column_stack([np.ones(len(target)), varying - means])
    shift = np.eye(1 + len(names))
    shift[0, 1:] = -means
    centred = np.linalg.lstsq(design, target, rcond=None)[0]
    spare = len(target) - len(centred)
    residual = math.nan
    if spare:
        residual = float(np.linalg.norm(target - design @ centred)) / math.sqrt(spare)
    covariance = residual**2 * shift @ np.linalg.inv(design.T @ design) @ shift.T
    return PowerLaw(names, shift @ centred, covariance, residual, len(target))
