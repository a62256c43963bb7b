"""Laws scored on held-out budgets: as a JSON document, as text and as a figure."""

from typing import Any

import numpy as np
from matplotlib.figure import Figure

from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.extrapolation import DECADES, Extrapolation
from mmfree_jax.experiments.scaling.frame import definitions
from mmfree_jax.experiments.scaling.grouped import grouped
from mmfree_jax.experiments.scaling.report import meaning_of, with_interval
from mmfree_jax.figures import COLOURS, set_ticks
from mmfree_jax.installed import versions


def _averages(result: Extrapolation) -> list[dict[str, Any]]:
    """The average over laws at the largest compute and beyond."""
    log10_c = np.log10(result.targets[:, 0].max()) + np.array(DECADES)
    return [
        {"compute": float(10**c), "decades_beyond_data": decades, "loss": float(loss),
         "interval": [float(low), float(high)] if np.isfinite(low) else None}
        for c, decades, (loss, low, high) in
        zip(log10_c, DECADES, result.average(log10_c).T, strict=True)
    ]  # fmt: skip


def _definitions(result: Extrapolation) -> dict[str, str]:
    fit = result.scores[0].fit
    return definitions(fit.frame, fit.size, fit.flops)


def _warnings(result: Extrapolation) -> list[str]:
    names = [s.fit.law.name for s in result.scores]
    said = [(s.fit.law.name, w) for s in result.scores for w in s.fit.warnings]
    return grouped(said, [names])


def extrapolation_document(result: Extrapolation) -> dict[str, Any]:
    """The JSON document; laws in order of weight."""
    return {
        "laws": {
            s.fit.law.name: {
                "weight": s.weight,
                "held_out": {
                    "rms_log_error": s.rms, "mean_log_error": s.bias,
                    "predictions": [{"fitted_below": f.below, "fitted_runs": f.fitted,
                                     "budget": f.at, "log_error": f.error} for f in s.folds],
                },
                "parameters": s.fit.parameters,
                "objective": s.fit.search.objective,
                "objective_function": s.fit.objective.formula,
                "n": len(s.fit.frame),
                "rms_log_residual": _residual(s.fit.predict(s.fit.inputs), s.fit.log_loss),
                "intervals": {k: list(v) for k, v in s.fit.intervals.items()},
            }
            for s in result.scores
        },
        "laws_not_scored": result.skipped,
        "held_out_budgets": result.held_out.tolist(),
        "scatter": result.scatter,
        "average": _averages(result),
        "interval_level": result.level,
        "definitions": _definitions(result),
        "seed": result.seed,
        "warnings": _warnings(result),
        "versions": versions("mmfree-jax", "numpy", "scipy"),
    }  # fmt: skip


def _residual(fitted: np.ndarray, log_loss: np.ndarray) -> float:
    return float(np.sqrt(np.mean((np.log(fitted) - log_loss) ** 2)))


def extrapolation_text(result: Extrapolation) -> str:
    """Scores beside the fits to all runs, and the average over laws, as lines of text."""
    held = len(result.held_out)
    lines = [f"the {held} largest budgets held out, from {result.held_out[0]:.2e} FLOPs; errors "
             "of log loss: rms, mean; weight in an average; then the fit to all runs"
             if held > 1 else
             f"the largest budget held out, {result.held_out[0]:.2e} FLOPs; errors of log loss: "
             "rms, mean; weight in an average; then the fit to all runs",
             f"  {meaning_of(_definitions(result))}"]  # fmt: skip
    for s in result.scores:
        residual = _residual(s.fit.predict(s.fit.inputs), s.fit.log_loss)
        lines.append(
            f"  {s.fit.law.name:<12} {100 * s.rms:6.2f}% {100 * s.bias:+6.2f}%  {s.weight:5.2f}   "
            f"rms {100 * residual:.2f}%, objective {s.fit.search.objective:.6g}, "
            f"{len(s.fit.frame)} runs, {len(s.fit.law.parameters)} parameters"
        )
    lines += [f"  {name:<12} not scored: {why}" for name, why in result.skipped.items()]
    lines.append(f"average over laws ({100 * result.level:.0f}% of all their refits together):")
    for row in _averages(result):
        shown = with_interval(row["loss"], row["interval"], "no interval for want of a --bootstrap")
        lines.append(f"  loss at {row['compute']:.2e} FLOPs {shown}")
    return "\n".join(lines + [f"  warning: {w}" for w in _warnings(result)])


def plot_extrapolation(result: Extrapolation) -> tuple[Figure, list[dict]]:
    """Left: each law by the cheaper runs, and the runs; right: its errors on budgets held out."""
    rows: list[dict] = []
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    c, loss = result.targets.T
    seen = c < 0.99 * result.held_out[0]
    grid = np.linspace(np.log10(c.min()), np.log10(c.max()) + 0.5, 200)
    for j, s in enumerate(result.scores):
        colour, name = COLOURS[j % len(COLOURS)], s.fit.law.name
        line = curve(s.fit.law, s.shortest, grid, s.fit.cost)[0]
        left.plot(10**grid, line, color=colour, lw=1.2, label=f"{name}, weight {s.weight:.2f}")
        rows += [{"series": name, "compute": 10**g, "loss": v}
                 for g, v in zip(grid, line, strict=True)]  # fmt: skip
        y = len(result.scores) - j
        errors = [100 * f.error for f in s.folds]
        right.plot(errors, np.full(len(errors), y), "o", color=colour, ms=4, mfc="none")
        rows += [{"series": f"{name} held out", "compute": f.at, "fitted_below": f.below,
                  "log_error": f.error} for f in s.folds]  # fmt: skip
    left.scatter(c[seen], loss[seen], s=16, color="black", zorder=3, label="runs fitted")
    left.scatter(c[~seen], loss[~seen], s=16, facecolor="white", edgecolor="black", zorder=3,
                 label="runs held out")  # fmt: skip
    rows += [{"series": "run", "compute": a, "loss": b} for a, b in zip(c, loss, strict=True)]
    room = 0.15 * (loss.max() - loss.min())
    left.set(xscale="log", xlabel="training compute, FLOPs", ylabel="loss, nats a token",
             ylim=(loss.min() - 2 * room, loss.max() + room))  # fmt: skip
    left.legend(fontsize=7)
    for axis in (left.xaxis, left.yaxis):
        set_ticks(axis)
    right.axvline(0, color="black", lw=0.8)
    names = [s.fit.law.name for s in result.scores]
    right.set_yticks(range(len(names), 0, -1), names)
    right.set(xlabel="predicted less measured log loss of budgets held out, %",
              ylim=(0.5, len(names) + 0.5))  # fmt: skip
    return figure, rows
