"""What figures share: their colours and the numbers on their axes.

Matplotlib is imported where it is needed: most commands draw nothing.
"""

import math
from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def number(value: float) -> str:
    """A number in full, as Matplotlib draws it: 0.25, 3, $2\\times10^{17}$."""
    if value == 0 or 1e-3 <= abs(value) < 1e4:
        return f"{value:.10g}".replace("-", "\N{MINUS SIGN}")
    mantissa, exponent = f"{value:.9e}".split("e")
    factor = mantissa.rstrip("0").rstrip(".")
    factor = factor[:-1] if factor in ("1", "-1") else rf"{factor}\times"
    return f"${factor}10^{{{int(exponent)}}}$"


def count(value: float) -> str:
    """A count of steps, tokens or parameters: 7500, 12.5k, 10M, 3B; as powers from 10^15 on."""
    for limit, unit in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if max(limit, 1e4) <= abs(value) < 1e15:
            return f"{value / limit:.10g}{unit}".replace("-", "\N{MINUS SIGN}")
    return number(value)


def show_late(axes: "Axes", share: float = 0.9) -> None:
    """Sets the y-range by what lines and marks have in the last share of x: a loss's first fall
    would flatten all that follows, and leaves the page.

    Args:
      axes: with lines in them, on a linear x-axis; without a finite value they stay as they are.
      share: of the range of x, from its end.
    """
    points = np.concatenate([np.empty((0, 2)), *(line.get_xydata() for line in axes.lines)])
    points = points[np.isfinite(points).all(1)]
    if len(points):
        x, y = points.T
        late = y[x >= x.max() - share * (x.max() - x.min())]
        room = 0.05 * (late.max() - late.min()) or 0.05 * abs(late.max()) or 1.0
        axes.set_ylim(late.min() - room, late.max() + room)


def set_ticks(axis: "Axis", label: Callable[[float], str] = number) -> None:
    """Labels an axis, once all is drawn, without a factor at its end ("1e7").

    A logarithmic axis of less than two decades (three, where the texts are short) gets ticks
    between its powers of ten.

    Args:
      axis: of two-dimensional axes.
      label: from a value to its text.
    """
    from matplotlib import ticker

    low, high = sorted(axis.get_view_interval())
    formatter = ticker.FuncFormatter(lambda value, _: label(value))
    if axis.get_scale() == "log":
        decades = math.log10(high) - math.log10(low)
        if decades < 0.7:
            axis.set_major_locator(ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        elif decades < (3 if len(label(10.0 ** math.floor(math.log10(high)))) < 6 else 2):
            subs = (1, 2, 3, 5) if decades < 1.5 else (1, 2, 5)
            axis.set_major_locator(ticker.LogLocator(subs=subs))
        axis.set_minor_formatter(ticker.NullFormatter())
    elif label is count:
        axis.set_major_locator(ticker.MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True))
    elif 1e-3 <= max(-low, high) < 1e4:
        formatter = ticker.ScalarFormatter(useOffset=False)  # the same decimals at every tick
        formatter.set_scientific(False)
    axis.set_major_formatter(formatter)
