"""Which runs to choose so that a quantity is known best: optimal designs within a budget.

Candidates are given with what they would tell and what they cost. Where a candidate may be taken
in part, the best design is the least of a convex function, found by Frank and Wolfe's method with
a bound that proves it; rounded to whole runs it is made better by exchange (Fedorov 1972).

Shapes: n candidates, r rows of information a candidate (a run each, or all 0), P coordinates.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import linprog, minimize_scalar

from mmfree_jax.experiments.scaling.errors import ScalingError

_RIDGE = 1e-9  # of the information of an average candidate, so that a few runs can be compared
_CLOSE = 1e-3  # of the criterion: where the relaxed search and the exchanges end
_MOST_STEPS = 100  # of the relaxed search
_ROUNDED_UP = 0.7  # from 0.3 of a run on it is taken whole, while the limits leave room


@dataclass(frozen=True)
class Candidates:
    """Runs, or pairs of runs, that a design may contain.

    Attributes:
        rows: gradients of log loss by the coordinates, over the noise [n, r, P].
        cost: of each, in FLOPs [n].
        runs: how many each is [n].
    """

    rows: np.ndarray
    cost: np.ndarray
    runs: np.ndarray

    def __len__(self) -> int:
        return len(self.cost)

    def information(self, counts: np.ndarray) -> np.ndarray:
        """Fisher information [P, P] of a design that has each candidate so many times [n]."""
        rows = self.rows * np.sqrt(counts)[:, None, None]
        return np.einsum("nrp,nrq->pq", rows, rows)


@dataclass(frozen=True)
class Limits:
    """What a design may cost (FLOPs), its runs, and how often it may have a candidate."""

    cost: float
    runs: int
    repeats: int = 1


@dataclass(frozen=True)
class Design:
    """A set of candidates.

    Attributes:
        counts: how often each is taken [n], integers.
        criterion: what was minimised: the variance of the quantity, or without one the geometric
            mean of the variances along the axes of the confidence ellipsoid.
        bound: no set within the limits has a criterion below this.
    """

    counts: np.ndarray
    criterion: float
    bound: float


def criterion_of(information: np.ndarray, gradient: np.ndarray | None) -> float:
    """Variance of the quantity with that gradient [P]; without one det(information)^(-1/P).

    Infinite where the information is singular. Coordinates without any, of a family that is not
    run, are no matter if the quantity does not depend on them.
    """
    told = np.diag(information) > 0
    if not told.all() and (gradient is None or np.any(gradient[~told] != 0)):
        return np.inf
    scale = np.sqrt(np.diag(information)[told])
    standard = information[np.ix_(told, told)] / np.outer(scale, scale)
    if np.linalg.cond(standard) > 1e14:
        return np.inf
    if gradient is None:
        _, log_det = np.linalg.slogdet(standard)
        return float(np.exp(-(log_det + 2 * np.log(scale).sum()) / len(scale)))
    c = gradient[told] / scale
    return float(c @ np.linalg.solve(standard, c))


def best_design(candidates: Candidates, gradient: np.ndarray | None, limits: Limits) -> Design:
    """The best set found, and a bound on all sets.

    Args:
        candidates: what may be chosen.
        gradient: of the quantity whose variance counts [P]; None for all parameters together
            (D-optimality).
        limits: what the set may be.

    Raises:
        ScalingError: no set within the limits determines the parameters.
    """
    # Coordinates in which the candidates have unit information on average.
    whole = candidates.information(np.full(len(candidates), 1 / len(candidates)))
    scale = np.sqrt(np.diag(whole))
    values, vectors = np.linalg.eigh(whole / np.outer(scale, scale))
    if not values[0] > 1e-13 * values[-1]:
        raise ScalingError("design: the candidates do not determine every parameter; raise the "
                           "budget, or allow more sizes or more tokens a parameter")  # fmt: skip
    whiten = vectors / np.sqrt(values) / scale[:, None]
    white = Candidates(candidates.rows @ whiten, candidates.cost, candidates.runs)
    problem = _Problem(white, None if gradient is None else gradient @ whiten, limits)
    weights, bound = _relaxed(problem)
    counts = _exchanged(problem, _rounded(problem, weights))
    reached = criterion_of(candidates.information(counts), gradient)
    if not np.isfinite(reached):
        raise ScalingError(f"design: {limits.runs} runs of {limits.cost:.3g} FLOPs leave "
                           "parameters open; raise the budget or the runs")  # fmt: skip
    return Design(counts, reached, reached * bound / problem.value(counts))


@dataclass(frozen=True)
class _Problem:
    """Candidates in coordinates of unit information, what is to be known of them, the limits."""

    candidates: Candidates
    gradient: np.ndarray | None
    limits: Limits

    def inverse(self, counts: np.ndarray) -> np.ndarray:
        """Inverse of the information of a design, [P, P]."""
        information = self.candidates.information(counts)
        return np.linalg.inv(information + _RIDGE * np.eye(len(information)))

    def value(self, counts: np.ndarray) -> float:
        """The criterion of a design, in these coordinates."""
        return self._value(self.inverse(counts))

    def _value(self, inverse: np.ndarray) -> float:
        if self.gradient is None:
            return float(np.exp(np.linalg.slogdet(inverse)[1] / len(inverse)))
        return float(self.gradient @ inverse @ self.gradient)

    def with_each(self, counts: np.ndarray) -> np.ndarray:
        """The criterion with one more of each candidate [n]."""
        inverse, rows = self.inverse(counts), self.candidates.rows
        through = rows @ inverse
        small = np.eye(rows.shape[1]) + through @ rows.transpose(0, 2, 1)  # [n, r, r]
        if self.gradient is None:
            return self._value(inverse) * np.exp(-np.linalg.slogdet(small)[1] / len(inverse))
        seen = through @ self.gradient  # [n, r]
        fewer = np.einsum("nr,nr->n", seen, np.linalg.solve(small, seen[..., None])[..., 0])
        return self._value(inverse) - fewer

    def may_add(self, counts: np.ndarray) -> np.ndarray:
        """Which candidates the limits leave room for [n]."""
        cost = self.limits.cost * (1 + 1e-12) - counts @ self.candidates.cost
        runs = self.limits.runs - counts @ self.candidates.runs
        fits = (self.candidates.cost <= cost) & (self.candidates.runs <= runs)
        return fits & (counts < self.limits.repeats)

    def best_vertex(self, counts: np.ndarray) -> tuple[np.ndarray, float]:
        """The design that the criterion's gradient at `counts` points to, and a bound.

        For a quantity c and any v, c' M^-1 c >= (c' v)^2 / v' M v; for all parameters and any W,
        det(M)^(-1/P) >= P det(W)^(1/P) / trace(W M). The denominators are sums over a design's
        candidates, and their greatest values within the limits are linear programmes.
        """
        inverse, rows = self.inverse(counts), self.candidates.rows
        if self.gradient is None:
            weight = np.einsum("nrp,pq,nrq->n", rows, inverse, rows)
            numerator = len(inverse) * self._value(inverse)
        else:
            v = inverse @ self.gradient
            weight = np.sum((rows @ v) ** 2, axis=1)
            numerator = float(self.gradient @ v) ** 2
        limits, greatest = self.limits, weight.max()
        found = linprog(
            -weight / greatest,
            A_ub=np.stack([self.candidates.cost / limits.cost, self.candidates.runs / limits.runs]),
            b_ub=np.ones(2), bounds=(0, limits.repeats),
        )  # fmt: skip
        return found.x, numerator / (-found.fun * greatest)


def _relaxed(problem: _Problem) -> tuple[np.ndarray, float]:
    """How much of each candidate is best [n] where parts may be taken; a bound on all designs."""
    candidates, limits = problem.candidates, problem.limits
    share = min(limits.cost / candidates.cost.sum(), limits.runs / candidates.runs.sum())
    counts, bound = np.full(len(candidates), min(share, float(limits.repeats))), 0.0
    for _ in range(_MOST_STEPS):
        vertex, below = problem.best_vertex(counts)
        bound = max(bound, below)
        if bound > problem.value(counts) * (1 - _CLOSE):
            break
        way = vertex - counts
        step: Any = minimize_scalar(
            lambda t, at=counts, way=way: problem.value(at + t * way),
            bounds=(0, 1), method="bounded", options={"xatol": 1e-4},
        )  # fmt: skip
        counts = counts + step.x * way
    return counts, bound


def _rounded(problem: _Problem, weights: np.ndarray) -> np.ndarray:
    """Whole candidates within the limits [n], those of most weight first."""
    counts = np.zeros(len(weights))
    for i in np.argsort(-weights, kind="stable"):
        for _ in range(int(weights[i] + _ROUNDED_UP)):
            counts[i] += problem.may_add(counts)[i]
    return counts


def _exchanged(problem: _Problem, counts: np.ndarray) -> np.ndarray:
    """A design made better as long as one candidate less, and the best ones that then fit, gain."""
    counts = _filled(problem, counts)
    while True:
        value = problem.value(counts)
        tried = []
        for i in np.flatnonzero(counts):
            fewer = counts.copy()
            fewer[i] -= 1
            tried.append(_filled(problem, fewer))
        best = min(tried, key=problem.value, default=counts)
        if not problem.value(best) < value * (1 - _CLOSE):
            return counts
        counts = best


def _filled(problem: _Problem, counts: np.ndarray) -> np.ndarray:
    """A design with what gains most, one after the other, while the limits leave room."""
    counts = counts.copy()
    while (allowed := problem.may_add(counts)).any():
        counts[int(np.argmin(np.where(allowed, problem.with_each(counts), np.inf)))] += 1
    return counts
