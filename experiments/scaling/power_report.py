"""A power between columns as text, JSON and a figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmfree_jax.experiments.scaling.fitted_law import POWER
from mmfree_jax.experiments.scaling.grouped import grouped
from mmfree_jax.experiments.scaling.plots import Rows
from mmfree_jax.experiments.scaling.power_relation import Estimate, PowerRelation
from mmfree_jax.experiments.scaling.report import number, with_interval
from mmfree_jax.figures import COLOURS
from mmfree_jax.installed import versions


def power_document(fit: PowerRelation, estimate: Estimate) -> dict[str, Any]:
    """The JSON document of a power between columns."""
    return {
        "law": POWER,
        "formula": fit.formula,
        "parameters": {"k": float(np.exp(fit.coefficients[0])), **fit.exponents},
        "n": len(fit.columns[fit.y]),
        "intervals": {name: list(ends) for name, ends in fit.intervals.items()},
        "warnings": fit.warnings,
        "objective_function": f"sum over rows of (log {fit.y} fitted - log {fit.y})^2",
        "interval_level": fit.level,
        "interval_method": "Student's t" if fit.degrees else "none",
        "residual_of_log": fit.residual,
        "degrees_of_freedom": fit.degrees,
        "log_coefficients": fit.coefficients,
        "log_covariance": fit.covariance,
        "estimate": {"at": estimate.at, "value": estimate.value, "interval": estimate.interval,
                     "interval_of_one_more": estimate.further},
        "rows": {name: fit.columns[name] for name in (fit.y, *fit.x)},
        "versions": versions("mmfree-jax", "numpy", "scipy"),
    }  # fmt: skip


def power_text(fit: PowerRelation, estimate: Estimate) -> str:
    """A power between columns as lines of text."""
    why = "no interval: see warnings"
    lines = [f"{fit.formula}  (columns as the file counts them)",
             f"  least squares on log {fit.y}, n = {len(fit.columns[fit.y])}"
             + (f", residual {100 * fit.residual:.2g}%" if fit.degrees else "")]  # fmt: skip
    for name, value in fit.exponents.items():
        shown = with_interval(value, fit.intervals.get(name), why)
        lines.append(f"  exponent of {name:<22} {shown}")
    place = ", ".join(f"{name} {number(value)}" for name, value in estimate.at.items())
    shown = with_interval(estimate.value, estimate.interval, why)
    more = estimate.further
    lines.append(
        f"  at {place}: {fit.y} {shown}"
        + (f"; one more {fit.y} [{number(more[0])}, {number(more[1])}]" if more else "")
    )
    lines.append(f"  ({100 * fit.level:.0f}% intervals: Student's t)")
    return "\n".join(lines + [f"  warning: {w}" for w in grouped((w,) for w in fit.warnings)])


def plot_power(fit: PowerRelation) -> tuple[Figure, Rows]:
    """With one x: y over it, the power and its band. With more: y against the fitted y."""
    measured = fit.columns[fit.y]
    fitted = np.array([fit.at({x: fit.columns[x][i] for x in fit.x}).value
                       for i in range(len(measured))])  # fmt: skip
    rows: Rows = [
        {"series": "row", **{x: fit.columns[x][i] for x in fit.x}, fit.y: measured[i],
         "fitted": fitted[i]} for i in range(len(measured))
    ]  # fmt: skip
    figure = Figure(figsize=(6.0, 4.2), layout="constrained")
    axes = figure.subplots()
    if len(fit.x) == 1:
        x = fit.columns[fit.x[0]]
        grid = np.geomspace(x.min(), x.max() * 3, 60)
        along = [fit.at({fit.x[0]: g}) for g in grid]
        axes.plot(x, measured, "o", color=COLOURS[0], ms=4, label="rows")
        axes.plot(grid, [e.value for e in along], color="black", lw=1.2, label=fit.formula)
        bands = np.array([e.interval for e in along if e.interval is not None])
        if len(bands):
            axes.fill_between(grid, bands[:, 0], bands[:, 1], color="black", alpha=0.15, lw=0,
                              label=f"{100 * fit.level:.0f}% interval")  # fmt: skip
        rows += [{"series": "power", fit.x[0]: g, "fitted": e.value,
                  "low": e.interval and e.interval[0], "high": e.interval and e.interval[1]}
                 for g, e in zip(grid, along, strict=True)]  # fmt: skip
        axes.set(xlabel=fit.x[0], ylabel=fit.y)
    else:
        ends = [min(measured.min(), fitted.min()), max(measured.max(), fitted.max())]
        axes.plot(fitted, measured, "o", color=COLOURS[0], ms=4, label="rows")
        axes.plot(ends, ends, color="black", lw=1, label="equal")
        axes.set(xlabel=f"fitted {fit.y}", ylabel=fit.y, title=fit.formula)
    axes.set(xscale="log", yscale="log")
    axes.legend(fontsize=8)
    return figure, rows
