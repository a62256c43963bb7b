"""Where do the loss curves of two families cross, and can one know?

Every law is fitted to both families; the crossing is found for the fit and for every pair of
bootstrap refits (the families are resampled independently). A family's curve is its loss at
a compute C: the law itself, or for laws of N and D their least loss over N at C = 6 N D.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import Fit, fit_law
from mmfree_jax.experiments.scaling.frame import RunFrame, compute
from mmfree_jax.experiments.scaling.identifiability import distinct
from mmfree_jax.experiments.scaling.laws import Law, get_law
from mmfree_jax.experiments.scaling.objectives import Objective

CROSSING_LAWS = ("line", "power", "power-floor", "chinchilla", "gadre", "broken")
ENOUGH_LEVELS = 5
"""Distinct computes a family below which no crossing is called supported."""
STEP = 0.01
"""Spacing of the search for sign changes, in decades."""


@dataclass(frozen=True)
class LawCrossing:
    """The crossing under one law; computes as log10 FLOPs.

    Attributes:
        law: name of the law.
        fits: the two fits.
        point: crossing of the two fitted curves, or None where they do not cross in range.
        count: sign changes in range.
        probability_none: share of joint refits without a crossing in range; None without refits.
        interval: quantiles over all joint refits, a refit without a crossing counting as later
            than any (so that an end may be None: beyond the range).
        conditional: quantiles over those joint refits that cross, or None.
        leader_before, leader_after: 0 or 1, the family with the lower loss on either side.
        draws: the crossings of joint refits, NaN for none.
        warnings: of this law.
    """

    law: str
    fits: tuple[Fit, Fit]
    point: float | None
    count: int
    probability_none: float | None
    interval: tuple[float | None, float | None] | None
    conditional: tuple[float, float] | None
    leader_before: int
    leader_after: int
    draws: np.ndarray
    warnings: list[str]


@dataclass(frozen=True)
class Crossing:
    """All laws together, with the sentences that say what can be concluded."""

    names: tuple[str, str]
    laws: list[LawCrossing]
    skipped: dict[str, str]
    data: tuple[float, float]
    horizon: float
    level: float
    flops: str
    conclusion: str
    warnings: list[str]


def curve(law: Law, parameters: np.ndarray, log10_c: np.ndarray) -> np.ndarray:
    """A family's loss [R, m] at computes 10^log10_c [m], compute-optimal where N is free.

    For `chinchilla`, N* = G (C / 6)^(beta / (alpha + beta)) with G = (alpha A / beta B)^(1 /
    (alpha + beta)) (Hoffmann et al., equation 4); for `gadre` the best ratio gives
    L = E + 2 sqrt(a b) C^-eta. NaN where exponents are not positive, so no optimum exists.
    """
    p = np.atleast_2d(parameters)
    c = 10.0**log10_c
    with np.errstate(all="ignore"):
        if law.name == "chinchilla":
            e, a, b, alpha, beta = p.T[:, :, None]
            g = (alpha * a / (beta * b)) ** (1 / (alpha + beta))
            n = g * (c / 6) ** (beta / (alpha + beta))
            loss = e + a * n**-alpha + b * (c / 6 / n) ** -beta
            return np.where((alpha > 0) & (beta > 0), loss, np.nan)
        if law.name == "gadre":
            e, a, b, eta = p.T[:, :, None]
            return np.where(eta > 0, e + 2 * np.sqrt(a * b) * c**-eta, np.nan)
        loss = law.loss(p, {"compute": c})
        if law.name == "broken":  # a loss that rises without end is no law
            loss = np.where((p[:, 2] + p[:, 3] > 0)[:, None], loss, np.nan)
        return loss


def first_crossings(difference: np.ndarray, log10_c: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First sign change of each row of a difference [R, m]: log10 C [R] (NaN for none), count."""
    positive = np.asarray(difference > 0)
    valid = np.asarray(np.isfinite(difference).all(1))
    change = (positive[:, 1:] != positive[:, :-1]) & valid[:, None]
    count = change.sum(1)
    k = np.argmax(change, axis=1)
    rows = np.arange(len(difference))
    left, right = difference[rows, k], difference[rows, k + 1]
    with np.errstate(all="ignore"):
        where = log10_c[k] + left / (left - right) * (log10_c[k + 1] - log10_c[k])
    return np.where(count > 0, where, np.nan), count


def frontier(frame: RunFrame, c: np.ndarray) -> np.ndarray:
    """Runs that no run of less or equal compute (within 2%) beats, as a mask [n]."""
    cheaper = c[None, :] <= 1.02 * c[:, None]
    return ~np.any(cheaper & (frame.loss[None, :] < frame.loss[:, None]), axis=1)


def cross(
    frames: tuple[RunFrame, RunFrame],
    names: tuple[str, str] = ("A", "B"),
    laws: Sequence[str] = CROSSING_LAWS,
    *,
    objective: Objective | None = None,
    size: str = "total",
    flops: str = "6nd",
    points: str = "frontier",
    resamples: int = 1000,
    resample: str = "runs",
    level: float = 0.95,
    horizon: float = 30.0,
    seed: int = 0,
) -> Crossing:
    """Compare two families under every law that their data allow.

    Args:
        frames, names: the two families.
        laws: names in `LAWS`.
        objective: for all laws; by default each law's own (`fit_law`).
        size, flops: conventions of N and C.
        points: which runs laws of compute alone are fitted to: `frontier` (those that no
            cheaper run beats) or `all`. Laws of N and D always use all.
        resamples, resample, level, seed: of the bootstrap (`fit_law`).
        horizon: log10 FLOPs up to which a crossing is looked for.

    Raises:
        ScalingError: no law can be fitted to both families.
    """
    computes = [compute(f, flops) for f in frames]
    low = np.log10(min(c.min() for c in computes))
    high = np.log10(max(c.max() for c in computes))
    if horizon <= high:
        raise ScalingError(f"horizon: 10^{horizon:g} FLOPs is not beyond the data (10^{high:.2f})")
    grid = np.arange(low, horizon + STEP, STEP)
    results, skipped, warnings = [], {}, []
    for name in laws:
        law = get_law(name)
        chosen = list(frames)
        if law.inputs == ("compute",) and points == "frontier":
            masks = [frontier(f, c) for f, c in zip(frames, computes, strict=True)]
            chosen = [f.take(m) for f, m in zip(frames, masks, strict=True)]
            for label, mask in zip(names, masks, strict=True):
                if not mask.all():
                    warnings.append(f"{label}: laws of compute use the {int(mask.sum())} of "
                                    f"{len(mask)} runs on the compute frontier; choosing them is "
                                    "not part of the bootstrap")  # fmt: skip
        elif points not in ("frontier", "all"):
            raise ScalingError(f"points: {points!r} is unknown; choose frontier or all")
        few = min(distinct(compute(f, flops)) for f in chosen)
        if name == "broken" and few < 2 * len(law.parameters):
            skipped[name] = (f"{few} distinct computes; five parameters of a break need at least "
                             f"{2 * len(law.parameters)} to be worth extrapolating")  # fmt: skip
            continue
        try:
            fits = tuple(
                fit_law(f, name, objective, size=size, flops=flops, resamples=resamples,
                        resample=resample, level=level, profile=False, holdout=False,
                        seed=seed + k)
                for k, f in enumerate(chosen)
            )  # fmt: skip
        except ScalingError as error:
            skipped[name] = str(error)
            continue
        results.append(_one_law((fits[0], fits[1]), names, grid, level))
    if not results:
        raise ScalingError("crossing: no law can be fitted to both families: "
                           + "; ".join(f"{n}: {why}" for n, why in skipped.items()))  # fmt: skip
    if flops != "6nd" and any(r.law in ("chinchilla", "gadre") for r in results):
        warnings.append("the compute-optimal curves of chinchilla and gadre assume C = 6 N D, not "
                        f"the convention {flops!r}")  # fmt: skip
    conclusion = conclude(results, names, high, horizon, level)
    return Crossing(names, results, skipped, (low, high), horizon, level, flops, conclusion,
                    list(dict.fromkeys(warnings)))  # fmt: skip


def _one_law(
    fits: tuple[Fit, Fit], names: tuple[str, str], grid: np.ndarray, level: float
) -> LawCrossing:
    """The crossing of two fits of one law, with its joint bootstrap."""
    law = fits[0].law
    point_curves = [curve(law, f.vector(), grid)[0] for f in fits]
    difference = (point_curves[0] - point_curves[1])[None]
    warnings = [f"{n}: {w}" for n, f in zip(names, fits, strict=True) for w in f.warnings]
    if not np.isfinite(difference).all():
        warnings.append("an exponent is not positive, so the law cannot be extrapolated")
    where, count = first_crossings(difference, grid)
    point = None if np.isnan(where[0]) else float(where[0])
    before = int(difference[0, 0] > 0)
    after = 1 - before if point is not None else before
    draws = np.empty(0)
    none = interval = conditional = None
    if all(f.bootstrap is not None and len(f.bootstrap.parameters) >= 20 for f in fits):
        sets = [f.bootstrap.parameters for f in fits if f.bootstrap is not None]
        rows = min(len(s) for s in sets)
        draws = np.empty(rows)
        for first in range(0, rows, 200):
            part = slice(first, min(first + 200, rows))
            gap = curve(law, sets[0][part], grid) - curve(law, sets[1][part], grid)
            draws[part] = first_crossings(gap, grid)[0]
        none = float(np.isnan(draws).mean())
        tail = 50 * (1 - level)
        ordered = np.where(np.isnan(draws), np.inf, draws)
        ends = np.percentile(ordered, [tail, 100 - tail], method="nearest")
        low, high = (float(e) if np.isfinite(e) else None for e in ends)
        interval = (low, high)
        crossed = draws[~np.isnan(draws)]
        if len(crossed) >= 20:
            first, last = np.percentile(crossed, [tail, 100 - tail])
            conditional = (float(first), float(last))
    else:
        warnings.append("no interval: too few bootstrap refits")
    return LawCrossing(law.name, fits, point, int(count[0]), none, interval, conditional, before,
                       after, draws, warnings)  # fmt: skip


def _power_of_ten(value: float | None, horizon: float) -> str:
    return f"10^{value:.1f}" if value is not None else f"beyond 10^{horizon:g} or never"


def conclude(
    results: Sequence[LawCrossing],
    names: tuple[str, str],
    highest: float,
    horizon: float,
    level: float,
) -> str:
    """What the fits together allow one to say, in two or three sentences."""
    crossing = [r for r in results if r.point is not None]
    points = [r.point for r in crossing if r.point is not None]
    parts = []
    if not crossing:
        leader = names[results[0].leader_before]
        parts.append(f"Under none of {len(results)} fitted laws do the curves cross below "
                     f"10^{horizon:g} FLOPs; {leader} has the lower loss throughout under "
                     f"{results[0].law}.")  # fmt: skip
    elif len(crossing) < len(results):
        without = ", ".join(r.law for r in results if r.point is None)
        parts.append(f"The laws disagree about whether the curves cross at all: {len(crossing)} of "
                     f"{len(results)} cross, between {_power_of_ten(min(points), horizon)} and "
                     f"{_power_of_ten(max(points), horizon)} FLOPs, and {without} "
                     f"{'does' if len(results) - len(crossing) == 1 else 'do'} not below "
                     f"10^{horizon:g}.")  # fmt: skip
    else:
        parts.append(f"All {len(results)} fitted laws cross, at "
                     f"{_power_of_ten(min(points), horizon)} to "
                     f"{_power_of_ten(max(points), horizon)} FLOPs: the choice of law alone "
                     f"moves the crossing by {max(points) - min(points):.1f} decades.")  # fmt: skip
    known = [r.probability_none for r in results if r.probability_none is not None]
    thin = min(distinct(6 * f.frame.params * f.frame.tokens) for r in results for f in r.fits)
    sure = len(crossing) == len(results) and bool(known) and max(known) < (1 - level)
    sure = sure and thin >= ENOUGH_LEVELS
    if known:
        parts.append(f"The bootstrap probability of no crossing is {min(known):.2f} to "
                     f"{max(known):.2f} across laws.")  # fmt: skip
    else:
        parts.append("No law has enough runs for a bootstrap, so no probability can be given.")
    if thin < ENOUGH_LEVELS:
        parts.append(f"With {thin} computes a family the data cannot test the form of any law.")
    inside = bool(points) and max(points) <= highest
    if sure and inside:
        after = {r.leader_after for r in crossing}
        side = names[after.pop()] if len(after) == 1 else "the other family"
        parts.append(f"The crossing lies within the data: beyond it {side} has the lower loss.")
    elif sure:
        parts.append(f"That the families cross is supported, but the place is an extrapolation of "
                     f"{max(min(points) - highest, 0):.1f} to {max(points) - highest:.1f} decades "
                     "beyond the largest run.")  # fmt: skip
    elif points:
        place = (
            f"the earliest fitted crossing lies within the data (up to 10^{highest:.1f}), the "
            f"latest {max(max(points) - highest, 0):.1f} decades beyond."
            if min(points) <= highest
            else f"it would lie {min(points) - highest:.1f} decades or more beyond the largest "
            f"run (10^{highest:.1f})."
        )
        parts.append(f"A crossing cannot be concluded from these runs, nor excluded: {place}")
    else:
        parts.append(f"A crossing far beyond the largest run (10^{highest:.1f}) cannot be excluded "
                     "by laws that were fitted below it.")  # fmt: skip
    return " ".join(parts)
