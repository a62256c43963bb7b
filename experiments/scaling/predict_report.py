"""Predictions as a JSON document and as text in which no number stands alone."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.predict import (
    ENOUGH,
    Equivalent,
    Estimate,
    Place,
    Prediction,
)
from mmfree_jax.experiments.scaling.report import number
from mmfree_jax.experiments.scaling.training_cost import SIX
from mmfree_jax.experiments.scaling.uncertainty import Interval
from mmfree_jax.installed import versions

_AXES = {
    "params": "N",
    "tokens": "D",
    "compute": "C",
    "6nd": "6 N D",
    "tokens_per_param": "D / N",
    "bits": "bits",
    "unique_tokens": "unique tokens",
}


def predict_document(
    predictions: Sequence[Prediction],
    equivalents: Sequence[Equivalent],
    reference: str | None,
    level: float,
) -> dict[str, Any]:
    """The JSON document: every family at the place, and what equals the reference there."""
    first = predictions[0]
    return {
        "predictions": [_prediction(p) for p in predictions],
        "at": {"params": first.place.params, "tokens": first.place.tokens,
               "compute": first.place.compute, "bits": first.place.bits,
               "unique_tokens": first.place.unique_tokens},
        "equal_to": reference,
        "equivalents": [
            {"family": e.family, "what": e.what, "base": e.base, "needed": _estimate(e.needed),
             "multiple": _estimate(e.multiple)} for e in equivalents
        ],
        "interval_level": level,
        "interval_method": "bias-corrected percentiles of bootstrap refits, of the mean loss of "
        "runs; new_run is of the loss of one run. null is no amount",
        "warnings": warnings(predictions),
        "versions": versions("mmfree-jax", "numpy", "scipy"),
    }  # fmt: skip


def _estimate(e: Estimate) -> dict[str, Any]:
    return {"value": e.value, "interval": e.interval and list(e.interval),
            "share_never": e.never, "share_undefined": e.undefined}  # fmt: skip


def _prediction(p: Prediction) -> dict[str, Any]:
    optimum = p.optimum
    return {
        "family": p.fitted.family,
        "law": p.fitted.law.name,
        "loss": _estimate(p.loss),
        "new_run_interval": p.new_run and list(p.new_run),
        "compute_optimal": optimum and {
            "params": _estimate(optimum.params), "tokens": _estimate(optimum.tokens),
            "tokens_per_param": _estimate(optimum.tokens_per_param),
        },
        "decades_beyond_runs": p.beyond,
        "definitions": p.fitted.definitions,
        "source": p.fitted.source,
        "resamples": len(p.fitted.resamples),
    }  # fmt: skip


def warnings(predictions: Sequence[Prediction]) -> list[str]:
    """What a reader must know before using the numbers, each once."""
    out = []
    for p in predictions:
        f, name = p.fitted, p.fitted.family
        out += [f"{name}: {text}" for text in f.lacks]
        for axis, decades in p.beyond.items():
            low, high = f.ranges[axis]
            side, end = ("above", high) if decades > 0 else ("below", low)
            out.append(f"{name}: extrapolates: {_AXES[axis]} is {abs(decades):.2f} decades {side} "
                       f"every run's ({number(end)})")  # fmt: skip
        if p.optimum is not None or {"params", "compute"} <= set(f.law.inputs):
            out += _about_compute(p)
        if p.loss.undefined:
            out.append(f"{name}: {100 * p.loss.undefined:.1f}% of the refits have no loss there "
                       "and are left out of the intervals")  # fmt: skip
    return list(dict.fromkeys(out))


def _about_compute(p: Prediction) -> list[str]:
    """How C is counted, where that is not as for every run."""
    f = p.fitted
    if f.cost != SIX:
        return [f"{f.family}: C is 6 N D (1 + {number(f.cost.excess)} / N^"
                f"{number(f.cost.shrink)}), from the fitted runs (within "
                f"{100 * f.cost.worst:.2g}%)"]  # fmt: skip
    low, high = f.ranges.get("flops_per_6nd", (1.0, 1.0))
    if max(high, 1 / low) > 1.01:
        return [f"{f.family}: C is taken to be 6 N D, but the runs' FLOPs are {low:.3g} to "
                f"{high:.3g} times that"]  # fmt: skip
    if not f.ranges and not f.conventions["flops"].startswith("6nd"):
        return [f"{f.family}: C is taken to be 6 N D, not {f.definitions['C']}"]
    return []


def predict_text(
    predictions: Sequence[Prediction],
    equivalents: Sequence[Equivalent],
    reference: str | None,
    level: float,
) -> str:
    """Predictions as lines of text."""
    place = predictions[0].place
    lines = [f"at {_place(place)} ({100 * level:.0f}% bootstrap intervals):"]
    meanings: dict[str, list[str]] = {}
    for p in predictions:
        f = p.fitted
        said = "; ".join(f"{s}: {f.definitions[s]}" for s, i in (("N", "params"), ("C", "compute"))
                         if i in f.law.inputs)  # fmt: skip
        meanings.setdefault(said, []).append(f.family)
        lines.append(f"  {f.family}, {f.law.formula}:")
        if p.optimum is not None:
            for label, e in (("N*", p.optimum.params), ("D*", p.optimum.tokens),
                             ("D* / N*", p.optimum.tokens_per_param)):  # fmt: skip
                lines.append(f"    {label:<9} {_shown(e)}")
        new_run = "" if p.new_run is None else f"; one new run {_ends(p.new_run)}"
        lines.append(f"    {'loss':<9} {_shown(p.loss)} nats a token, the mean of such runs"
                     f"{new_run}")  # fmt: skip
    if reference is not None:
        lines.append(f"to equal the loss of {reference} there:")
    for e in equivalents:
        lines.append("  " + _equivalent(e, str(reference)))
    for said, families in meanings.items():
        whose = "" if len(meanings) == 1 else f"{', '.join(families)}: "
        lines.append(f"({whose}{said})")
    return "\n".join(lines + [f"  warning: {w}" for w in warnings(predictions)])


def _place(place: Place) -> str:
    if place.compute is not None:
        return f"C = {number(place.compute)} FLOPs"
    text = f"N = {number(place.params)}, D = {number(place.tokens)} tokens"
    if place.unique_tokens is not None:
        text += f" ({number(place.unique_tokens)} of them unique)"
    return text if place.bits is None else f"{text}, {number(place.bits)} bits"


def _ends(interval: Interval) -> str:
    low, high = ("never" if end is None else number(end) for end in interval)
    return f"[{low}, {high}]"


def _shown(e: Estimate) -> str:
    """A value with its interval, or why it has none."""
    value = "none" if np.isnan(e.value) else "no amount" if np.isinf(e.value) else number(e.value)
    if e.interval is None:
        return f"{value} (no interval: fewer than {ENOUGH} refits)"
    return f"{value} {_ends(e.interval)}"


def _equivalent(e: Equivalent, reference: str) -> str:
    """What a family needs, and how one amount compares with the other's."""
    never = f"; no amount is enough in {100 * e.needed.never:.1f}% of the refits" * bool(
        e.needed.never
    )
    if e.what == "params":
        return (f"{e.family} at the same D needs N = {_shown(e.needed)}: one parameter of "
                f"{reference} equals {_shown(e.multiple)} of {e.family}{never}")  # fmt: skip
    if e.what == "tokens":
        return (f"{e.family} at the same N needs D = {_shown(e.needed)} tokens, "
                f"{_shown(e.multiple)} times as many{never}")  # fmt: skip
    return (f"{e.family} needs C = {_shown(e.needed)} FLOPs, {_shown(e.multiple)} times as many, "
            f"each family at its best N and D{never}")  # fmt: skip
