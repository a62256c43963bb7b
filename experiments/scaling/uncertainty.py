"""How sure a fit is: bootstrap over runs, profile likelihood, leave-one-size-out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfree_jax.experiments.scaling.descent import (
    exact,
    follow,
    huber_oracle,
    lower,
    refit,
    widths_to,
)
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.models import Model
from mmfree_jax.experiments.scaling.objectives import Objective, log_likelihood
from mmfree_jax.experiments.scaling.search import Search

Interval = tuple[float | None, float | None]


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled runs: standardised points [R, P], parameters [R, P], objectives [R]."""

    kind: str
    points: np.ndarray
    parameters: np.ndarray
    objectives: np.ndarray
    asked: int
    clusters: int
    warnings: list[str] = field(default_factory=list)


def clusters_of(frame: RunFrame) -> np.ndarray:
    """Which rows are resampled together: those of one named run; each unnamed row alone."""
    names = [f"{f}/{r}" if r else f"row {i}"
             for i, (f, r) in enumerate(zip(frame.family, frame.run, strict=True))]  # fmt: skip
    return np.unique(names, return_inverse=True)[1]


def resampling_weights(clusters: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """How often each row occurs in each of `count` resamples of whole clusters, [count, n]."""
    groups = int(clusters.max()) + 1
    drawn = rng.multinomial(groups, np.full(groups, 1 / groups), size=count)
    return drawn[:, clusters].astype(float)


def bootstrap(
    frame: RunFrame,
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    found: Search,
    scale: float,
    *,
    count: int,
    kind: str = "runs",
    seed: int = 0,
    strata: np.ndarray | None = None,
    need: int | None = None,
) -> Bootstrap:
    """Refit `count` resamples, warm-started from the best few distinct optima of the full data.

    `runs` draws runs with replacement; resamples with fewer distinct runs than parameters
    determine nothing and are left out (counted in the warnings). `noise` keeps every run and
    redraws its loss from a normal distribution with its own `loss_sd`. The rows of one of the
    `strata` [n] are drawn among themselves, and `need` parameters are to be determined in each.
    """
    rng = np.random.default_rng(seed)
    size, n = model.matrix.shape[0], len(log_loss)
    least = size if need is None else need
    warnings: list[str] = []
    clusters = clusters_of(frame)
    strata = np.zeros(n, int) if strata is None else strata
    independent = [len(np.unique(clusters[strata == s])) for s in np.unique(strata)]
    groups = sum(independent)
    target = log_loss
    if kind == "noise":
        if not np.all(np.isfinite(frame.loss_sd)):
            raise ScalingError("resample: 'noise' needs the standard error of every loss; name its "
                               "column with --columns.loss-sd")  # fmt: skip
        noisy = frame.loss + frame.loss_sd * rng.standard_normal((count, n))
        target = np.log(np.maximum(noisy, 1e-3 * frame.loss))
        weights = np.ones((count, n))
    elif kind == "runs":
        weights, enough = np.zeros((count, n)), np.ones(count, bool)
        for s in np.unique(strata):
            rows = strata == s
            own = np.unique(clusters[rows], return_inverse=True)[1]
            weights[:, rows] = resampling_weights(own, count, rng)
            enough &= (weights[:, rows] > 0).sum(1) >= least + 1
        if min(independent) <= least + 1:
            warnings.append(
                f"{min(independent)} independent runs for {least} parameters: resampling runs says "
                "next to nothing about the uncertainty"
            )
        if not enough.all():
            warnings.append(f"{int((~enough).sum())} of {count} resamples had at most {least} "
                            "distinct runs and were left out")  # fmt: skip
        weights = weights[enough]
    else:
        raise ScalingError(f"resample: {kind!r} is unknown; choose runs or noise")
    if not len(weights):
        empty = np.empty((0, size))
        return Bootstrap(kind, empty, empty, np.empty(0), count, groups, warnings)
    points, values = refit(model, objective, target, weights, found.optima, scale=scale)
    parameters = model.to_parameters(points)
    good = np.isfinite(points).all(1) & np.isfinite(values)
    if not good.all():
        warnings.append(f"{int((~good).sum())} refits diverged and were left out")
    return Bootstrap(kind, points[good], parameters[good], values[good], count, groups, warnings)


def percentile_intervals(
    names: Sequence[str], draws: np.ndarray, level: float
) -> dict[str, Interval]:
    """Equal-tailed percentile intervals of draws [R, P]."""
    tail = 50 * (1 - level)
    low, high = np.percentile(draws, [tail, 100 - tail], axis=0)
    return {name: (float(low[j]), float(high[j])) for j, name in enumerate(names)}


@dataclass(frozen=True)
class Profile:
    """A profile likelihood: fixed values [m], log-likelihood below the maximum [m], interval.

    An end of the interval is None where the profile stays above the threshold as far as it
    was followed: the data do not bound the parameter on that side.
    """

    values: np.ndarray
    drop: np.ndarray
    interval: Interval


def profile_intervals(
    law: Law,
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    found: Search,
    scale: float,
    level: float,
    spread: np.ndarray | None,
    steps: int = 24,
    reach: float = 5.0,
) -> dict[str, Profile]:
    """Fix one parameter at a time, refit the others, and keep what the data do not reject.

    The objective is read as the likelihood whose noise density is exp(-loss / s), s profiled
    out as well; the interval holds values whose log-likelihood is within chi2_1(level) / 2 of
    the maximum. It follows each parameter to `reach` standard errors on both sides.
    """
    from scipy.stats import chi2

    size, n = len(found.point), len(log_loss)
    covariance = _covariance(model, objective, log_loss, found, scale, spread)
    directions, fixed, slopes, rowsets = [], [], [], []
    for j in range(size):
        row = model.matrix[j]
        deviation = np.sqrt(max(row @ covariance @ row, 1e-18))
        side = reach * (np.arange(1, steps + 1) / steps) ** 1.5
        values = row @ found.point + np.r_[-side[::-1], side] * deviation
        floor = np.log(np.linspace(0.02, 1.0, steps)) + log_loss.min() - model.offset[j]
        if law.parameters[j] == law.floor and values[steps - 1] < floor[0] - 4:
            values[steps:] = floor  # it vanished: what matters is the way up from nothing
        for value in values:
            directions.append(_others(row))
            fixed.append(value)
            slopes.append(covariance @ row / deviation**2)  # how the others move along
            rowsets.append(row)
    # From every known optimum: where one has lost a term, another knows the fit with it.
    points, totals = None, None
    for optimum in found.optima:
        away = np.array(fixed) - np.array(rowsets) @ optimum
        end = follow(model, objective, log_loss, optimum + np.array(slopes) * away[:, None],
                     widths_to(objective, scale), directions=np.array(directions),
                     tolerance=1e-12, scale=scale).points  # fmt: skip
        reached = exact(model, objective, log_loss, end)
        if points is None or totals is None:
            points, totals = end, reached
        else:
            points, totals = lower(points, totals, end, reached)
    assert points is not None
    assert totals is not None
    best = log_likelihood(objective, np.array([found.objective]), n)[0]
    drop = best - log_likelihood(objective, totals, n)
    threshold = float(chi2.ppf(level, 1) / 2)
    out, brackets = {}, []
    for j, name in enumerate(law.parameters):
        rows = slice(j * 2 * steps, (j + 1) * 2 * steps)
        natural = np.insert(fixed[rows], steps, model.matrix[j] @ found.point) + model.offset[j]
        path = np.insert(points[rows], steps, found.point, axis=0)
        curve = np.insert(drop[rows], steps, 0.0)
        with np.errstate(over="ignore"):
            real = np.exp(natural) if model.positive[j] else natural
        out[name] = (real, curve)
        for side, order in enumerate((np.arange(steps, -1, -1), np.arange(steps, 2 * steps + 1))):
            above = np.flatnonzero(curve[order] > threshold)
            if len(above):
                inside, outside = order[above[0] - 1], order[above[0]]
                brackets.append(_Bracket(j, side, path[[inside, outside]],
                                         curve[[inside, outside]]))  # fmt: skip

    def likelihood_drop(starts: np.ndarray, keep: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        reached = follow(model, objective, log_loss, starts, widths_to(objective, scale),
                         directions=keep, tolerance=1e-12, scale=scale).points  # fmt: skip
        return reached, best - log_likelihood(objective, exact(
            model, objective, log_loss, reached), n)  # fmt: skip

    ends: dict[tuple[int, int], float] = {}
    for b in _narrowed(brackets, model, threshold, likelihood_drop):
        mix = (threshold - b.drop[0]) / max(b.drop[1] - b.drop[0], 1e-300)
        low, high = b.points @ model.matrix[b.parameter] + model.offset[b.parameter]
        at = low + np.clip(mix, 0, 1) * (high - low)
        ends[b.parameter, b.side] = float(np.exp(at) if model.positive[b.parameter] else at)
    return {
        name: Profile(real, curve, (ends.get((j, 0)), ends.get((j, 1))))
        for j, (name, (real, curve)) in enumerate(out.items())
    }


@dataclass(frozen=True)
class _Bracket:
    """Points [2, P] on a profile below and above the threshold, with their drops [2]."""

    parameter: int
    side: int
    points: np.ndarray
    drop: np.ndarray


def _narrowed(
    brackets: list[_Bracket],
    model: Model,
    threshold: float,
    likelihood_drop: Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
    parts: int = 10,
    rounds: int = 2,
) -> list[_Bracket]:
    """Brackets a hundredth as wide: the profile is curved, and its first steps may be large."""
    share = np.arange(1, parts) / parts
    for _ in range(rounds if brackets else 0):
        starts = np.concatenate([
            b.points[0] + share[:, None] * (b.points[1] - b.points[0]) for b in brackets
        ])  # fmt: skip
        keep = np.concatenate([
            np.repeat(_others(model.matrix[b.parameter])[None], len(share), axis=0)
            for b in brackets
        ])  # fmt: skip
        points, drops = likelihood_drop(starts, keep)
        narrower = []
        for i, b in enumerate(brackets):
            rows = slice(i * len(share), (i + 1) * len(share))
            between = np.concatenate([b.points[:1], points[rows], b.points[1:]])
            drop = np.r_[b.drop[0], drops[rows], b.drop[1]]
            k = int(np.argmax(drop > threshold))
            narrower.append(_Bracket(b.parameter, b.side, between[[k - 1, k]], drop[[k - 1, k]]))
        brackets = narrower
    return brackets


def _others(row: np.ndarray) -> np.ndarray:
    """Directions [P, P - 1] along which `row @ point` does not change."""
    return np.linalg.svd(row[None])[2][1:].T


def _covariance(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    found: Search,
    scale: float,
    spread: np.ndarray | None,
) -> np.ndarray:
    """Covariance of the standardised coordinates: of the bootstrap, else by curvature."""
    if spread is not None and len(spread) > 50:
        low, high = np.percentile(spread, [1, 99], axis=0)
        inside = spread[((spread >= low) & (spread <= high)).all(1)]
        if len(inside) > 20:
            return np.cov(inside.T) + 1e-12 * np.eye(len(found.point))
    wide = huber_oracle(model, objective.space, log_loss, np.inf, 1.0)
    hessian = wide(found.point[None], np.zeros(1, int))[2][0]
    values, basis = np.linalg.eigh(hessian)
    values = np.maximum(values, 1e-8 * max(values.max(), 1e-300))
    return (basis / values) @ basis.T * (2 * scale**2)


@dataclass(frozen=True)
class Holdout:
    """One size (or compute level) predicted by a fit to the others.

    `error` is the mean of log L_predicted - log L (0.01 is 1% of the loss too high), `rms`
    its root mean square. `extrapolated` marks the largest size, the one that matters.
    """

    low: float
    high: float
    runs: int
    error: float
    rms: float
    extrapolated: bool


def groups_of(values: np.ndarray, most: int = 12) -> np.ndarray:
    """Group numbers by value within 2%; if that leaves more than `most`, six bins of logs."""
    order = np.argsort(values)
    jumps = np.diff(np.log(values[order])) > 0.02
    group = np.empty(len(values), int)
    group[order] = np.r_[0, np.cumsum(jumps)]
    if group.max() + 1 > most:
        edges = np.quantile(np.log(values), np.linspace(0, 1, 7)[1:-1])
        group = np.searchsorted(edges, np.log(values), side="right")
        group = np.unique(group, return_inverse=True)[1]
    return group


def leave_one_out(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    found: Search,
    scale: float,
    size_of_run: np.ndarray,
) -> list[Holdout]:
    """Predict each size by a fit to all others (sizes within 2% count as one).

    A fold whose remaining runs could not determine the law is left out.
    """
    group = groups_of(size_of_run)
    count, size = int(group.max()) + 1, len(found.point)
    folds = [g for g in range(count) if (group != g).sum() > size and count > 2]
    if not folds:
        return []
    weights = np.array([(group != g).astype(float) for g in folds])
    points, _ = refit(model, objective, log_loss, weights, found.optima, scale=scale)
    value = model.evaluate(points).value
    with np.errstate(invalid="ignore", divide="ignore"):
        error = (value if model.space == "log" else np.log(value)) - log_loss
    return [
        Holdout(
            low=float(size_of_run[group == g].min()),
            high=float(size_of_run[group == g].max()),
            runs=int((group == g).sum()),
            error=float(error[row, group == g].mean()),
            rms=float(np.sqrt((error[row, group == g] ** 2).mean())),
            extrapolated=g == count - 1,
        )
        for row, g in enumerate(folds)
    ]
