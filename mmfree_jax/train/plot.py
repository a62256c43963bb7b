"""Loss curves of one or several runs, from their metrics.jsonl."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import numpy as np

from mmfree_jax.errors import ConfigError
from mmfree_jax.files import check_file, open_atomically
from mmfree_jax.saved.history import Record, read_history
from mmfree_jax.saved.run_directory import METRICS, load_config
from mmfree_jax.train.flops import count_flops

XAxis = Literal["steps", "tokens", "flops"]

_LABELS = {"steps": "step", "tokens": "tokens", "flops": "training FLOPs"}
# Okabe and Ito's colours, which colour-blind readers can tell apart.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")

# How the files that Matplotlib writes begin.
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


def smooth(values: Sequence[float], weight: float) -> np.ndarray:
    """Mean of two exponential averages, one from each end, so that the curve does not lag.

    A value that is NaN or infinite is left out of its neighbours' averages.

    Args:
      values: in order of time.
      weight: of the neighbours, in [0, 1); 0 returns the values.

    Returns:
      The averages, float64 [len(values)]; NaN where the value is not finite.
    """
    forward = _exponential_average(values, weight)
    return 0.5 * (forward + _exponential_average(values[::-1], weight)[::-1])


def _exponential_average(values: Sequence[float], weight: float) -> np.ndarray:
    """Exponential moving average of the finite values, with bias correction."""
    result, average, count = np.full(len(values), np.nan), 0.0, 0
    for i, value in enumerate(values):
        if not np.isfinite(value):
            continue
        count += 1
        average = weight * average + (1 - weight) * value
        result[i] = average / (1 - weight**count)
    return result


def _curve(run: Path, records: list[Record], kind: str, x: XAxis) -> tuple[list, list]:
    per_token = 0.0
    if x == "flops":
        config = load_config(run)
        per_token = count_flops(config.model, config.data.seq_len).training
    xs, ys = [], []
    for record in records:
        if record.get("kind") == kind and record.get("loss") is not None:
            position = record["step"] if x == "steps" else record["tokens"]
            xs.append(position * per_token if x == "flops" else position)
            ys.append(record["loss"])
    return xs, ys


def plot_losses(
    runs: Sequence[Path],
    output: Path,
    *,
    x: XAxis = "steps",
    log_x: bool = False,
    log_y: bool = False,
    smoothing: float = 0.8,
    labels: Sequence[str] | None = None,
) -> dict[Path, int]:
    """Draws the training loss (smoothed) and the held-out loss (dots) of each run.

    Args:
      runs: run directories.
      output: image file; its suffix gives the format.
      x: quantity on the horizontal axis.
      log_x: draw it on a logarithmic scale.
      log_y: draw the loss on a logarithmic scale.
      smoothing: weight of the past in the moving average, in [0, 1); 0 draws the records.
      labels: name of each run; default: its folder's.

    Returns:
      Of runs with losses that are not finite, which no figure can show: how many.

    Raises:
      ConfigError: a run has no metrics or no finite loss, or an argument is out of range.
      OutputError: the file cannot be written, or is there and no such figure.
    """
    import matplotlib.figure

    if not 0 <= smoothing < 1:
        raise ConfigError(f"smoothing is {smoothing}: set a value in [0, 1)")
    if not runs:
        raise ConfigError("no run to plot: name at least one run directory")
    if labels is not None and len(labels) != len(runs):
        raise ConfigError(f"labels has {len(labels)} names for {len(runs)} runs: give one for each")
    kind = output.suffix.removeprefix(".").lower() or "png"
    check_file(output, _BEGINS.get(kind, "(?!)"), sources=[run / METRICS for run in runs])
    # A figure of its own needs no display and leaves pyplot's global state alone.
    figure = matplotlib.figure.Figure(figsize=(7.0, 4.2), layout="constrained")
    axes = figure.subplots()
    gaps: dict[Path, int] = {}
    for i, run in enumerate(runs):
        records = read_history(run / METRICS)
        if not any(r.get("loss") is not None for r in records):
            raise ConfigError(f"{run / METRICS} has no losses: give the folder of a training run")
        drawn = [loss for kind_ in ("train", "eval") for loss in _curve(run, records, kind_, x)[1]]
        gaps[run] = int(np.count_nonzero(~np.isfinite(drawn)))
        if gaps[run] == len(drawn):
            raise ConfigError(f"{run / METRICS} has no finite loss: there is nothing to draw")
        label = labels[i] if labels else (run.name or str(run))
        colour = _COLOURS[i % len(_COLOURS)]
        xs, ys = _curve(run, records, "train", x)
        if xs:
            if smoothing:
                axes.plot(xs, ys, color=colour, alpha=0.25, linewidth=0.8)
            axes.plot(xs, smooth(ys, smoothing), color=colour, label=f"{label}, training")
        xs, ys = _curve(run, records, "eval", x)
        if xs:
            axes.plot(
                xs,
                ys,
                color=colour,
                marker="o",
                markersize=4,
                linestyle="--",
                linewidth=1,
                label=f"{label}, held-out",
            )
    axes.set_xlabel(_LABELS[x])
    axes.set_ylabel("loss (nats per token)")
    if log_x:
        axes.set_xscale("log")
    if log_y:
        axes.set_yscale("log")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    try:
        with open_atomically(output) as file:
            figure.savefig(file, dpi=150, format=kind)
    except ValueError as e:
        raise ConfigError(f"output is {str(output)!r}: {e}") from e
    return {run: count for run, count in gaps.items() if count}
