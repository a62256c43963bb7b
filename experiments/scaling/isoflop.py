"""Compute-optimal sizes: approaches 1, 2 and 3 of Hoffmann et al. 2022 (section 3).

1. envelope: at each compute, which run's curve is lowest;
2. isoFLOP: at each budget, the minimum of a parabola of loss over log size;
3. parametric: closed form from a fitted `chinchilla` law.

Each gives N* ~ C^a and D* ~ C^b, fitted separately: a + b = 1 is a check, not an assumption.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.compute_optimal import optimal_allocation
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.frame import (
    RunFrame,
    compute,
    definitions,
    resolve,
    sizes,
    whole,
)
from mmfree_jax.experiments.scaling.identifiability import distinct
from mmfree_jax.experiments.scaling.uncertainty import (
    clusters_of,
    corrected_quantiles,
    resampling_weights,
)


@dataclass(frozen=True)
class Parabola:
    """Loss over log size at one budget.

    `status`: "minimum", or why the vertex is none: "maximum" (curves downward), "edge" (the
    lowest run or the vertex is at an end of the sizes tried), "few" (under three sizes).
    `params` and `tokens` are the fractional optima N*, D* (vertices over log N and log D).
    `curvature_t` is the curvature in its standard errors (NaN with three sizes).
    """

    compute: float
    runs: int
    sizes: int
    status: str
    params: float
    tokens: float
    loss: float
    curvature: float
    curvature_t: float
    coefficients: tuple[float, float, float]


@dataclass(frozen=True)
class Allocation:
    """Exponents of compute-optimal size and data, with draws for intervals.

    `n_coefficients` are (log k, a) of N* = k C^a, `d_coefficients` the same for D*; draws are
    their bootstrap refits [R, 4] in that order. `points` [m, 3] are (C, N*, D*), `runs` [n, 3]
    (budget index, N, loss) of approach 2. `definitions` say what N and C are.
    """

    approach: str
    definitions: dict[str, str]
    n_coefficients: tuple[float, float]
    d_coefficients: tuple[float, float]
    draws: np.ndarray
    level: float
    budgets: list[Parabola]
    budget_draws: np.ndarray
    points: np.ndarray
    runs: np.ndarray
    warnings: list[str]

    @property
    def exponents(self) -> dict[str, float]:
        """a, b and their sum."""
        a, b = self.n_coefficients[1], self.d_coefficients[1]
        return {"a": a, "b": b, "a_plus_b": a + b}

    @property
    def intervals(self) -> dict[str, tuple[float, float]]:
        """Bias-corrected intervals of `exponents`; empty with fewer than 20 draws."""
        if len(self.draws) < 20:
            return {}
        a, b = self.draws[:, 1], self.draws[:, 3]
        ends = corrected_quantiles(
            np.array(list(self.exponents.values())), np.stack([a, b, a + b], axis=1), self.level
        )
        return {k: (float(x), float(y)) for k, (x, y) in zip(self.exponents, ends.T, strict=True)}


def group_budgets(frame: RunFrame, c: np.ndarray, tolerance: float = 0.1) -> np.ndarray:
    """Budget index of each run: by the `budget` column, else by computes within a fraction."""
    if whole(frame, "budget"):
        return np.unique(frame.budget, return_inverse=True)[1]
    order = np.argsort(c)
    group = np.empty(len(c), int)
    group[order] = np.r_[0, np.cumsum(np.diff(np.log(c[order])) > np.log1p(tolerance))]
    return group


def _vertex(
    x: np.ndarray, y: np.ndarray, w: np.ndarray
) -> tuple[float, float, float, float, tuple[float, float, float]]:
    """Weighted parabola through y(x): (vertex, least value, curvature, its t, coefficients)."""
    centre, spread = x.mean(), max(np.ptp(x), 1e-12)
    z = (x - centre) / spread
    design = np.stack([np.ones_like(z), z, z * z], axis=1)
    root = np.sqrt(w)
    solution, *_ = np.linalg.lstsq(design * root[:, None], y * root, rcond=None)
    c0, c1, c2 = solution
    t = np.nan
    if w.sum() > 3:
        residual = y - design @ solution
        variance = (w * residual**2).sum() / (w.sum() - 3)
        covariance = np.linalg.pinv((design * w[:, None]).T @ design) * variance
        t = c2 / np.sqrt(max(covariance[2, 2], 1e-300))
    with np.errstate(divide="ignore", invalid="ignore"):
        at = np.clip(centre - spread * c1 / (2 * c2), -700, 700)
        least = c0 - c1**2 / (4 * c2)
    raw = (float(c0 - c1 * centre / spread + c2 * (centre / spread) ** 2),
           float(c1 / spread - 2 * c2 * centre / spread**2), float(c2 / spread**2))  # fmt: skip
    return at, least, c2 / spread**2, t, raw


def fit_parabola(
    n: np.ndarray, d: np.ndarray, c: np.ndarray, loss: np.ndarray, w: np.ndarray | None = None
) -> Parabola:
    """One budget's parabola over log N and over log D, checked."""
    w = np.ones_like(loss) if w is None else w
    use = w > 0
    count = distinct(n[use])
    middle = float(np.exp(np.average(np.log(c), weights=w)))
    empty = (np.nan, np.nan, np.nan)
    if count < 3:
        return Parabola(middle, int(use.sum()), count, "few", *empty, np.nan, np.nan, empty)
    x = np.log(n[use])
    at, least, curvature, t, raw = _vertex(x, loss[use], w[use])
    at_d, *_ = _vertex(np.log(d[use]), loss[use], w[use])
    # Mean loss at each size, so that one lucky seed does not decide which size is lowest.
    order = np.argsort(x)
    size = np.empty(len(x), int)
    size[order] = np.r_[0, np.cumsum(np.diff(x[order]) > 0.01)]
    mean = np.bincount(size, w[use] * loss[use]) / np.bincount(size, w[use])
    lowest = int(np.argmin(mean))
    if curvature <= 0:
        status = "maximum"
    elif not x.min() < at < x.max() or lowest in (0, size.max()):
        status = "edge"
    else:
        status = "minimum"
    return Parabola(middle, int(use.sum()), count, status, float(np.exp(at)), float(np.exp(at_d)),
                    float(least), float(curvature), float(t), raw)  # fmt: skip


def _line(x: np.ndarray, y: np.ndarray) -> tuple[float, float]:
    """Least-squares (intercept, slope)."""
    slope = np.cov(x, y, bias=True)[0, 1] / np.var(x)
    return float(y.mean() - slope * x.mean()), float(slope)


def isoflop(
    frame: RunFrame,
    *,
    size: str = "auto",
    flops: str = "auto",
    tolerance: float = 0.1,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Allocation:
    """Approach 2: a parabola a budget, then log N* and log D* over log C.

    C is the `budget` column where every run has one, unless `flops` names another convention;
    without budgets, computes within a fraction `tolerance` of each other are one.
    Only true minima enter the regression. The bootstrap draws runs within each budget; a
    resample keeps the budgets in which it still has a minimum.

    Raises:
        ScalingError: fewer than two budgets have a minimum.
    """
    size, flops = resolve([frame], size, flops, budgets=True)
    n, c = sizes(frame, size), compute(frame, flops)
    d, loss = frame.tokens, frame.loss
    group = group_budgets(frame, c, tolerance)
    rows = [np.flatnonzero(group == g) for g in range(group.max() + 1)]
    budgets = [fit_parabola(n[r], d[r], c[r], loss[r]) for r in rows]
    good = [i for i, p in enumerate(budgets) if p.status == "minimum"]
    warnings = list(frame.notes)
    reasons = {"maximum": "the parabola has a maximum", "edge": "the lowest loss is at an edge of "
               "the sizes tried", "few": "fewer than three sizes"}  # fmt: skip
    for p in budgets:
        if p.status != "minimum":
            warnings.append(f"budget {p.compute:.3g}: {reasons[p.status]}, so it has no optimum "
                            "and is left out")  # fmt: skip
        elif np.isfinite(p.curvature_t) and p.curvature_t < 2:
            warnings.append(f"budget {p.compute:.3g}: the curvature is {p.curvature_t:.1f} "
                            "standard errors from flat; N* is poorly determined")  # fmt: skip
        elif p.sizes == 3:
            warnings.append(f"budget {p.compute:.3g}: three sizes determine a parabola without any "
                            "test of it")  # fmt: skip
    if len(good) < 2:
        raise ScalingError(
            f"isoflop: {len(good)} of {len(budgets)} budgets have a minimum and two are needed; "
            + "; ".join(f"{p.compute:.3g}: {reasons.get(p.status, 'minimum')}" for p in budgets)
        )
    if len(good) == 2:
        warnings.append("two budgets: the exponents pass through both, so nothing tests them")
    log_c = np.log([budgets[i].compute for i in good])
    fitted_n = _line(log_c, np.log([budgets[i].params for i in good]))
    fitted_d = _line(log_c, np.log([budgets[i].tokens for i in good]))
    rng = np.random.default_rng(seed)
    draws, each = [], np.full((resamples, len(budgets), 2), np.nan)
    for k in range(resamples):
        for i in good:
            r = rows[i]
            w = rng.multinomial(len(r), np.full(len(r), 1 / len(r))).astype(float)
            p = fit_parabola(n[r], d[r], c[r], loss[r], w)
            if p.status == "minimum":
                each[k, i] = p.params, p.tokens
        kept = np.isfinite(each[k, :, 0])
        if kept.sum() >= 2:
            x = np.log([p.compute for p, keep in zip(budgets, kept, strict=True) if keep])
            if np.ptp(x) > 1e-6:
                draws.append((*_line(x, np.log(each[k, kept, 0])),
                              *_line(x, np.log(each[k, kept, 1]))))  # fmt: skip
    if resamples and len(draws) < 0.9 * resamples:
        warnings.append(f"{resamples - len(draws)} of {resamples} resamples kept fewer than two "
                        "minima and were left out")  # fmt: skip
    if len(draws) < 20:
        warnings.append("no intervals: fewer than 20 bootstrap refits")
    points = np.stack([np.exp(log_c), [budgets[i].params for i in good],
                       [budgets[i].tokens for i in good]], axis=1)  # fmt: skip
    runs = np.stack([group, n, loss], axis=1)
    return Allocation("isoflop", definitions(frame, size, flops), fitted_n, fitted_d,
                      np.array(draws).reshape(-1, 4), level, budgets, each, points, runs,
                      warnings)  # fmt: skip


def envelope(
    frame: RunFrame,
    *,
    size: str = "auto",
    flops: str = "auto",
    bins: int = 200,
    resamples: int = 1000,
    level: float = 0.95,
    seed: int = 0,
) -> Allocation:
    """Approach 1: the size on the lower envelope of all training curves at each compute.

    Needs several rows a run (`--points all`, or a `run` column). Where the smallest or the
    largest size holds the envelope, the true optimum may lie outside, so those bins do not
    count. The bootstrap draws whole runs.

    Raises:
        ScalingError: no run has two rows, or under ten bins have an inner optimum.
    """
    size, flops = resolve([frame], size, flops)
    n, c = sizes(frame, size), compute(frame, flops)
    runs = clusters_of(frame)
    curves = []
    for r in range(runs.max() + 1):
        rows = np.flatnonzero(runs == r)
        rows = rows[np.argsort(c[rows])]
        curves.append(rows)
    if max(map(len, curves)) < 2:
        raise ScalingError(
            "envelope: every run has one row; approach 1 needs training curves (several rows with "
            "the same --columns.run, or --points all)"
        )
    grid = np.linspace(np.log(c.min()), np.log(c.max()), bins)
    loss = np.full((len(curves), bins), np.inf)
    for k, rows in enumerate(curves):
        x = np.log(c[rows])
        inside = (grid >= x[0]) & (grid <= x[-1])
        loss[k, inside] = np.interp(grid[inside], x, frame.loss[rows])
    run_size = np.array([n[rows[0]] for rows in curves])
    # Tokens that a run of this size has seen at this compute: from its own rate of compute.
    rate = np.array([np.mean(c[rows] / frame.tokens[rows]) for rows in curves])
    edge = (run_size <= run_size.min() * 1.01) | (run_size >= run_size.max() * 0.99)

    def optimum(chosen: np.ndarray) -> tuple[Any, ...] | None:
        masked = np.where(chosen[:, None], loss, np.inf)
        best = np.argmin(masked, axis=0)
        good = np.isfinite(masked[best, np.arange(bins)]) & ~edge[best]
        if good.sum() < 10 or len(np.unique(run_size[best[good]])) < 2:
            return None
        x, size_, tokens = grid[good], run_size[best[good]], np.exp(grid[good]) / rate[best[good]]
        return _line(x, np.log(size_)), _line(x, np.log(tokens)), np.exp(x), size_, tokens

    full = optimum(np.ones(len(curves), bool))
    if full is None:
        raise ScalingError("envelope: fewer than ten computes, or a single size, have an optimum "
                           "inside the range of sizes; add larger and smaller runs")  # fmt: skip
    weights = resampling_weights(np.arange(len(curves)), resamples, np.random.default_rng(seed))
    draws = [(*d[0], *d[1]) for d in map(optimum, weights > 0) if d is not None]
    warnings = [*frame.notes, "points on a curve come before the learning rate has decayed, so the "
                "envelope overstates the loss of shorter runs"]  # fmt: skip
    if len(draws) < 20:
        warnings.append("no intervals: fewer than 20 bootstrap refits")
    points = np.stack(full[2:], axis=1)
    return Allocation("envelope", definitions(frame, size, flops), full[0], full[1],
                      np.array(draws).reshape(-1, 4), level, [], np.empty((0, 0, 2)), points,
                      np.empty((0, 3)), warnings)  # fmt: skip


def parametric(fit: Fit) -> Allocation:
    """Approach 3: the closed form from a `chinchilla` fit and its bootstrap."""
    if fit.law.name != "chinchilla":
        raise ScalingError(f"parametric: needs the law chinchilla, not {fit.law.name}")
    k_n, a, k_d, b = optimal_allocation(fit.vector())
    draws = np.empty((0, 4))
    warnings = list(fit.warnings)
    if fit.bootstrap is not None:
        draws = optimal_allocation(fit.bootstrap.parameters)
        good = np.isfinite(draws).all(1)
        if not good.all():
            warnings.append(f"{int((~good).sum())} refits have a non-positive exponent, hence no "
                            "optimal allocation")  # fmt: skip
        draws = draws[good]
    c = 6 * fit.inputs["params"] * fit.inputs["tokens"]
    if not fit.flops.startswith("6nd"):
        low, high = np.percentile(compute(fit.frame, fit.flops) / c, [0, 100])
        if not 0.98 < low <= high < 1.02:
            warnings.append(f"approach 3 is at C = 6 N D; the C of the runs is {low:.2f} to "
                            f"{high:.2f} times that")  # fmt: skip
    ladder = 10.0 ** np.arange(np.floor(np.log10(c.min())), np.ceil(np.log10(c.max())) + 3)
    points = np.stack([ladder, np.exp(k_n) * ladder**a, np.exp(k_d) * ladder**b], axis=1)
    fitted_n, fitted_d = (float(k_n), float(a)), (float(k_d), float(b))
    meaning = definitions(fit.frame, fit.size, fit.flops) | {"C": "6 N D"}
    return Allocation("parametric", meaning, fitted_n, fitted_d, draws, fit.level, [],
                      np.empty((0, 0, 2)), points, np.empty((0, 3)), warnings)  # fmt: skip
