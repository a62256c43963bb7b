"""`mmfree plot`."""

from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.ranges import ShareBelowOne


def plot(
    runs: Annotated[tuple[Path, ...], tyro.conf.Positional],
    output: Path | None = None,
    x: Literal["steps", "tokens", "flops"] = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: ShareBelowOne = 0.8,
    labels: tuple[str, ...] = (),
) -> int:
    """Draw the loss curves of one or several runs.

    Args:
      runs: Run directories.
      output: Image file (png, svg, pdf); default: loss_curve.png in the first run directory,
        or ./loss_curves.png for several.
      x: Quantity on the horizontal axis.
      log_x: Draw it on a logarithmic scale.
      log_y: Draw the loss on a logarithmic scale.
      smoothing: Weight of the past in the training curve's moving average, in [0, 1).
      labels: Name of each run in the legend; default: its folder's.
    """
    from mmfree_jax.saved.run_directory import LOSS_CURVE
    from mmfree_jax.train.plot import plot_losses

    if output is None:
        output = runs[0] / LOSS_CURVE if len(runs) == 1 else Path("loss_curves.png")
    gaps = plot_losses(
        runs,
        output,
        x=x,
        log_x=log_x,
        log_y=log_y,
        smoothing=smoothing,
        labels=labels or None,
    )
    print(f"loss curve: {output}")
    for run, count in gaps.items():
        print(f"note: {count} losses of {run} are not finite: gaps in its curve")
    return 0
