"""The figure of a sweep's report: loss over compute, the best rates, the gap between families."""

import statistics
from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from mmfree_jax.experiments.sweep.rates import Choice
from mmfree_jax.experiments.sweep.table import Row
from mmfree_jax.figures import COLOURS, count, set_ticks

_GREY = "#555555"
_STYLES = ("-", "--", ":", "-.")
_MARKS = "osD^"
Rows = list[dict]


def plot_report(
    rows: Sequence[Row], choices: Sequence[Choice], families: Sequence[str]
) -> tuple[Figure, Rows]:
    """Panels for what a sweep has so far, and the numbers in them, with a `series` column.

    Args:
      rows: the runs to compare (`report.best_rows`).
      choices: learning rates, of sizes or of cells.
      families: all of the sweep; gaps are of each against the last.
    """
    looks = {f: (_STYLES[k % 4], _MARKS[k % 4]) for k, f in enumerate(families)}
    losses = _losses(rows)
    gaps = {f: _gaps(losses, f, families[-1]) for f in families[:-1]}
    sizes = dict.fromkeys(size for cells in losses.values() for size, _ in cells)
    colours = {size: COLOURS[k % len(COLOURS)] for k, size in enumerate(sizes)}
    panels = [lambda axes: _plot_losses(axes, losses, looks, colours)] if losses else []
    if choices:
        panels.append(lambda axes: _plot_rates(axes, choices, looks))
    if any(gaps.values()):
        panels.append(lambda axes: _plot_gaps(axes, gaps, families[-1], looks, colours))
    figure = Figure(figsize=(5.2 * max(1, len(panels)), 4.4), layout="constrained")
    drawn: Rows = []
    for axes, draw in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        drawn += draw(axes)
        set_ticks(axes.yaxis)
    return figure, drawn


Cell = tuple[str, str]
"""A size and what its runs spent: the FLOP budget, else tokens."""
Losses = dict[str, dict[Cell, dict[str, tuple[float, float]]]]
"""Family -> cell -> seed -> (FLOPs, held-out loss)."""


def _losses(rows: Sequence[Row]) -> Losses:
    out: Losses = {}
    for row in rows:
        cell = row["size"], row["budget"] or row["tokens"]
        seeds = out.setdefault(row["family"], {}).setdefault(cell, {})
        seeds[row["seed"]] = float(row["flops"]), float(row["loss"])
    return out


def _gaps(losses: Losses, family: str, other: str) -> list[tuple[float, float, str]]:
    """(FLOPs, loss less that of the other, size) of a family's runs with a partner."""
    return [
        (flops, loss - losses[other][cell][seed][1], cell[0])
        for cell, seeds in losses.get(family, {}).items()
        for seed, (flops, loss) in seeds.items()
        if seed in losses.get(other, {}).get(cell, {})
    ]


Looks = Mapping[str, tuple[str, str]]
"""Family -> style of its lines, its mark."""


def _plot_losses(axes: Axes, losses: Losses, looks: Looks, colours: Mapping[str, str]) -> Rows:
    """Mean over seeds, a line a family and size."""
    rows: Rows = []
    for family, cells in losses.items():
        style, mark = looks[family]
        for size, colour in colours.items():
            points = sorted(
                tuple(map(statistics.mean, zip(*seeds.values(), strict=True)))
                for (name, _), seeds in cells.items() if name == size
            )  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), style, marker=mark, ms=4, lw=1.2,
                          color=colour, mfc=colour if style == "-" else "none")  # fmt: skip
            rows += [{"series": f"loss {family}", "size": size, "flops": c, "value": loss}
                     for c, loss in points]  # fmt: skip
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="held-out loss, nats a token")
    keys = _family_keys(looks)
    keys |= {size: Line2D([], [], color=colour, lw=2) for size, colour in colours.items()}
    axes.legend(list(keys.values()), list(keys), fontsize=7)
    set_ticks(axes.xaxis)
    return rows


def _plot_rates(axes: Axes, choices: Sequence[Choice], looks: Looks) -> Rows:
    """Chosen rates over size; a ring where the best one was at an end of its list."""
    rows: Rows = []
    for family, (style, mark) in looks.items():
        own = [c for c in choices if c.family == family]
        axes.plot([c.params for c in own], [c.rate for c in own], mark, ms=5, color=_GREY,
                  mfc=_GREY if style == "-" else "none")  # fmt: skip
        edge = [c for c in own if c.at_edge]
        axes.plot([c.params for c in edge], [c.rate for c in edge], "o", ms=11, mfc="none",
                  color="black")  # fmt: skip
        rows += [{"series": f"rate {family}", "size": c.size, "params": c.params, "value": c.rate,
                  "at_edge": c.at_edge} for c in own]  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="parameters without embedding and head",
             ylabel="best learning rate")  # fmt: skip
    keys = _family_keys({family: ("", mark) for family, (_, mark) in looks.items()})
    if any(c.at_edge for c in choices):
        keys["at an end of its list"] = Line2D([], [], color="black", marker="o", mfc="none", ls="",
                                               ms=11)  # fmt: skip
    axes.legend(list(keys.values()), list(keys), fontsize=7)
    set_ticks(axes.xaxis, count)
    return rows


def _plot_gaps(
    axes: Axes, gaps: Mapping[str, list[tuple[float, float, str]]], other: str, looks: Looks,
    colours: Mapping[str, str],
) -> Rows:  # fmt: skip
    """A point a pair of runs of the same size, budget and seed."""
    rows: Rows = []
    for family, points in gaps.items():
        for flops, gap, size in points:
            axes.plot(flops, gap, looks[family][1], ms=5, color=colours[size])
        axes.plot([], [], looks[family][1], ms=5, color=_GREY, label=f"{family} less {other}")
        rows += [{"series": f"gap {family} less {other}", "size": size, "flops": c, "value": gap}
                 for c, gap, size in points]  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel=f"training FLOPs of {', '.join(gaps)}",
             ylabel="gap in held-out loss, nats a token")  # fmt: skip
    axes.legend(fontsize=7, title="same size, budget and seed", title_fontsize=7)
    set_ticks(axes.xaxis)
    return rows


def _family_keys(looks: Looks) -> dict[str, Line2D]:
    """One key a family; the first one's marks are filled."""
    return {
        family: Line2D([], [], color=_GREY, ls=style, marker=mark, ms=4, lw=1.2,
                       mfc=_GREY if k == 0 else "none")
        for k, (family, (style, mark)) in enumerate(looks.items())
    }  # fmt: skip
