"""What fits to two families allow one to say: what is fitted, what is settled, what is open."""

from collections.abc import Sequence
from itertools import pairwise

import numpy as np

from mmfree_jax.experiments.scaling.identifiability import distinct
from mmfree_jax.experiments.scaling.law_crossing import LawCrossing
from mmfree_jax.experiments.scaling.lead import Stretch, stretches

ENOUGH_LEVELS = 5
"""Distinct computes a family below which no crossing is called supported."""


def conclude(
    results: Sequence[LawCrossing],
    names: tuple[str, str],
    shared: float,
    horizon: float,
    level: float,
) -> str:
    """The sentences of a comparison.

    A lead is settled where each law gives it in at least 1 - (1 - level) / 2 of its joint refits;
    a crossing is supported where it lies between settled leads of one and the other family.

    Args:
        results: of every law.
        names: of the families.
        shared: compute up to which both have runs (log10 FLOPs).
        horizon: end of the range (log10 FLOPs).
        level: of the intervals.
    """
    known = [r.lead for r in results if r.lead is not None]
    settled: list[Stretch] = []
    if len(known) == len(results):
        first = np.min([k.first for k in known], axis=0)
        second = np.min([k.second for k in known], axis=0)
        settled = stretches(known[0].log10_c, first, second, level)
    thin = min(distinct(6 * f.frame.params * f.frame.tokens) for r in results for f in r.fits)
    parts = [*_fitted(results, names, horizon), _probability(results)]
    if thin < ENOUGH_LEVELS:
        parts.append(f"With {thin} computes a family the data cannot test the form of any law.")
    if settled:
        law = "every law" if len(results) > 1 else results[0].law
        sure = f"with a probability of {(1 + level) / 2:.3g} or more under {law}"
        parts.append(_settled(settled, names, sure, shared, horizon))
    supported = _supported(settled, names, shared) if thin >= ENOUGH_LEVELS else []
    places = [turn.at for r in results for turn in r.turns]
    return " ".join([*parts, *(supported or [_unsupported(places, shared)])])


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _range(values: Sequence[float], form: str, between: str) -> str:
    """One number, or the least and the greatest of several where they read differently."""
    return between.join(dict.fromkeys(form.format(v) for v in (min(values), max(values))))


def _fitted(results: Sequence[LawCrossing], names: tuple[str, str], horizon: float) -> list[str]:
    """Who leads where under the fitted curves; laws whose curves cross equally often together."""
    groups: dict[tuple[int | None, int], list[LawCrossing]] = {}
    for r in results:
        groups.setdefault((r.leader_before, len(r.turns)), []).append(r)
    said = []
    for (leader, count), group in groups.items():
        turns = list(zip(*(r.turns for r in group), strict=True))
        under = f"under {_listed([r.law for r in group])} "
        if leader is None:
            said.append(under + "neither has a lower loss")
        elif count == 0:
            said.append(f"{under}{names[leader]} has the lower loss throughout, to "
                        f"10^{horizon:g} FLOPs")  # fmt: skip
        else:
            ends = [_range([t.at for t in at], "10^{:.2f}", "-") for at in turns]
            spans = [f"{names[1 - at[0].leader]} up to {end}"
                     for at, end in zip(turns, ends, strict=True)]  # fmt: skip
            said.append(f"{under}the lower loss is that of {', then of '.join(spans)} FLOPs, then "
                        f"of {names[turns[-1][0].leader]}")  # fmt: skip
    sentence = "; ".join(said) + "."
    if len(groups) > 1:
        return [f"The laws disagree: {sentence}"]
    out = [sentence[0].upper() + sentence[1:]]
    if len(results) > 1 and results[0].turns:
        apart = max(np.ptp([t.at for t in at])
                    for at in zip(*(r.turns for r in results), strict=True))  # fmt: skip
        out.append(f"The choice of law alone moves a crossing by {apart:.1f} decades.")
    return out


def _probability(results: Sequence[LawCrossing]) -> str:
    none = [r.lead.none for r in results if r.lead is not None]
    if not none:
        return "No law has joint resamples, so no probability can be given."
    across = " across laws" if len(none) > 1 else ""
    return f"The bootstrap probability of no crossing is {_range(none, '{:.2f}', ' to ')}{across}."


def _settled(
    settled: Sequence[Stretch], names: tuple[str, str], sure: str, shared: float, horizon: float
) -> str:
    """Where a family leads with enough probability under all laws together."""
    sided = [(s, s.leader) for s in settled if s.leader is not None]
    if not sided:
        return f"At no compute up to 10^{horizon:g} FLOPs does a family lead {sure}."
    spans = [f"{names[leader]} leads from 10^{s.low:.2f} to 10^{s.high:.2f} FLOPs"
             for s, leader in sided]  # fmt: skip
    text = f"{sure[0].upper()}{sure[1:]}, {_listed(spans)}"
    if sided[-1][0].high > shared:
        text += f" (by extrapolation beyond 10^{shared:.1f})"
    rest = len(sided) < len(settled)
    return text + (f"; elsewhere up to 10^{horizon:g} the lead is open." if rest else ".")


def _supported(settled: Sequence[Stretch], names: tuple[str, str], shared: float) -> list[str]:
    """A sentence for each crossing that lies between settled leads of both families."""
    out = []
    for a, b in pairwise([s for s in settled if s.leader is not None]):
        if b.leader is None or a.leader == b.leader:
            continue
        where = "within the data"
        if b.low > shared:
            where = (f"but the place is an extrapolation of {max(a.high - shared, 0):.1f} to "
                     f"{b.low - shared:.1f} decades beyond the runs (10^{shared:.1f})")  # fmt: skip
        out.append(f"That {names[b.leader]} overtakes is supported, between 10^{a.high:.2f} and "
                   f"10^{b.low:.2f} FLOPs, {where}.")  # fmt: skip
    return out


def _unsupported(places: Sequence[float], shared: float) -> str:
    """What is left to say where no crossing is supported: where curves cross, if they do."""
    if not places:
        return (f"A crossing far beyond the runs (10^{shared:.1f}) cannot be excluded by laws that "
                "were fitted below it.")  # fmt: skip
    if min(places) > shared:
        what = (f"it would lie {min(places) - shared:.1f} decades or more beyond the runs "
                f"(10^{shared:.1f}).")  # fmt: skip
    elif max(places) <= shared:
        what = f"the fitted crossings lie within the data (up to 10^{shared:.1f})."
    else:
        what = (f"the earliest fitted crossing lies within the data (up to 10^{shared:.1f}), the "
                f"latest {max(places) - shared:.1f} decades beyond.")  # fmt: skip
    return f"A crossing cannot be concluded from these runs, nor excluded: {what}"
