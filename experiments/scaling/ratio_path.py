"""Two families along one number of tokens a parameter: the gap at equal compute, and its slope.

On a path D = r N a compute fixes a family's size, r N^2 (C / D) / N = C with its own FLOPs a token.
Shapes: R refits of both families together, m computes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.descent import refit, typical_residual
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.joint import JointFit
from mmfree_jax.experiments.scaling.joint_law import bind
from mmfree_jax.experiments.scaling.laws import Law
from mmfree_jax.experiments.scaling.lead import Lead, measure_lead
from mmfree_jax.experiments.scaling.misfit import Beside
from mmfree_jax.experiments.scaling.models import FAMILY, Model
from mmfree_jax.experiments.scaling.training_cost import TrainingCost
from mmfree_jax.experiments.scaling.uncertainty import corrected_quantiles

_NEWTON_STEPS = 50


@dataclass(frozen=True)
class PathGap:
    """Loss of the first family less that of the second at equal compute, on D = ratio N.

    Attributes:
        ratio: D / N.
        ends: log10 FLOPs between which the slope is taken.
        gap: at both ends (nats a token), with the interval of each.
        slope: of the gap, from end to end (nats a decade of compute), with its interval.
        lead: which family leads, over the refits, at every compute that was asked for.
    """

    ratio: float
    ends: tuple[float, float]
    gap: tuple[float, float]
    gap_intervals: tuple[tuple[float, float], tuple[float, float]]
    slope: float
    slope_interval: tuple[float, float]
    lead: Lead


def size_on_path(cost: TrainingCost, ratio: float, log10_c: np.ndarray) -> np.ndarray:
    """N whose training on `ratio` N tokens costs 10^log10_c [m]; NaN where the cost has no root."""
    target = np.asarray(log10_c) * np.log(10) - np.log(ratio)
    log_n = (target - np.log(6)) / 2
    with np.errstate(all="ignore"):
        for _ in range(_NEWTON_STEPS):
            value = log_n + cost.log_per_token(log_n) - target
            log_n = log_n - value / (1 + cost.slope(log_n)[0])
        left = log_n + cost.log_per_token(log_n) - target
        return np.where(np.abs(left) < 1e-9, np.exp(log_n), np.nan)


def losses_on_path(
    law: Law, parameters: np.ndarray, cost: TrainingCost, ratio: float, log10_c: np.ndarray
) -> np.ndarray:
    """A law's loss [R, m] at parameters [R, P] along D = `ratio` N, at computes [m]."""
    n = size_on_path(cost, ratio, log10_c)
    return law.loss(np.atleast_2d(parameters), {"params": n, "tokens": ratio * n})


def bound(fit: JointFit) -> tuple[Model, np.ndarray]:
    """A joint law bound to its runs, and their log losses [n], a family behind the other."""
    families = list(fit.fits.values())
    x = {name: np.concatenate([f.inputs[name] for f in families]) for name in families[0].inputs}
    x[FAMILY] = np.repeat(np.arange(len(families)), [len(f.log_loss) for f in families])
    return bind(fit.sharing, x).whole, np.concatenate([f.log_loss for f in families])


def log_losses_of(fit: JointFit) -> np.ndarray:
    """Of the runs of a joint fit, a family behind the other [n]."""
    return bound(fit)[1]


def gradient_of(fit: JointFit, point: np.ndarray) -> np.ndarray:
    """Of the joint law's log losses in its coordinates, at a point [n, Q]."""
    return bound(fit)[0].evaluate(point[None]).gradient[0].T


def residuals_of(fit: JointFit, points: np.ndarray, log_losses: np.ndarray) -> np.ndarray:
    """Log losses [R, n] less those of the joint law at points of its coordinates [R, Q]."""
    return log_losses - bound(fit)[0].evaluate(points).value


def parameters_of(fit: JointFit, points: np.ndarray) -> dict[str, np.ndarray]:
    """Family -> parameters of its law [R, P] at points of the joint coordinates [R, Q]."""
    found = bound(fit)[0].to_parameters(points)
    return {name: found[:, fit.sharing.positions(k)] for k, name in enumerate(fit.sharing.families)}


@dataclass(frozen=True)
class JointRefits:
    """Refits of a joint law; those that diverged are left out.

    Attributes:
        points: in the coordinates of the joint fit [R, Q].
        parameters: family -> parameters of its law [R, P].
        rows: which of the losses these are of, by number [R].
    """

    points: np.ndarray
    parameters: dict[str, np.ndarray]
    rows: np.ndarray


def refit_jointly(fit: JointFit, log_losses: np.ndarray) -> JointRefits:
    """Refits a joint law to other losses of the same runs, warm-started from its optima.

    Args:
        fit: of the runs; they stand in its order, a family behind the other.
        log_losses: [R, n].
    """
    whole, own = bound(fit)
    scale = typical_residual(whole, fit.objective, own, fit.search.point)
    points, values = refit(whole, fit.objective, log_losses, np.ones(log_losses.shape),
                           fit.search.optima, scale=scale)  # fmt: skip
    good = np.isfinite(points).all(1) & np.isfinite(values)
    return JointRefits(points[good], parameters_of(fit, points[good]), np.flatnonzero(good))


def path_gap(
    fit: JointFit,
    draws: Mapping[str, np.ndarray],
    costs: Mapping[str, TrainingCost],
    families: tuple[str, str],
    ratio: float,
    ends: tuple[float, float],
    computes: Sequence[float],
    level: float = 0.95,
    beside: Beside | None = None,
) -> PathGap:
    """The gap of two families of a joint fit along one ratio.

    Args:
        fit: the fit to all runs.
        draws: family -> parameters of refits [R, P], rows of both together.
        costs: family -> FLOPs a token, of the tokens that were trained on (the fit's own may
            count repeated ones for less).
        families: names, first less second.
        ratio: D / N.
        ends: log10 FLOPs of the smallest and the largest model on the path.
        computes: log10 FLOPs, evenly spaced, at which the lead is asked for.
        level: of the intervals.
        beside: what the law misses, in the fit and in the refits; None: nothing.

    Raises:
        ScalingError: fewer than 20 refits.
    """
    refits = len(draws[families[0]])
    if refits < 20:
        raise ScalingError(f"resamples: {refits} refits succeeded, which give no interval; ask for "
                           "more")  # fmt: skip

    def both(log10_c: np.ndarray, at: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        found = []
        for name in families:
            loss = losses_on_path(fit.sharing.law, at[name], costs[name], ratio, log10_c)
            if beside is not None:
                n = size_on_path(costs[name], ratio, log10_c)
                missed = beside.of_refits if at is draws else beside.of_fit
                loss = loss * np.exp(missed(name, n, ratio * n))
            found.append(loss)
        return found

    fitted = {
        name: (fit.fits[name].vector() if beside is None else beside.fitted[name])[None]
        for name in families
    }
    at_ends = np.array(ends)
    first, second = both(at_ends, fitted)
    gap = (first - second)[0]
    first, second = both(at_ends, draws)
    gaps = first - second
    decades = ends[1] - ends[0]
    slope, slopes = (gap[1] - gap[0]) / decades, (gaps[:, 1] - gaps[:, 0]) / decades
    low, high = corrected_quantiles(gap, gaps, level)
    slope_ends = corrected_quantiles(slope, slopes, level)[:, 0]
    grid = np.asarray(computes)
    one, other = both(grid, fitted)

    def of_draws(log10_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        a, b = both(log10_c, draws)
        return a, b

    lead = measure_lead(of_draws, (one - other)[0], refits, grid, level)
    return PathGap(
        ratio, ends, (float(gap[0]), float(gap[1])),
        ((float(low[0]), float(high[0])), (float(low[1]), float(high[1]))),
        float(slope), (float(slope_ends[0]), float(slope_ends[1])), lead,
    )  # fmt: skip


def measured_slope(
    log10_c: tuple[np.ndarray, np.ndarray], losses: tuple[np.ndarray, np.ndarray]
) -> np.ndarray:
    """Slope of the gap of two families a decade of compute, without a law [R].

    Each family's log losses are interpolated in log C at the computes of both that lie within the
    runs of either, and a line is fitted to the difference.

    Args:
        log10_c: of each family's runs on the path [k], ascending.
        losses: of each family [R, k] (nats a token).

    Raises:
        ScalingError: a family has fewer than two runs, or their computes do not overlap.
    """
    low, high = max(c[0] for c in log10_c), min(c[-1] for c in log10_c)
    if min(len(c) for c in log10_c) < 2 or high <= low:
        raise ScalingError("path: both families need two sizes of overlapping compute on it")
    at = np.unique(np.concatenate([c[(c >= low) & (c <= high)] for c in log10_c]))
    first, second = (
        np.exp(np.stack([np.interp(at, c, row) for row in np.log(np.atleast_2d(loss))]))
        for c, loss in zip(log10_c, losses, strict=True)
    )
    centred = at - at.mean()
    return (first - second) @ centred / (centred @ centred)
