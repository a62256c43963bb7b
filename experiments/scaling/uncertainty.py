"""How sure a fit is: bootstrap over runs, leave-one-size-out."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from mmfree_jax.experiments.scaling.descent import refit
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame
from mmfree_jax.experiments.scaling.models import Model
from mmfree_jax.experiments.scaling.objectives import Objective
from mmfree_jax.experiments.scaling.search import Search, shares

Interval = tuple[float | None, float | None]

VANISHED = 1e-3
"""A term that is nowhere a greater share of the loss than this is on its bound at nothing."""
MOST_BIAS = 0.75
"""Greatest distance of a fit from its draws' median (standard deviations) that is corrected."""


@dataclass(frozen=True)
class Bootstrap:
    """Refits to resampled runs: standardised points [R, P], parameters [R, P]."""

    kind: str
    points: np.ndarray
    parameters: np.ndarray
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

    `runs` draws runs with replacement; resamples with no more distinct runs than parameters
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
            one_row = np.flatnonzero(rows)[np.unique(own, return_index=True)[1]]
            enough &= (weights[:, one_row] > 0).sum(1) >= least + 1
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
        return Bootstrap(kind, empty, empty, count, groups, warnings)
    points, values = refit(model, objective, target, weights, found.optima, scale=scale)
    parameters = model.to_parameters(points)
    good = np.isfinite(points).all(1) & np.isfinite(values)
    if not good.all():
        warnings.append(f"{int((~good).sum())} refits diverged and were left out")
    return Bootstrap(kind, points[good], parameters[good], count, groups, warnings)


def corrected_quantiles(
    estimate: np.ndarray | float, draws: np.ndarray, level: float
) -> np.ndarray:
    """Bias-corrected percentile intervals [2, m] of estimates [m] by draws [R, m] (Efron 1981).

    The median of a robust fit's draws is a smoother estimate than the fit, so that plain
    percentiles lie around another centre and cover too often. The correction reads the draws
    at other percentiles, by how many of them lie below the estimate.
    """
    from scipy.special import ndtr, ndtri

    draws = draws.reshape(len(draws), -1)
    tails = ndtri([[(1 - level) / 2], [(1 + level) / 2]])
    at = ndtr(2 * bias_of(estimate, draws) + tails) * (len(draws) - 1)
    below = at.astype(int)
    ordered = np.sort(draws, axis=0)
    low = np.take_along_axis(ordered, below, axis=0)
    high = np.take_along_axis(ordered, np.minimum(below + 1, len(draws) - 1), axis=0)
    return low + (at - below) * (high - low)


def bias_of(estimate: np.ndarray | float, draws: np.ndarray) -> np.ndarray:
    """The normal quantile [m] of the share of draws [R, m] below an estimate [m], bounded."""
    from scipy.special import ndtri

    below = (draws < estimate).mean(0) + 0.5 * (draws == estimate).mean(0)
    return np.clip(ndtri(below), -MOST_BIAS, MOST_BIAS)


def on_bound(model: Model, found: Search) -> bool:
    """Whether a term vanished in a fit, which then is no centre to correct draws to."""
    return any(share < VANISHED for _, share in shares(model, found.point))


def bootstrap_intervals(
    names: Sequence[str], model: Model, found: Search, draws: Bootstrap, level: float
) -> dict[str, Interval]:
    """Intervals of a law's parameters by its bootstrap."""
    values = draws.parameters
    centre = model.to_parameters(found.point)
    if on_bound(model, found):
        centre = np.median(values, axis=0)
    lows, highs = corrected_quantiles(centre, values, level).tolist()
    return dict(zip(names, zip(lows, highs, strict=True), strict=True))


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
