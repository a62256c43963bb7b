"""Figures of fits to one family and to several: the law over compute, and what it leaves over.

As in `plots.py`, every function returns (figure, rows).
"""

from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.fit import Fit
from mmfree_jax.experiments.scaling.frame import compute
from mmfree_jax.experiments.scaling.joint import JointFit
from mmfree_jax.experiments.scaling.plots import Rows, band_of
from mmfree_jax.experiments.scaling.report import number
from mmfree_jax.figures import COLOURS, count, set_ticks


def plot_fit(fit: Fit) -> tuple[Figure, Rows]:
    """Loss over compute with the law and its band; then the residuals of log loss over N and D.

    Laws of compute alone have their residuals over compute.
    """
    figure, (left, *right) = _panels(fit)
    x, loss = fit.inputs, np.exp(fit.log_loss)
    c = _computes(fit)
    names = sorted({str(f) for f in fit.frame.family if f})
    runs = f"{names[0]}: runs" if len(names) == 1 else "runs"
    if "params" in x:
        points = left.scatter(c, loss, c=x["params"], s=14, cmap="viridis", norm=LogNorm(),
                              zorder=3, label=runs)  # fmt: skip
        bar = figure.colorbar(points, ax=left, label="parameters N")
        set_ticks(bar.ax.yaxis, count)
    else:
        left.scatter(c, loss, s=14, color=COLOURS[0], zorder=3, label=runs)
    grid = np.linspace(np.log10(c.min()), np.log10(c.max()) + 1, 200)
    line = curve(fit.law, fit.vector(), grid, fit.cost)[0]
    label = "compute-optimal" if "params" in x else fit.law.name
    left.plot(10**grid, line, color="black", lw=1.2, label=label)
    band = None
    if fit.bootstrap is not None:
        band = band_of(curve(fit.law, fit.bootstrap.parameters[:1000], grid, fit.cost), fit.level)
    if band is not None:
        left.fill_between(10**grid, *band, color="black", alpha=0.15, lw=0,
                          label=f"{100 * fit.level:.0f}% interval")  # fmt: skip
    rows = _run_rows("run", fit)
    for i, g in enumerate(grid):
        row = {"series": label, "compute": 10**g, "fitted": line[i]}
        if band is not None:
            row |= {"low": band[0][i], "high": band[1][i]}
        rows.append(row)
    _residuals(right, {names[0] if len(names) == 1 else "runs": fit})
    _finish(left, fit)
    return figure, rows


def plot_joint(fit: JointFit) -> tuple[Figure, Rows]:
    """Every family's runs, least loss over compute and the floor; then residuals over N and D."""
    rows: Rows = []
    first = next(iter(fit.fits.values()))
    figure, (left, *right) = _panels(first)
    seen, lines = [], []
    for k, (name, own) in enumerate(fit.fits.items()):
        colour, c = COLOURS[k % len(COLOURS)], _computes(own)
        loss = np.exp(own.log_loss)
        left.scatter(c, loss, s=14, color=colour, label=f"{name}: runs")
        rows += _run_rows(f"{name} run", own)
        grid = np.linspace(np.log10(c.min()), np.log10(c.max()) + 1, 200)
        line = curve(own.law, own.vector(), grid, own.cost)[0]
        rows += [{"series": f"{name} law", "compute": 10**g, "fitted": v}
                 for g, v in zip(grid, line, strict=True)]  # fmt: skip
        left.plot(10**grid, line, color=colour, lw=1.2, label=f"{name}: least loss by the law")
        seen.append(loss)
        lines.append(line[np.isfinite(line)])
    low, high = float(np.concatenate([*seen, *lines]).min()), float(np.concatenate(seen).max())
    floor = fit.sharing.law.floor
    if floor in fit.sharing.shared:
        value = fit.parameters[floor]
        left.axhline(value, color="black", lw=0.8, ls=":",
                     label=f"shared {floor} = {number(value)}")  # fmt: skip
        low = min(low, value)
    room = 0.05 * (high - low)
    left.set_ylim(low - room, high + room)
    _residuals(right, fit.fits)
    _finish(left, first)
    return figure, rows


def _panels(fit: Fit) -> tuple[Figure, list[Axes]]:
    """A figure with a wide panel for the law and one for residuals over each input."""
    over = len(_inputs(fit))
    figure = Figure(figsize=(6.0 + 3.2 * over, 4.2), layout="constrained")
    axes = figure.subplots(1, 1 + over, width_ratios=[1.7, *[1.0] * over])
    for later in axes[2:]:
        later.sharey(axes[1])
    return figure, list(axes)


def _inputs(fit: Fit) -> dict[str, str]:
    """What residuals are drawn over, with the labels of their axes."""
    labels = {"params": "parameters N", "tokens": "training tokens D"}
    found = {name: label for name, label in labels.items() if name in fit.inputs}
    return found or {"compute": "training compute, FLOPs"}


def _computes(fit: Fit) -> np.ndarray:
    return compute(fit.frame, fit.flops)


def _run_rows(series: str, fit: Fit) -> Rows:
    loss, fitted = np.exp(fit.log_loss), fit.predict(fit.inputs)
    columns = {"compute": _computes(fit), **{n: fit.inputs[n] for n in _inputs(fit)},
               "loss": loss, "fitted": fitted, "log_residual": np.log(loss / fitted)}  # fmt: skip
    return [{"series": series, **{n: v[i] for n, v in columns.items()}} for i in range(len(loss))]


def _residuals(panels: list[Axes], fits: Mapping[str, Fit]) -> None:
    """Residuals of log loss, a colour a family, in one panel for each input."""
    for k, (name, fit) in enumerate(fits.items()):
        left_over = fit.log_loss - np.log(fit.predict(fit.inputs))
        for axes, (axis, label) in zip(panels, _inputs(fit).items(), strict=True):
            axes.scatter(fit.inputs[axis], left_over, s=14, color=COLOURS[k % len(COLOURS)],
                         label=name)  # fmt: skip
            axes.set(xscale="log", xlabel=label)
    for axes in panels:
        axes.axhline(0, color="black", lw=0.8)
        set_ticks(axes.xaxis, count)
    panels[0].set_ylabel("log L - log L fitted")
    panels[0].set_title("residuals", fontsize=9)
    set_ticks(panels[0].yaxis)
    panels[0].legend(fontsize=8)


def _finish(left: Axes, fit: Fit) -> None:
    left.set(xscale="log", xlabel="training compute, FLOPs", ylabel="loss, nats a token")
    left.set_title(fit.law.formula, fontsize=9)
    left.legend(fontsize=8)
    set_ticks(left.xaxis)
    set_ticks(left.yaxis)
