"""Powers between columns: a best rate ~ N^a D^b, a best size ~ C^a, a best batch ~ D^b.

    log y = log k + a_1 log x_1 + a_2 log x_2 + ...

by least squares on log y, with Student's intervals: exact for noise that is normal in log y and
alike in all rows, however few these are. The y of each row is an optimum, given or found first
(`best_of`) as the minimum of a parabola of the loss over log y.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.identifiability import distinct
from mmfree_jax.experiments.scaling.isoflop import fit_parabola

CORRELATED = 0.98


@dataclass(frozen=True)
class Estimate:
    """A value of y at given x, its interval, and the interval of one further y (None: unknown)."""

    at: dict[str, float]
    value: float
    interval: tuple[float, float] | None
    further: tuple[float, float] | None


@dataclass(frozen=True)
class PowerRelation:
    """A fitted y = k x_1^a_1 x_2^a_2 ...

    Attributes:
        y, x: names of the columns.
        coefficients: log k and the exponents, at x = 1 [1 + X].
        covariance: of the coefficients, [1 + X, 1 + X]; NaN where nothing is left over.
        residual: standard deviation of log y about the fit; degrees: of freedom.
        columns: the rows that were fitted, name -> [n].
        level: of the intervals.
        warnings: what a reader must know before using a number.
    """

    y: str
    x: tuple[str, ...]
    coefficients: np.ndarray
    covariance: np.ndarray
    residual: float
    degrees: int
    columns: Mapping[str, np.ndarray]
    level: float
    warnings: list[str] = field(default_factory=list)

    @property
    def formula(self) -> str:
        """Such as `learning_rate = k params^a tokens^b`."""
        return f"{self.y} = k " + " ".join(
            f"{x}^{letter}" for x, letter in zip(self.x, "abcdefgh", strict=False)
        )

    @property
    def exponents(self) -> dict[str, float]:
        """Column of x -> its exponent."""
        return dict(zip(self.x, map(float, self.coefficients[1:]), strict=True))

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Column of x -> Student's interval of its exponent; empty without degrees of freedom."""
        if not self.degrees:
            return {}
        half = self._quantile() * np.sqrt(np.diag(self.covariance)[1:])
        ends = zip(self.coefficients[1:] - half, self.coefficients[1:] + half, strict=True)
        return {x: (float(a), float(b)) for x, (a, b) in zip(self.x, ends, strict=True)}

    def at(self, values: Mapping[str, float]) -> Estimate:
        """The fitted y at a value of every x, with its intervals."""
        row = np.array([1.0, *(np.log(values[x]) for x in self.x)])
        middle = float(row @ self.coefficients)
        if not self.degrees:
            return Estimate(dict(values), float(np.exp(middle)), None, None)
        variance = float(row @ self.covariance @ row)

        def ends(width: float) -> tuple[float, float]:
            half = self._quantile() * np.sqrt(width)
            return float(np.exp(middle - half)), float(np.exp(middle + half))

        return Estimate(dict(values), float(np.exp(middle)), ends(variance),
                        ends(variance + self.residual**2))  # fmt: skip

    def centre(self) -> dict[str, float]:
        """The geometric mean of every x."""
        return {x: float(np.exp(np.log(self.columns[x]).mean())) for x in self.x}

    def _quantile(self) -> float:
        from scipy.stats import t

        return float(t.ppf(0.5 + self.level / 2, self.degrees))


def fit_power(
    columns: Mapping[str, np.ndarray], y: str, x: Sequence[str], *, level: float = 0.95
) -> PowerRelation:
    """Fit y = k times powers of the columns x.

    Args:
        columns: name -> positive numbers [n].
        y, x: names of the columns.
        level: of the intervals.

    Raises:
        ScalingError: too few rows, or an x that does not vary or follows from the others.
    """
    n = len(columns[y])
    if n < len(x) + 1:
        raise ScalingError(f"rows: {n} cannot determine the {len(x) + 1} coefficients of a power "
                           f"of {', '.join(x)}; give more")  # fmt: skip
    logs = np.stack([np.log(columns[name]) for name in x], axis=1)
    mean = logs.mean(0)
    design = np.column_stack([np.ones(n), logs - mean])
    for j, name in enumerate(x):
        others = np.delete(design, 1 + j, axis=1)
        left = design[:, 1 + j] - others @ np.linalg.lstsq(others, design[:, 1 + j], rcond=None)[0]
        if np.sqrt((left**2).mean()) < 1e-6:
            why = "does not vary" if len(x) == 1 else "does not vary apart from the others"
            raise ScalingError(f"x: {name!r} {why}, so it has no exponent; leave it out or give "
                               "rows that differ in it alone")  # fmt: skip
    inverse = np.linalg.inv(design.T @ design)
    log_y = np.log(columns[y])
    centred = inverse @ design.T @ log_y
    degrees = n - len(x) - 1
    residual = float(np.sqrt(((log_y - design @ centred) ** 2).sum() / degrees)) if degrees else 0.0
    back = np.eye(len(x) + 1)  # from the intercept at the mean to the one at x = 1
    back[0, 1:] = -mean
    covariance = back @ inverse @ back.T * (residual**2 if degrees else np.nan)
    return PowerRelation(
        y, tuple(x), back @ centred, covariance, residual, degrees, columns, level,
        _warnings(logs, x, n, degrees),
    )  # fmt: skip


def _warnings(logs: np.ndarray, x: Sequence[str], n: int, degrees: int) -> list[str]:
    out = []
    if not degrees:
        out.append(f"{n} rows for {len(x) + 1} coefficients: the fit passes through every one, so "
                   "nothing tests it and there are no intervals")  # fmt: skip
    elif degrees < 3:
        out.append(f"{n} rows for {len(x) + 1} coefficients is few: intervals rest on {degrees} "
                   "degrees of freedom")  # fmt: skip
    for j, name in enumerate(x):
        if distinct(np.exp(logs[:, j])) == 2:
            out.append(f"two distinct values of {name}: nothing tests that it is a power")
        for k in range(j):
            r = float(np.corrcoef(logs[:, j], logs[:, k])[0, 1])
            if abs(r) > CORRELATED:
                out.append(f"log {x[k]} and log {name} correlate at {r:.3f}: their exponents can "
                           "hardly be told apart")  # fmt: skip
    return out


def best_of(
    columns: Mapping[str, np.ndarray], y: str, x: Sequence[str], loss: str
) -> tuple[dict[str, np.ndarray], list[str]]:
    """The best y at every combination of x: the minimum of a parabola of the loss over log y.

    Returns:
        the columns y and x with a row for each combination that has a minimum, and a warning for
        each that has none or whose curvature is within two standard errors of flat.

    Raises:
        ScalingError: no combination has a minimum.
    """
    keys = np.stack([columns[name] for name in x], axis=1)
    cells, group = np.unique(keys, axis=0, return_inverse=True)
    reasons = {"maximum": "the loss has a maximum over it", "edge": "the lowest loss is at an edge "
               "of what was tried", "few": "fewer than three values were tried"}  # fmt: skip
    rows, warnings = [], []
    for k, cell in enumerate(cells):
        here = group.reshape(-1) == k
        tried = columns[y][here]
        best = fit_parabola(tried, tried, np.ones(len(tried)), columns[loss][here])
        place = ", ".join(f"{name} {value:.4g}" for name, value in zip(x, cell, strict=True))
        if best.status != "minimum":
            warnings.append(f"{place}: no best {y}, since {reasons[best.status]}; left out")
            continue
        if np.isfinite(best.curvature_t) and best.curvature_t < 2:
            warnings.append(f"{place}: the loss over {y} is {best.curvature_t:.1f} standard errors "
                            "from flat, so its best is poorly determined")  # fmt: skip
        rows.append([best.params, *cell])
    if not rows:
        raise ScalingError(f"best: none of {len(cells)} combinations of {', '.join(x)} has a best "
                           f"{y}; {warnings[0]}")  # fmt: skip
    return dict(zip((y, *x), np.array(rows).T, strict=True)), warnings
