"""Two families under one law: the crossings of their curves, and who leads in joint refits."""

from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.lead import (
    Interval,
    Lead,
    Stretch,
    crossings,
    interval_around,
    leaders,
    measure_lead,
    stretches,
)
from mmfree_jax.experiments.scaling.uncertainty import on_bound


@dataclass(frozen=True)
class Turn:
    """A crossing of two fitted curves.

    Attributes:
        at: log10 FLOPs.
        leader: 0 or 1, the family with the lower loss from there to the next crossing.
        interval: of its place: the computes around it at which neither family leads in enough
            of the joint refits. An end is None where that reaches the end of the range (it may
            lie before the data, or beyond the horizon or nowhere). None without refits.
    """

    at: float
    leader: int
    interval: Interval | None


@dataclass(frozen=True)
class LawCrossing:
    """Both families under one law.

    Attributes:
        law: name of the law.
        fits: the two fits.
        turns: all crossings of the two fitted curves in range, in order of compute.
        leader_before: 0 or 1, the family with the lower loss below the first crossing; None
            where the law has no curve.
        lead: who leads how often over joint refits; None without refits.
        spans: which family leads in enough refits, from the data to the horizon; empty without.
        warnings: of this law.
    """

    law: str
    fits: tuple[Fit, Fit]
    turns: tuple[Turn, ...]
    leader_before: int | None
    lead: Lead | None
    spans: list[Stretch]
    warnings: list[str]

    @property
    def point(self) -> float | None:
        """The first crossing (log10 FLOPs), or None."""
        return self.turns[0].at if self.turns else None

    @property
    def interval(self) -> Interval | None:
        """Of the first crossing; without one, the first computes at which the lead is open."""
        if self.turns:
            return self.turns[0].interval
        return interval_around(self.spans[0].low, self.spans) if self.spans else None

    @property
    def probability_none(self) -> float | None:
        """Share of joint refits without any crossing in range; None without refits."""
        return None if self.lead is None else self.lead.none


def compare(
    fits: tuple[Fit, Fit], names: tuple[str, str], grid: np.ndarray, level: float
) -> LawCrossing:
    """The crossings of two fits of one law, with their joint bootstrap.

    Args:
        fits, names: of the two families; their resamples are taken to be independent.
        grid: log10 FLOPs, evenly spaced, in which crossings are looked for.
        level: of the intervals.
    """
    law, costs = fits[0].law, [f.cost for f in fits]
    warnings = [f"{n}: {w}" for n, f in zip(names, fits, strict=True) for w in f.warnings]

    def fitted(log10_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        one, other = (
            curve(law, f.vector(), log10_c, cost)[0] for f, cost in zip(fits, costs, strict=True)
        )
        return one, other

    def difference(log10_c: np.ndarray) -> np.ndarray:
        one, other = fitted(log10_c)
        return one - other

    if not np.isfinite(difference(grid)).all():
        warnings.append("an exponent is not positive, so the law cannot be extrapolated")
    leading = leaders(*fitted(grid))
    ahead = leading[leading != 0]
    before = None if not len(ahead) else 0 if ahead[0] > 0 else 1
    lead: Lead | None = None
    spans: list[Stretch] = []
    if all(f.bootstrap is not None and len(f.bootstrap.parameters) >= 20 for f in fits):
        sets = [f.bootstrap.parameters for f in fits if f.bootstrap is not None]
        rows = min(len(s) for s in sets)
        bound = any(on_bound(f.model, f.search) for f in fits)
        lead = measure_lead(
            lambda c: (curve(law, sets[0][:rows], c, costs[0]),
                       curve(law, sets[1][:rows], c, costs[1])),
            np.full(len(grid), np.nan) if bound else difference(grid), rows, grid, level,
        )  # fmt: skip
        spans = stretches(grid, lead.first, lead.second, level)
    else:
        warnings.append("no interval: too few bootstrap refits")
    turns = tuple(
        Turn(at, leader, interval_around(at, spans))
        for at, leader in crossings(difference, leading, grid)
    )
    return LawCrossing(law.name, fits, turns, before, lead, spans, warnings)
