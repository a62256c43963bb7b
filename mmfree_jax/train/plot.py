"""Figures of what one or several runs logged: a panel a metric, a colour a run."""

import itertools
import os
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmfree_jax.errors import ConfigError
from mmfree_jax.figures import COLOURS, count, number, set_ticks
from mmfree_jax.files import StrPath, check_file, open_atomically
from mmfree_jax.places import locate
from mmfree_jax.saved.run_directory import METRICS
from mmfree_jax.train.metric_series import (
    RunMetrics,
    Series,
    XAxis,
    check_logged,
    read_metrics,
)
from mmfree_jax.train.smoothing import smooth

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_X_LABELS = {"steps": "step", "tokens": "training tokens", "flops": "training FLOPs"}
_UNITS = {
    "loss": "loss (nats per token)",
    "bits_per_byte": "bits per byte",
    "accuracy": "accuracy (share of tokens)",
    "grad_norm": "gradient norm",
    "grad_norm_max": "largest gradient norm",
    "learning_rate": "learning rate",
    "tokens_per_s": "tokens/s",
    "mfu": "model FLOPs utilisation (share)",
    "eta_s": "time left (s)",
    "zero_share": "zero weights (share)",
    "changed_share": "weights changed (share)",
}
# Known exactly at each record: there is no noise to smooth.
_EXACT = {"learning_rate", "skipped_steps", "eta_s"}

# More runs than colours: the next ones get other lines and marks.
_LINES = ("-", "--", "-.", ":")
_MARKS = ("o", "s", "^", "D")

# How the files that Matplotlib writes begin, by suffix.
_BEGINS = {
    "png": r"\x89PNG.*Matplotlib",
    "svg": r"<\?xml.*svg",
    "pdf": "%PDF-",
    "eps": "%!PS-",
    "ps": "%!PS-",
    "jpg": r"\xff\xd8",
    "jpeg": r"\xff\xd8",
    "webp": "RIFF",
}
# What a figure can place: beyond it the limits of an axis are no numbers any more.
_LARGEST = 1e100


@dataclass(frozen=True)
class _Curve:
    """What one run has of one metric; None: it logged none."""

    train: Series | None
    held_out: Series | None


@dataclass(frozen=True)
class _Look:
    colour: str
    line: str
    mark: str


def plot_metrics(runs: Sequence[Path], output: StrPath, **options: Any) -> list[str]:
    """Draws metrics of runs into a file.

    Args:
      runs: run directories.
      output: image file, or its URL; its suffix gives the format.
      **options: those of `draw_metrics`.

    Returns:
      What the figure leaves out, a line each.

    Raises:
      ConfigError: as `draw_metrics`, or the suffix is of no format.
      TrainingError: a metrics.jsonl is damaged.
      OutputError: the file cannot be written, or is there and no such figure.
    """
    kind = locate(output, "output").suffix.removeprefix(".").lower() or "png"
    if kind not in _BEGINS:
        raise ConfigError(f"output is {str(output)!r}: let it end in .{', .'.join(_BEGINS)}")
    check_file(output, _BEGINS[kind], sources=[run / METRICS for run in runs])
    figure, notes = draw_metrics(runs, **options)
    with warnings.catch_warnings(record=True) as caught, open_atomically(output) as file:
        warnings.filterwarnings("always", "Glyph .* missing")
        figure.savefig(file, dpi=150, format=kind)
    if caught:
        notes.append("the font of figures lacks characters of the names: boxes stand for them")
    return notes


def draw_metrics(
    runs: Sequence[Path],
    *,
    metrics: Sequence[str] = ("loss",),
    x: XAxis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.8,
    labels: Sequence[str] | None = None,
) -> tuple["Figure", list[str]]:
    """Draws metrics of runs: training (as recorded, and smoothed) and held-out (marks).

    Args:
      runs: run directories.
      metrics: names of `metrics.jsonl`, a panel each.
      x: quantity on the horizontal axis.
      log_x: draw it on a logarithmic scale.
      log_y: draw the metrics on a logarithmic scale.
      smoothing: weight of the neighbours in the moving average, in [0, 1); 0 draws the records.
      labels: name of each run; default: its folder's.

    Returns:
      The figure, and what it leaves out, a line each: values that are not finite, metrics that
      a run did not log.

    Raises:
      ConfigError: no run logged a metric or a finite value of it, or an argument is out of range.
      TrainingError: a metrics.jsonl is damaged.
    """
    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing is {smoothing}: set a value in [0, 1)")
    if not runs:
        raise ConfigError("no run to plot: name at least one run directory")
    if not metrics:
        raise ConfigError("metrics is empty: name at least one, such as loss")
    if labels is not None and len(labels) != len(runs):
        raise ConfigError(f"labels has {len(labels)} names for {len(runs)} runs: give one for each")
    found = [read_metrics(run) for run in runs]
    metrics = list(dict.fromkeys(metrics))
    check_logged(metrics, found)
    notes: list[str] = []
    panels = {m: [_curve(run, m, x, log_x, log_y, notes) for run in found] for m in metrics}
    for metric, curves in panels.items():
        if not any(_finite(s) for c in curves for s in (c.train, c.held_out)):
            where = ", ".join(str(run / METRICS) for run in runs)
            above = " above 0" if log_x or log_y else ""
            raise ConfigError(f"{where} has no finite {metric}{above}: there is nothing to draw")
    names = list(labels or _names(runs))
    return _draw(names, panels, x=x, log_x=log_x, log_y=log_y, smoothing=smoothing), notes


def _names(runs: Sequence[Path]) -> list[str]:
    """The runs' folders; where two have one name, with the folders in which they differ."""
    names = [run.name or str(run) for run in runs]
    if len(set(names)) == len(names):
        return names
    full = [run.absolute() for run in runs]
    shared = os.path.commonpath([run.parent for run in full])
    return [str(run.relative_to(shared)) for run in full]


def _finite(series: Series | None) -> int:
    return 0 if series is None else int(np.isfinite(series.x + series.y).sum())


def _curve(
    run: RunMetrics, metric: str, x: XAxis, log_x: bool, log_y: bool, notes: list[str]
) -> _Curve:
    """A metric of a run as it can be drawn; what cannot is added to the notes."""
    drawn: list[Series | None] = []
    lost = below = 0
    for kind in ("train", "eval", "tasks"):
        series = run.series(kind, metric, x)
        xs, ys = series.x.copy(), series.y.copy()
        outside = ~((abs(xs) < _LARGEST) & (abs(ys) < _LARGEST))
        unfit = ~outside & ((log_x & (xs < 1 / _LARGEST)) | (log_y & (ys < 1 / _LARGEST)))
        lost, below = lost + int(outside.sum()), below + int(unfit.sum())
        ys[outside | unfit] = np.nan
        xs[~(abs(xs) < _LARGEST)] = np.nan
        drawn.append(Series(xs, ys) if len(xs) else None)
    if not any(drawn):
        notes.append(f"{run.folder} logged no {metric}")
    for number_of, why in (
        (lost, "not finite or not measured: {} in its curve"),
        (below, "not above 0: {} on the logarithmic axis"),
    ):
        if number_of:
            values, gaps = ("value", "a gap") if number_of == 1 else ("values", "gaps")
            be = "is" if number_of == 1 else "are"
            notes.append(
                f"{number_of} {values} of {metric} of {run.folder} {be} {why.format(gaps)}"
            )
    training, held_out, tasks = drawn
    return _Curve(training, held_out or tasks)


def _looks() -> Iterator[_Look]:
    for line, mark in itertools.cycle(zip(_LINES, _MARKS, strict=True)):
        yield from (_Look(colour, line, mark) for colour in COLOURS)


def _draw(
    names: Sequence[str],
    panels: dict[str, list[_Curve]],
    *,
    x: XAxis,
    log_x: bool,
    log_y: bool,
    smoothing: float,
) -> "Figure":
    # A figure of its own needs no display and leaves pyplot's global state alone.
    from matplotlib.figure import Figure

    columns = 1 if len(panels) < 4 else 2
    rows = -(-len(panels) // columns)
    height = 3.6 if rows == 1 else 2.6 * rows
    width = 7.0 if columns == 1 else 11.0
    figure = Figure(figsize=(width, height), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False, sharex=True).ravel()
    scale, x_label = _x_unit(x, [c for curves in panels.values() for c in curves])
    for axes, (metric, curves) in zip(grid, panels.items(), strict=False):
        weight = 0.0 if metric in _EXACT else smoothing
        for name, look, curve in zip(names, _looks(), curves, strict=False):
            _draw_run(axes, name, look, curve, scale, weight)
        axes.set(xscale="log" if log_x else "linear")
        axes.set_ylabel(_title(metric), parse_math=False)
        axes.set_yscale("log" if log_y else "linear")
        axes.grid(alpha=0.3)
        set_ticks(axes.yaxis, count if metric == "tokens_per_s" else number)
    for axes in grid[len(panels) :]:
        axes.set_visible(False)
    for axes in grid[max(0, len(panels) - columns) : len(panels)]:
        axes.set_xlabel(x_label)
        axes.tick_params(labelbottom=True)
    set_ticks(grid[0].xaxis, count if x in ("steps", "tokens") else number)
    _add_legend(figure, names, panels, smoothing, height)
    return figure


def _title(metric: str) -> str:
    """A metric with its unit; of one source, with its name."""
    name, _, source = metric.partition("/")
    return f"{source}: {_UNITS[name]}" if source and name in _UNITS else _UNITS.get(metric, metric)


def _x_unit(x: XAxis, curves: Sequence[_Curve]) -> tuple[float, str]:
    """What a position is divided by, and the axis' label."""
    if x != "time":
        return 1.0, _X_LABELS[x]
    series = [s for c in curves for s in (c.train, c.held_out) if _finite(s)]
    longest = max(float(np.nanmax(s.x)) for s in series if s is not None)
    seconds, unit = (
        (1, "s") if longest < 180 else (60, "min") if longest < 3 * 3600 else (3600, "h")
    )
    return float(seconds), f"training time ({unit})"


def _draw_run(
    axes: "Axes", name: str, look: _Look, curve: _Curve, scale: float, weight: float
) -> None:
    colour = look.colour
    if curve.train is not None:
        xs, ys = curve.train.x / scale, curve.train.y
        if weight:
            axes.plot(xs, ys, color=colour, alpha=0.3, linewidth=0.8, label=f"{name}, recorded")
        axes.plot(
            xs,
            smooth(ys, weight),
            color=colour,
            linestyle=look.line,
            linewidth=1.6,
            label=f"{name}, training",
        )
        # A value between two gaps makes no line.
        seen = np.concatenate([[False], np.isfinite(xs + ys), [False]])
        alone = seen[1:-1] & ~seen[:-2] & ~seen[2:]
        axes.plot(xs[alone], ys[alone], ".", color=colour, markersize=4, label=f"{name}, alone")
    if curve.held_out is not None:
        axes.plot(
            curve.held_out.x / scale,
            curve.held_out.y,
            color=colour,
            linewidth=0.7,
            linestyle=look.line,
            marker=look.mark,
            markersize=4.5,
            markeredgecolor="white",
            markeredgewidth=0.6,
            label=f"{name}, held-out",
        )


def _add_legend(
    figure: "Figure",
    names: Sequence[str],
    panels: dict[str, list[_Curve]],
    smoothing: float,
    height: float,
) -> None:
    """Above all panels: what the colours are, then what the lines and marks are."""
    from matplotlib.lines import Line2D

    width = int(13 * figure.get_figwidth())  # characters, about
    curves = [(metric, c) for metric, of_metric in panels.items() for c in of_metric]
    smoothed = smoothing > 0 and any(c.train and m not in _EXACT for m, c in curves)
    exact = any(c.train and (not smoothing or m in _EXACT) for m, c in curves)
    keys: list[tuple[str, dict[str, Any]]] = [
        (name, {"color": look.colour, "linestyle": look.line, "linewidth": 3})
        for name, look in zip(names, _looks(), strict=False)
    ]
    grey = {"color": "#555555"}
    if smoothed or exact:
        text = f"training, smoothed ({smoothing:g})" if smoothed else "training"
        keys.append((text, grey | {"linewidth": 1.6}))
    if smoothed:
        keys.append(("training, as recorded", grey | {"alpha": 0.4, "linewidth": 0.8}))
    if any(c.held_out for _, c in curves):
        keys.append(("held-out", grey | {"marker": "o", "markersize": 4.5, "linewidth": 0.7}))
    columns = max(1, width // (max(len(text) for text, _ in keys) + 6))
    if len(keys) > columns:
        blank = ("", {"alpha": 0.0})
        keys[len(names) : len(names)] = [blank] * (-len(names) % columns)
    columns = min(columns, len(keys))
    # A legend is filled column by column.
    keys = [key for column in range(columns) for key in keys[column::columns]]
    legend = figure.legend(
        [Line2D([], [], **style) for _, style in keys],
        ["-"] * len(keys),
        loc="outside upper center",
        ncols=columns,
        frameon=False,
        fontsize=9,
    )
    # Set here as they are: a name may begin with "_" or hold "$".
    for drawn, (text, _) in zip(legend.get_texts(), keys, strict=True):
        drawn.set_parse_math(False)
        drawn.set_text(text)
    figure.set_figheight(height + 0.22 * -(-len(keys) // columns))
