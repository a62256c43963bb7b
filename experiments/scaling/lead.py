"""Which of two families leads at a compute: crossings of two curves, and how sure the lead is.

A family leads where its loss is the lower one. Computes are log10 FLOPs. Shapes: R refits of
both families together, m computes.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.uncertainty import Interval, bias_of, corrected_quantiles

EQUAL = 1e-12
"""Losses whose relative difference is no larger are equal: it is rounding that orders them."""


@dataclass(frozen=True)
class Stretch:
    """Computes from `low` to `high` in which one family leads; None where that is open."""

    low: float
    high: float
    leader: int | None


@dataclass(frozen=True)
class Lead:
    """Who leads at each compute, over joint refits.

    Attributes:
        log10_c: computes [m].
        first, second: shares of the refits in which that family leads [m], corrected for the
            bias of the refits as `gap` is, whose interval leaves out 0 where a share is above
            (1 + level) / 2. They add up to less than 1 where the losses of a refit are equal
            or a refit has no curve.
        band: interval of P(first leads) [2, m], of a share counted in so many refits. Refits in
            which nobody leads could fall to either side.
        gap: interval of the first family's loss less the second's [2, m], nats a token.
        refits: R.
        none: share of refits in which the lead never changes.
        conditional: interval of the earliest crossing over the refits that have one, or None
            where they are fewer than 20.
    """

    log10_c: np.ndarray
    first: np.ndarray
    second: np.ndarray
    band: np.ndarray
    gap: np.ndarray
    refits: int
    none: float
    conditional: tuple[float, float] | None

    @property
    def probability(self) -> np.ndarray:
        """P(first leads) [m], of the refits in which either leads; NaN where none does."""
        with np.errstate(invalid="ignore"):
            return self.first / (self.first + self.second)


def leaders(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """1 where the first of two losses is the lower one, -1 where the second is, else 0."""
    with np.errstate(invalid="ignore"):
        apart = np.abs(first - second) > EQUAL * np.maximum(np.abs(first), np.abs(second))
        return np.where(apart, np.sign(second - first), 0).astype(np.int8)


def changes(leading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Where the lead changes: (row, column) of the last compute before each change.

    Args:
        leading: of `leaders` [R, m]. Where nobody leads counts to what came before.
    """
    columns = np.where(leading != 0, np.arange(leading.shape[1]), 0)
    filled = np.take_along_axis(leading, np.maximum.accumulate(columns, axis=1), axis=1)
    before, after = filled[:, :-1], filled[:, 1:]
    rows, last = np.nonzero((before != after) & (before != 0))
    return rows, last


def crossings(
    difference: Callable[[np.ndarray], np.ndarray], leading: np.ndarray, log10_c: np.ndarray
) -> list[tuple[float, int]]:
    """All crossings of two curves: (log10 C, the family 0 or 1 that leads beyond it), in order.

    Args:
        difference: of the losses, first less second, at computes [k].
        leading: of `leaders` at `log10_c` [m]; two crossings within one step are not seen.
    """
    from scipy.optimize import root_scalar

    out = []
    for column in changes(leading[None])[1]:
        known = np.flatnonzero(leading[: column + 1])[-1]
        ends = (log10_c[known], log10_c[column + 1])
        at = root_scalar(lambda x: float(difference(np.array([x]))[0]), bracket=ends, xtol=1e-12)
        out.append((float(at.root), 0 if leading[column + 1] > 0 else 1))
    return out


def measure_lead(
    losses: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    fitted: np.ndarray,
    refits: int,
    log10_c: np.ndarray,
    level: float,
) -> Lead:
    """How often, and by how much, each family leads.

    Args:
        losses: of both families at computes [k], each [R, k].
        fitted: gap of the fits themselves, first less second [m]; NaN where the refits' bias
            is not to be corrected.
        refits: R.
        log10_c: computes [m], evenly spaced.
        level: of the intervals.
    """
    from scipy.special import ndtr, ndtri

    leading = np.empty((refits, len(log10_c)), np.int8)
    gap, bias = np.full((2, len(log10_c)), np.nan), np.zeros(len(log10_c))
    tails = [(1 - level) / 2, (1 + level) / 2]
    for start in range(0, len(log10_c), 200):  # so that few losses are in memory at once
        part = slice(start, start + 200)
        one, other = losses(log10_c[part])
        leading[:, part] = leaders(one, other)
        with np.errstate(invalid="ignore"):
            apart = one - other
        apart = apart[np.isfinite(apart).all(1)]
        if len(apart):
            centre = np.where(np.isfinite(fitted[part]), fitted[part], np.median(apart, axis=0))
            bias[part] = bias_of(centre, apart)
            gap[:, part] = corrected_quantiles(centre, apart, level)
    first = ndtr(ndtri((leading > 0).mean(0)) - 2 * bias)
    second = ndtr(ndtri((leading < 0).mean(0)) + 2 * bias)
    rows, columns = changes(leading)
    crossed, earliest = np.unique(rows, return_index=True)
    places = (log10_c[columns[earliest]] + log10_c[columns[earliest] + 1]) / 2
    conditional = None
    if len(places) >= 20:
        low, high = np.quantile(places, tails)
        conditional = (float(low), float(high))
    band = np.stack(
        [_score_end(first, refits, level, -1), _score_end(1 - second, refits, level, 1)]
    )
    return Lead(log10_c, first, second, band, gap, refits, 1 - len(crossed) / refits, conditional)


def _score_end(share: np.ndarray, count: int, level: float, side: int) -> np.ndarray:
    """An end (side -1 or 1) of Wilson's score interval of a share that was counted in `count`."""
    from scipy.special import ndtri

    z = float(ndtri((1 + level) / 2))
    middle = share + z * z / (2 * count)
    half = z * np.sqrt(share * (1 - share) / count + (z / (2 * count)) ** 2)
    return (middle + side * half) / (1 + z * z / count)


def stretches(
    log10_c: np.ndarray, first: np.ndarray, second: np.ndarray, level: float
) -> list[Stretch]:
    """Where a family leads in at least 1 - (1 - level) / 2 of the refits, and what is open.

    The ends of an open stretch around one crossing are thus the equal-tailed interval of its
    place. Two that lead in adjoining computes have an open stretch between.

    Args:
        log10_c: computes [m].
        first, second: shares of the refits in which each leads [m], as in `Lead`.
        level: of the interval.
    """
    enough = (1 + level) / 2
    shares = (first, second)
    label = np.where(first >= enough, 0, np.where(second >= enough, 1, -1))

    def end(leader: int, k: int) -> float:
        """Where a leader's share passes `enough` between computes k and k + 1."""
        a, b = shares[leader][k], shares[leader][k + 1]
        return float(log10_c[k] + (a - enough) / (a - b) * (log10_c[k + 1] - log10_c[k]))

    out: list[Stretch] = []
    low = float(log10_c[0])
    for k in [*np.flatnonzero(np.diff(label)), len(label) - 1]:
        here = None if label[k] < 0 else int(label[k])
        if k == len(label) - 1:
            out.append(Stretch(low, float(log10_c[-1]), here))
            break
        beyond = None if label[k + 1] < 0 else int(label[k + 1])
        if here is not None:
            out.append(Stretch(low, end(here, k), here))
            low = out[-1].high
        if beyond is not None:
            out.append(Stretch(low, end(beyond, k), None))
            low = out[-1].high
    return out


def interval_around(place: float, found: list[Stretch]) -> Interval | None:
    """The open stretch that holds a place, or the nearest one; None where nothing is open.

    An end is None where the stretch reaches the end of the computes.
    """
    open_ = [s for s in found if s.leader is None]
    if not open_:
        return None
    near = min(open_, key=lambda s: max(s.low - place, place - s.high, 0))
    return (None if near.low == found[0].low else near.low,
            None if near.high == found[-1].high else near.high)  # fmt: skip
