"""Figures of laws that are not a curve over compute alone: what was measured against the fit."""

import numpy as np
from matplotlib.figure import Figure

from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.plots import Rows
from mmfree_jax.figures import COLOURS

_UNITS = {"loss": "loss, nats a token", "accuracy": "accuracy"}


def plot_measured(fit: Fit) -> tuple[Figure, Rows]:
    """Left: the target over the first input (accuracy with its curve); right: the residuals.

    Colours tell the values of the law's further column (bits, passes over the data, chance).
    """
    law, x = fit.law, fit.inputs
    axis = "params" if "params" in x else law.inputs[0]
    target, fitted = np.exp(fit.log_loss), fit.predict(x)
    label, groups = _groups(fit)
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    rows: Rows = []
    for k, value in enumerate(np.unique(groups)):
        here = np.flatnonzero(groups == value)
        colour = COLOURS[k % len(COLOURS)]
        left.plot(x[axis][here], target[here], "o", color=colour, ms=4, label=f"{label} {value:g}")
        left.plot(x[axis][here], fitted[here], "_", color=colour, ms=9)
        right.plot(fitted[here], target[here] - fitted[here], "o", color=colour, ms=4)
        rows += [{"series": "run", axis: x[axis][i], label: groups[i], law.target: target[i],
                  "fitted": fitted[i]} for i in here]  # fmt: skip
        if law.target == "accuracy":
            grid = np.linspace(x["loss"].min(), x["loss"].max(), 200)
            line = fit.predict({"loss": grid, "chance": np.full(len(grid), value)})
            left.plot(grid, line, color=colour, lw=1)
            rows += [{"series": "law", axis: g, label: value, "fitted": v}
                     for g, v in zip(grid, line, strict=True)]  # fmt: skip
    left.set(xscale="log" if axis == "params" else "linear", ylabel=_UNITS[law.target],
             xlabel="parameters N" if axis == "params" else _UNITS["loss"])  # fmt: skip
    left.set_title(law.name, fontsize=9)
    figure.suptitle(law.formula, fontsize=8)
    left.legend(fontsize=8, title="dots: runs; dashes: law", title_fontsize=8)
    right.axhline(0, color="black", lw=0.8)
    right.set(xlabel=f"fitted {law.target}", ylabel=f"{law.target} less fitted")
    right.set_title(f"residuals of {len(target)} runs", fontsize=9)
    return figure, rows


def _groups(fit: Fit) -> tuple[str, np.ndarray]:
    """The name and the values [n] of what tells runs apart besides the inputs, few and round."""
    x = fit.inputs
    if "unique_tokens" in x:
        passes = np.maximum(x["tokens"] / x["unique_tokens"], 1.0)
        return "passes", np.array([float(f"{v:.1g}") for v in passes])
    name = fit.law.also[0]
    return name, x[name]
