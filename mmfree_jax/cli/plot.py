"""`mmfree plot`."""

import contextlib
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

import tyro

from mmfree_jax.fetched import copied
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import ShareBelowOne


def plot(
    runs: Annotated[tuple[PlaceOrUrl, ...], tyro.conf.Positional],
    output: PlaceOrUrl | None = None,
    metrics: tuple[str, ...] = ("loss",),
    x: Literal["steps", "tokens", "flops", "time"] = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: ShareBelowOne = 0.8,
    labels: tuple[str, ...] = (),
    names_only: Annotated[bool, tyro.conf.arg(name="list")] = False,
) -> int:
    """Draw what one or several runs logged: a panel for each metric, a colour for each run.

    Args:
      runs: Run directories, or their URLs (gs://, s3://).
      output: Image file (png, svg, pdf), or its URL; default: loss_curve.png in the run directory,
        or ./loss_curves.png for several or one by URL; metrics.png for other metrics than loss.
      metrics: What to draw, as it is named in metrics.jsonl; training and held-out records.
      x: Quantity on the horizontal axis; time: of training.
      log_x: Draw it on a logarithmic scale.
      log_y: Draw the metrics on a logarithmic scale.
      smoothing: Weight of the neighbours in the training curves' moving average, in [0, 1); 0
        draws the records alone.
      labels: Name of each run in the legend; default: its folder's.
      names_only: Print the names of the metrics that each run logged, and draw nothing.
    """
    from mmfree_jax.saved.run_directory import LOSS_CURVE
    from mmfree_jax.train.metric_series import read_metrics
    from mmfree_jax.train.plot import plot_metrics

    with contextlib.ExitStack() as held:
        folders = tuple(held.enter_context(copied(run, "run", _is_drawn)) for run in runs)
        if names_only and runs:
            for run, folder in zip(runs, folders, strict=True):
                print(f"{run}: {', '.join(read_metrics(folder).logged)}")
            return 0
        if output is None:
            one, several = (
                (LOSS_CURVE, "loss_curves.png") if metrics == ("loss",) else ("metrics.png",) * 2
            )
            at_home = len(runs) == 1 and folders[0] == Path(runs[0])
            output = str(folders[0] / one) if at_home else several
        notes = plot_metrics(
            folders,
            output,
            metrics=metrics,
            x=x,
            log_x=log_x,
            log_y=log_y,
            smoothing=smoothing,
            labels=labels or None,
        )
        for note in notes:
            print(f"note: {note}")
        print(f"{'loss curve' if metrics == ('loss',) else 'figure'}: {output}")
        return 0


def _is_drawn(name: PurePosixPath) -> bool:
    """Whether a file of a run is read for its curves."""
    return str(name) in ("metrics.jsonl", "config.yaml")
