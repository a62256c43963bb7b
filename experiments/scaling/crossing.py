"""Where do the loss curves of two families cross, and can one know?

Every law is fitted to both families; all crossings of the two fitted curves are found, and which
family leads at each compute in every pair of bootstrap refits (the families are resampled
independently). A family's curve is its loss at a compute C: the law itself, or for laws of N and
D their least loss over N at C, by the FLOPs a token of the family (`training_cost`).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.experiments.scaling.conclusion import conclude
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.fit import fit_law
from mmfree_jax.experiments.scaling.frame import RunFrame, compute, resolve
from mmfree_jax.experiments.scaling.identifiability import distinct
from mmfree_jax.experiments.scaling.law_crossing import LawCrossing, compare
from mmfree_jax.experiments.scaling.laws import get_law
from mmfree_jax.experiments.scaling.objectives import Objective

CROSSING_LAWS = ("line", "power", "power-floor", "chinchilla", "gadre", "broken")
STEP = 0.01
"""Greatest spacing of the search for sign changes, in decades."""
ROUGH = 0.05
"""Relative miss of `TrainingCost` above which the reader is warned."""
FARTHEST = 100.0
"""Greatest horizon (log10 FLOPs)."""


@dataclass(frozen=True)
class Crossing:
    """All laws together, with the sentences that say what can be concluded.

    Attributes:
        names: of the two families.
        laws, skipped: the fitted laws; name -> why a law was not fitted.
        data: least and greatest compute of any run (log10 FLOPs).
        shared: compute up to which both families have runs (log10 FLOPs).
        horizon: where the range ends (log10 FLOPs); it begins with the data.
        level: of all intervals. flops: the convention of C.
    """

    names: tuple[str, str]
    laws: list[LawCrossing]
    skipped: dict[str, str]
    data: tuple[float, float]
    shared: float
    horizon: float
    level: float
    flops: str
    conclusion: str
    warnings: list[str]


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
    size: str = "auto",
    flops: str = "auto",
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
        size, flops: conventions of N and C (`frame.resolve`).
        points: which runs laws of compute alone are fitted to: `frontier` (those that no
            cheaper run beats) or `all`. Laws of N and D always use all.
        resamples, resample, level, seed: of the bootstrap (`fit_law`).
        horizon: log10 FLOPs up to which a crossing is looked for.

    Raises:
        ScalingError: no law can be fitted to both families.
    """
    size, flops = resolve(frames, size, flops)
    computes = [compute(f, flops) for f in frames]
    low = np.log10(min(c.min() for c in computes))
    high = np.log10(max(c.max() for c in computes))
    if not high < horizon <= FARTHEST:
        raise ScalingError(f"horizon: 10^{horizon:g} FLOPs is not beyond the data (10^{high:.2f}) "
                           f"and within 10^{FARTHEST:g}")  # fmt: skip
    grid = np.linspace(low, horizon, int(np.ceil((horizon - low) / STEP)) + 1)
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
        results.append(compare((fits[0], fits[1]), names, grid, level))
    if not results:
        raise ScalingError("crossing: no law can be fitted to both families: "
                           + "; ".join(f"{n}: {why}" for n, why in skipped.items()))  # fmt: skip
    for k, name in enumerate(names):
        worst = max(r.fits[k].cost.worst for r in results)
        if worst > ROUGH:
            warnings.append(f"{name}: FLOPs a token as a function of size miss those of a run by "
                            f"{100 * worst:.0f}%, so compute-optimal curves are rough")  # fmt: skip
    shared = float(np.log10(min(c.max() for c in computes)))
    conclusion = conclude(results, names, shared, horizon, level)
    return Crossing(names, results, skipped, (float(low), float(high)), shared, horizon, level,
                    flops, conclusion, list(dict.fromkeys(warnings)))  # fmt: skip
