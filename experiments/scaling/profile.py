"""Profiles of the objective: what values of one parameter the data do not reject."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from mmfree_jax.experiments.scaling.descent import (
    exact,
    follow,
    huber_oracle,
    lower,
    response,
    widths_to,
)
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.models import Model
from mmfree_jax.experiments.scaling.objectives import Objective, score_and_slope
from mmfree_jax.experiments.scaling.sandwich import Scatter, scatter
from mmfree_jax.experiments.scaling.search import Search
from mmfree_jax.experiments.scaling.uncertainty import Interval


@dataclass(frozen=True)
class Profile:
    """One parameter fixed at values [m]: how far the objective rises [m], and the interval.

    The rise is counted in halves of the variance that the residuals give the parameter, like a
    log-likelihood below its maximum: at t standard errors it is about t^2 / 2. An end of the
    interval is None where the rise stays below the threshold as far as it was followed: the
    data do not bound the parameter on that side.
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
    clusters: np.ndarray,
    steps: int = 24,
    reach: float = 5.0,
) -> dict[str, Profile]:
    """Fix one parameter at a time, refit the others, and keep what the data do not reject.

    The objective need not be the likelihood of the noise. Its rise is therefore divided by the
    ratio of the parameter's sandwich variance to the one by curvature alone, and the interval
    holds values for which twice that is within Student's t squared, with the sandwich's own
    degrees of freedom. Each parameter is followed to `reach` standard errors on both sides, and
    farther where the threshold is.

    Args:
        law, model, objective, log_loss, found, scale: the fit.
        level: of the intervals.
        spread: bootstrap points [R, P], which tell how far to go, or None.
        clusters: which rows belong to one run [n].
    """
    from scipy.stats import t

    size = len(found.point)
    known = _scatter(model, objective, log_loss, found.point, clusters)
    ratio = known.variance / known.curvature
    limit = t.ppf((1 + level) / 2, known.freedom)
    threshold = limit**2 / 2
    covariance = _covariance(model, objective, log_loss, found, scale, spread)
    directions, fixed, slopes, rowsets = [], [], [], []
    for j in range(size):
        row = model.matrix[j]
        deviation = np.sqrt(max(row @ covariance @ row, 1e-18))
        side = max(reach, 1.5 * limit[j]) * (np.arange(1, steps + 1) / steps) ** 1.5
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
    drop = (totals - found.objective) / np.repeat(ratio, 2 * steps)
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
            above = np.flatnonzero(curve[order] > threshold[j])
            if len(above):
                inside, outside = order[above[0] - 1], order[above[0]]
                brackets.append(_Bracket(j, side, path[[inside, outside]],
                                         curve[[inside, outside]]))  # fmt: skip

    def rise(
        starts: np.ndarray, keep: np.ndarray, parameter: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        reached = follow(model, objective, log_loss, starts, widths_to(objective, scale),
                         directions=keep, tolerance=1e-12, scale=scale).points  # fmt: skip
        total = exact(model, objective, log_loss, reached)
        return reached, (total - found.objective) / ratio[parameter]

    ends: dict[tuple[int, int], float] = {}
    for b in _narrowed(brackets, model, threshold, rise):
        mix = (threshold[b.parameter] - b.drop[0]) / max(b.drop[1] - b.drop[0], 1e-300)
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
    threshold: np.ndarray,
    rise: Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]],
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
        points, drops = rise(starts, keep, np.repeat([b.parameter for b in brackets], len(share)))
        narrower = []
        for i, b in enumerate(brackets):
            rows = slice(i * len(share), (i + 1) * len(share))
            between = np.concatenate([b.points[:1], points[rows], b.points[1:]])
            drop = np.r_[b.drop[0], drops[rows], b.drop[1]]
            k = int(np.argmax(drop > threshold[b.parameter]))
            narrower.append(_Bracket(b.parameter, b.side, between[[k - 1, k]], drop[[k - 1, k]]))
        brackets = narrower
    return brackets


def _scatter(
    model: Model,
    objective: Objective,
    log_loss: np.ndarray,
    point: np.ndarray,
    clusters: np.ndarray,
) -> Scatter:
    """How far each natural parameter scatters about its value at an optimum.

    Squares of normal residuals, which the degrees of freedom are of, vary by twice their mean's
    square. The scores of a robust loss are bounded and vary less, but so do its slopes; the
    freedom is as much greater, to that of all runs.
    """
    residual, gradient = response(model, objective.space, log_loss, point)
    score, slope = score_and_slope(objective, residual, len(point))
    known = scatter(gradient, score, slope, clusters, model.matrix)
    if np.ptp(slope) == 0:
        return known
    noise = sum(np.var(x) / np.mean(x) ** 2 for x in (score**2, slope))
    most = max(int(clusters.max()) + 1 - len(point), 1)
    freedom = np.maximum(known.freedom, np.minimum(known.freedom * 2 / noise, most))
    return replace(known, freedom=freedom)


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
