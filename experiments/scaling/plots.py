"""Figures, each with the numbers that it draws.

Every function returns (figure, rows): the rows are what `output_files.write_csv` stores beside
the PNG, in long form with a `series` column.
"""

import io
from collections.abc import Iterable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from mmfree_jax.experiments.scaling.compute_optimal import curve
from mmfree_jax.experiments.scaling.crossing import Crossing
from mmfree_jax.experiments.scaling.frame import RunFrame, compute, sizes
from mmfree_jax.experiments.scaling.gap import GapTrend, Pairs
from mmfree_jax.experiments.scaling.isoflop import Allocation
from mmfree_jax.figures import COLOURS, count, number, set_ticks

Rows = list[dict]
_GREY = "#555555"
# Rates that cost more than this are off the page of `plot_rates`, in nats a token.
_MOST_ABOVE = 0.4


def png(figure: Figure) -> bytes:
    """The figure as PNG bytes."""
    stream = io.BytesIO()
    figure.savefig(stream, format="png", dpi=130, bbox_inches="tight")
    return stream.getvalue()


def band_of(draws: np.ndarray, level: float) -> tuple[np.ndarray, np.ndarray] | None:
    """Pointwise interval of curves [R, m], as low and high [m]; None for fewer than 20."""
    if len(draws) < 20:
        return None
    tail = 50 * (1 - level)
    low, high = np.nanpercentile(draws, [tail, 100 - tail], axis=0)
    return low, high


def plot_crossing(result: Crossing) -> tuple[Figure, Rows]:
    """Both families under every law; their difference; who leads how often; the crossings.

    The difference and the share of resamples in which the first family leads have their bands;
    without resamples these two are empty.
    """
    rows: Rows = []
    figure = Figure(figsize=(10.5, 8.4), layout="constrained")
    (left, gap), (lead, right) = figure.subplots(2, 2)
    places = [t.at for r in result.laws for t in r.turns]
    top = min(result.horizon, max([result.data[1] + 3, *places]) + 1)
    grid = np.linspace(result.data[0], top, 200)
    colours = {r.law: COLOURS[j % len(COLOURS)] for j, r in enumerate(result.laws)}
    lines = {}
    for k, (name, style) in enumerate(zip(result.names, ("-", "--"), strict=True)):
        fit = max((r.fits[k] for r in result.laws), key=lambda f: len(f.frame))
        c = compute(fit.frame, fit.flops)
        loss = np.exp(fit.log_loss)
        left.scatter(c, loss, s=16, marker="os"[k], color="black",
                     facecolor="black" if k == 0 else "white", zorder=3)  # fmt: skip
        rows += [{"series": f"{name} run", "compute": a, "loss": b}
                 for a, b in zip(c, loss, strict=True)]  # fmt: skip
        for r in result.laws:
            line = curve(r.fits[k].law, r.fits[k].vector(), grid, r.fits[k].cost)[0]
            lines[k, r.law] = line
            left.plot(10**grid, line, style, color=colours[r.law], lw=1)
            rows += [{"series": f"{name} {r.law}", "compute": 10**g, "loss": v}
                     for g, v in zip(grid, line, strict=True)]  # fmt: skip
    seen = np.concatenate([np.exp(f.log_loss) for r in result.laws for f in r.fits])
    left.set_ylim(0.6 * seen.min(), 1.05 * seen.max())  # a law that runs away stays off the page
    left.axvspan(10 ** result.data[0], 10 ** result.data[1], color="black", alpha=0.05, lw=0)
    left.set(xscale="log", xlabel="training compute, FLOPs", ylabel="loss, nats a token")
    _compute_axes(left)
    grey = Patch(color="black", alpha=0.1, lw=0)
    keys: dict[str, Line2D | Patch] = {
        f"{name}: runs, laws": Line2D([], [], color="black", ls=style, lw=1, marker="os"[k], ms=4,
                                      mfc="black" if k == 0 else "white")
        for k, (name, style) in enumerate(zip(result.names, ("-", "--"), strict=True))
    }  # fmt: skip
    keys |= {law: Line2D([], [], color=colour, lw=2) for law, colour in colours.items()}
    keys["compute of the runs"] = grey
    left.legend(list(keys.values()), list(keys), fontsize=7)
    inside = grid <= result.data[1] + 3
    apart = []
    for r in result.laws:
        difference = lines[0, r.law] - lines[1, r.law]
        gap.plot(grid, difference, color=colours[r.law], lw=1)
        apart.append(difference[inside])
        if r.lead is None:
            continue
        p, x = r.lead.probability, r.lead.log10_c
        gap.fill_between(x, *r.lead.gap, color=colours[r.law], alpha=0.12, lw=0)
        lead.plot(x, p, color=colours[r.law], lw=1)
        lead.fill_between(x, *r.lead.band, color=colours[r.law], alpha=0.2, lw=0)
        rows += [{"series": f"lead {r.law}", "log10_compute": x[i], "probability_lower": p[i],
                  "low": r.lead.band[0, i], "high": r.lead.band[1, i],
                  "gap_low": r.lead.gap[0, i], "gap_high": r.lead.gap[1, i]}
                 for i in range(0, len(x), 10)]  # fmt: skip
    widest = float(np.nanmax(np.abs(np.concatenate([*apart, np.full(1, 1e-6)]))))
    gap.set_ylim(-1.5 * widest, 1.5 * widest)
    gap.set_xlim(result.data[0] - 0.5, top)
    gap.set_ylabel(f"loss of {result.names[0]} less {result.names[1]}, nats")
    gap.axhline(0, color="black", lw=0.8)
    lead.set_ylim(-0.03, 1.03)
    lead.set_ylabel(f"P({result.names[0]} has the lower loss)")
    lead.axhline(0.5, color="black", lw=0.8)
    for j, r in enumerate(result.laws):
        y = len(result.laws) - j
        for place, interval in [(t.at, t.interval) for t in r.turns] or [(None, r.interval)]:
            low, high = interval or (None, None)
            if interval is not None:
                ends = (result.data[0] if low is None else low,
                        result.horizon if high is None else high)  # fmt: skip
                right.plot(ends, [y, y], color=colours[r.law], lw=2)
                if high is None:
                    _arrow(right, result.horizon, y, colours[r.law])
            if place is not None:
                right.plot(place, y, "o", color=colours[r.law])
            rows.append({"series": f"crossing {r.law}", "log10_compute": place, "low": low,
                         "high": high, "probability_none": r.probability_none})  # fmt: skip
        none = "no bootstrap" if r.probability_none is None else f"{r.probability_none:.2f}"
        right.text(result.horizon, y + 0.12, f"P(no crossing) = {none}", ha="right", fontsize=7)
    right.set_yticks(range(len(result.laws), 0, -1), [r.law for r in result.laws])
    right.set_ylim(-0.1, len(result.laws) + 0.7)
    for axes in (lead, right):
        axes.set_xlim(result.data[0] - 0.5, result.horizon + 0.5)
    for axes in (gap, lead, right):
        axes.axvspan(*result.data, color="black", alpha=0.05, lw=0)
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"$10^{{{x:g}}}$"))
        axes.set_xlabel("training compute, FLOPs")
    right.set_xlabel("compute of the crossings, FLOPs")
    marks = {
        "central estimate": Line2D([], [], color=_GREY, marker="o", ls=""),
        f"{100 * result.level:.0f}% interval": Line2D([], [], color=_GREY, lw=2),
        "to never": Line2D([], [], color=_GREY, marker=">", ls=""),
        "compute of the runs": grey,
    }
    right.legend(list(marks.values()), list(marks), fontsize=7, ncols=2, loc="lower right")
    return figure, rows


def _arrow(axes: Axes, x: float, y: float, colour: str) -> None:
    """An interval that has no upper end: later than the horizon, or never."""
    axes.annotate("", (x + 0.45, y), (x - 0.3, y),
                  arrowprops={"arrowstyle": "-|>", "color": colour, "lw": 2})  # fmt: skip


def plot_allocation(result: Allocation) -> tuple[Figure, Rows]:
    """Left: the parabola of each budget (approach 2 only); right: N* and D* over compute."""
    rows: Rows = []
    figure = Figure(figsize=(10.5, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    for k, p in enumerate(result.budgets):
        if not np.isfinite(p.params):
            continue
        colour = COLOURS[k % len(COLOURS)]
        span = np.linspace(np.log(p.params) - 2, np.log(p.params) + 2, 80)
        c0, c1, c2 = p.coefficients
        runs = result.runs[result.runs[:, 0] == k]
        left.plot(runs[:, 1], runs[:, 2], ".", color=colour, ms=4)
        rows += [{"series": "run", "compute": p.compute, "params": n, "loss": loss}
                 for _, n, loss in runs]  # fmt: skip
        left.plot(np.exp(span), c0 + c1 * span + c2 * span**2, color=colour, lw=1,
                  ls="-" if p.status == "minimum" else ":",
                  label=f"{number(float(f'{p.compute:.2g}'))} ({p.status})")  # fmt: skip
        if p.status == "minimum":
            left.plot(p.params, p.loss, "o", color=colour, ms=4)
        rows.append({"series": "budget", "compute": p.compute, "status": p.status,
                     "params": p.params, "tokens": p.tokens, "loss": p.loss})  # fmt: skip
    if result.budgets:
        left.set(xscale="log", xlabel="parameters N", ylabel="loss, nats a token")
        set_ticks(left.xaxis, count)
        left.legend(fontsize=7, title="FLOPs of the budget; small dots: runs, large: the minimum",
                    title_fontsize=7, ncols=3, loc="upper center",
                    bbox_to_anchor=(0.5, -0.14))  # fmt: skip
    else:
        left.set_axis_off()
        left.text(0.5, 0.5, f"approach: {result.approach}", ha="center", va="center")
    c, n, d = result.points.T
    grid = np.geomspace(c.min(), c.max() * 10, 100)
    for name, values, (k, slope), columns, colour in (
        ("params N*", n, result.n_coefficients, (0, 1), COLOURS[0]),
        ("tokens D*", d, result.d_coefficients, (2, 3), COLOURS[1]),
    ):
        right.plot(c, values, ".", color=colour, ms=5)
        right.plot(grid, np.exp(k) * grid**slope, color=colour, lw=1,
                   label=f"{name} ~ C^{slope:.3f}")  # fmt: skip
        band = None
        if len(result.draws):
            some = result.draws[:1000][:, list(columns)]
            band = band_of(np.exp(some[:, :1] + some[:, 1:] * np.log(grid)), result.level)
        if band is not None:
            right.fill_between(grid, *band, color=colour, alpha=0.2, lw=0)
        rows += [{"series": name, "compute": a, "value": b} for a, b in zip(c, values, strict=True)]
    right.set(xscale="log", yscale="log", xlabel="training compute, FLOPs",
              ylabel="parameters or tokens")  # fmt: skip
    _compute_axes(right)
    set_ticks(right.yaxis, count)
    right.legend(fontsize=8, title="dots: best of a budget; lines: power law", title_fontsize=8)
    return figure, rows


def plot_families(
    a: RunFrame, b: RunFrame, names: tuple[str, str], *, size: str = "non-embedding"
) -> tuple[Figure, Rows]:
    """Loss over tokens, a line a size: family a solid, b dashed; seeds are separate points."""
    rows: Rows = []
    figure = Figure(figsize=(6.5, 4.6), layout="constrained")
    axes = figure.subplots()
    for frame, name, style in ((a, names[0], "-"), (b, names[1], "--")):
        counts = sizes(frame, size)
        for k, n in enumerate(np.unique(counts)):
            colour = COLOURS[k % len(COLOURS)]
            here = counts == n
            tokens, losses = frame.tokens[here], frame.loss[here]
            budgets = np.unique(tokens)
            means = [losses[tokens == d].mean() for d in budgets]
            axes.plot(tokens, losses, "o" if style == "-" else "s", color=colour, ms=3,
                      mfc=colour if style == "-" else "none")  # fmt: skip
            axes.plot(budgets, means, style, color=colour, lw=1.2)
            rows += [{"series": name, "params": n, "tokens": d, "loss": loss}
                     for d, loss in zip(tokens, losses, strict=True)]  # fmt: skip
    axes.set(xscale="log", xlabel="training tokens", ylabel="held-out loss, nats a token")
    _ticks(axes, {*a.tokens, *b.tokens})
    keys = {
        f"{name}: seeds, mean": Line2D([], [], color=_GREY, ls=style, lw=1.2, marker=mark, ms=4,
                                       mfc=_GREY if style == "-" else "none")
        for name, style, mark in ((names[0], "-", "o"), (names[1], "--", "s"))
    }  # fmt: skip
    # The families' sizes differ by little; the first one's name the colours.
    keys |= {f"{_short(n)} parameters": Line2D([], [], color=COLOURS[k % len(COLOURS)], lw=2)
             for k, n in enumerate(np.unique(sizes(a, size)))}  # fmt: skip
    axes.legend(list(keys.values()), list(keys), fontsize=8)
    return figure, rows


def plot_gap(pairs: Pairs, result: GapTrend, names: tuple[str, str]) -> tuple[Figure, Rows]:
    """The gap over size, a colour a budget, with the plane at the budgets it was fitted to."""
    rows: Rows = []
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.subplots()
    grid = np.geomspace(pairs.params.min(), pairs.params.max(), 40)
    for k, d in enumerate(np.unique(pairs.tokens)):
        colour = COLOURS[k % len(COLOURS)]
        here = pairs.tokens == d
        axes.plot(pairs.params[here], pairs.gap[here], "o", color=colour, ms=4,
                  label=f"{_short(d)} tokens")  # fmt: skip
        rows += [{"series": "pair", "params": n, "tokens": d, "gap": g}
                 for n, g in zip(pairs.params[here], pairs.gap[here], strict=True)]  # fmt: skip
        if d not in result.budgets:
            continue
        line = [result.at(n, d) for n in grid]
        axes.plot(grid, line, color=colour, lw=1)
        rows += [{"series": "plane", "params": n, "tokens": d, "gap": g}
                 for n, g in zip(grid, line, strict=True)]  # fmt: skip
    axes.axhline(0, color="black", lw=0.8)
    axes.set(xscale="log", xlabel="parameters N",
             ylabel=f"loss of {names[0]} less {names[1]}, nats a token")  # fmt: skip
    _ticks(axes, set(pairs.params))
    axes.plot([], [], "o", color=_GREY, ms=4, label="a pair of runs, one seed")
    axes.plot([], [], "-", color=_GREY, lw=1, label="plane fitted to its budgets")
    axes.legend(fontsize=8, ncols=2)
    return figure, rows


def _compute_axes(axes: Axes) -> None:
    """Ticks of loss over compute."""
    set_ticks(axes.xaxis)
    set_ticks(axes.yaxis)


def _short(value: float) -> str:
    """A count to three digits: 6.84M."""
    return count(float(f"{value:.3g}"))


def _ticks(axes: Axes, values: Iterable[float]) -> None:
    """Ticks at the values alone, on a logarithmic axis of less than a decade or two.

    Values that are as good as equal share one.
    """
    ordered = sorted(values)
    apart = [v for i, v in enumerate(ordered) if i == 0 or v > 1.05 * ordered[i - 1]]
    axes.set_xticks(apart, [_short(v) for v in apart])
    axes.minorticks_off()


def plot_rates(
    tried: Mapping[tuple[str, str], Mapping[float, float]],
) -> tuple[Figure, Rows]:
    """Held-out loss over the learning rate, less the best of that (family, size); a panel a family.

    Args:
      tried: (family, size) -> rate -> loss; infinite where a run diverged, which is left out.
    """
    rows: Rows = []
    families = list(dict.fromkeys(family for family, _ in tried))
    figure = Figure(figsize=(5.0 * len(families), 3.8), layout="constrained")
    panels = figure.subplots(1, len(families), sharey=True, squeeze=False)[0]
    for axes, family in zip(panels, families, strict=True):
        sizes_here = [size for f, size in tried if f == family]
        for k, size in enumerate(sizes_here):
            found = {r: x for r, x in sorted(tried[family, size].items()) if np.isfinite(x)}
            above = np.array(list(found.values())) - min(found.values())
            axes.plot(list(found), above, "o-", ms=4, color=COLOURS[k % len(COLOURS)], label=size)
            rows += [{"series": family, "size": size, "rate": r, "loss": x}
                     for r, x in found.items()]  # fmt: skip
        axes.set(xscale="log", xlabel="peak learning rate", title=family)
        _ticks(axes, {r for size in sizes_here for r in tried[family, size]})
        axes.legend(fontsize=8, title=family, title_fontsize=8)
    panels[0].set(ylabel="loss above the best, nats a token", ylim=(-0.01, _MOST_ABOVE))
    figure.supxlabel(f"lines that leave the top go on to losses above {_MOST_ABOVE:g}", fontsize=8)
    return figure, rows
