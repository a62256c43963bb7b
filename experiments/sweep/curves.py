"""Loss curves of runs: smoothing, comparison, learning-rate phases, ternary flips.

What notebooks call. A curve is read from a run directory's metrics.jsonl and
config.yaml; nothing is drawn on pyplot's global state.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mmfree_jax.config import TrainConfig
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.errors import ConfigError
from mmfree_jax.experiments.sweep.errors import SweepError
from mmfree_jax.figures import COLOURS, count, set_ticks, show_late
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.smoothing import recent_average, smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Curve:
    """The history of one run; arrays are in order of steps."""

    name: str
    config: TrainConfig
    steps: np.ndarray
    """Of the training records."""
    tokens: np.ndarray
    loss: np.ndarray
    """Training loss, the mean since the record before (nats a token)."""
    rate: np.ndarray
    """Learning rate."""
    grad_norm: np.ndarray
    eval_steps: np.ndarray
    eval_loss: np.ndarray
    """Held-out loss (nats a token)."""
    flip_steps: np.ndarray
    flip_share: np.ndarray
    """Share of ternary weights whose trit differs from that at the look before."""
    zero_share: np.ndarray
    """Share of ternary weights that are 0, at the same steps."""


def load_curve(run_dir: Path | str, name: str | None = None) -> Curve:
    """Reads a run directory.

    Raises:
      SweepError: it has no training records or no config.yaml.
      TrainingError: metrics.jsonl is damaged.
    """
    run_dir = Path(run_dir)
    records = read_history(run_dir / "metrics.jsonl")
    train = [r for r in records if r.get("kind") == "train" and r.get("loss") is not None]
    if not train:
        raise SweepError(f"{run_dir}: no training record in metrics.jsonl; give a run directory")
    try:
        values = read_yaml(run_dir / "config.yaml")
    except ConfigError as e:
        raise SweepError(f"{run_dir / 'config.yaml'} cannot be read ({e})") from e
    evals = [r for r in records if r.get("kind") == "eval"]
    flips = [r for r in train if r.get("changed_share") is not None]

    def column(rows: Sequence[Mapping], key: str) -> np.ndarray:
        return np.array([math.nan if r.get(key) is None else r[key] for r in rows], float)

    return Curve(
        name=name or run_dir.name,
        config=from_dict(TrainConfig, values),
        steps=column(train, "step"),
        tokens=column(train, "tokens"),
        loss=column(train, "loss"),
        rate=column(train, "learning_rate"),
        grad_norm=column(train, "grad_norm"),
        eval_steps=column(evals, "step"),
        eval_loss=column(evals, "loss"),
        flip_steps=column(flips, "step"),
        flip_share=column(flips, "changed_share"),
        zero_share=column(flips, "zero_share"),
    )


@dataclass(frozen=True)
class Phase:
    """A stretch of a run between two turns of its learning-rate schedule."""

    name: str
    first: int
    """Step after which it begins."""
    last: int
    """Step at which it ends."""


def phases(config: TrainConfig) -> tuple[Phase, ...]:
    """The phases of a run's learning rate: warm-up, and what its schedule does after it.

    The schedule `paper` halves the rate at the midpoint, where the loss of a ternary model
    often drops.
    """
    schedule, steps, warmup = config.optimizer.schedule, config.steps, config.optimizer.warmup_steps
    turns: list[tuple[str, int]] = [("warm-up", warmup)]
    if schedule == "paper":
        turns += [("full rate", max(warmup, -(-steps // 2))), ("half rate", steps)]
    elif schedule == "wsd":
        start = max(warmup, round(steps * (1 - config.optimizer.decay_fraction)))
        turns += [("constant", start), ("decay", steps)]
    else:
        turns += [("constant" if schedule == "constant" else "decay", steps)]
    found, at = [], 0
    for name, end in turns:
        if end > at:
            found.append(Phase(name, at, end))
            at = end
    return tuple(found)


@dataclass(frozen=True)
class PhaseSummary:
    """How a run fared in one phase of its learning rate."""

    phase: Phase
    drop: float
    """Fall of the training loss from the phase's start to its end, either half way between the
    record there and the average of those near it (nats a token)."""
    slope: float
    """The same for each 1,000 steps."""
    interval: tuple[float, float]
    """95% interval of the slope: block bootstrap over the phase's records."""
    flip_share: float
    """Mean share of trits that changed between two looks; NaN where none were taken."""


def summarise_phases(
    curve: Curve, smoothing: float = 0.8, resamples: int = 500, seed: int = 0
) -> list[PhaseSummary]:
    """The phases of a run, each with the fall of its loss and the flips of its trits.

    The slope is a least-squares line through the phase's records; its interval resamples blocks
    of residuals of about the square root of the number of records, since neighbouring records
    are correlated.
    """
    found = []
    rng = np.random.default_rng(seed)
    for phase in phases(curve.config):
        inside = (curve.steps > phase.first) & (curve.steps <= phase.last)
        if inside.sum() < 3:
            continue
        x, y = curve.steps[inside], curve.loss[inside]
        fit = np.polyfit(x, y, 1)
        residual = y - np.polyval(fit, x)
        length = max(1, round(math.sqrt(len(x))))
        slopes = []
        for _ in range(resamples):
            starts = rng.integers(0, len(x) - length + 1, -(-len(x) // length))
            drawn = np.concatenate([residual[s : s + length] for s in starts])[: len(x)]
            slopes.append(np.polyfit(x, np.polyval(fit, x) + drawn, 1)[0])
        low, high = np.quantile(slopes, [0.025, 0.975]) * -1000
        flips = curve.flip_share[
            (curve.flip_steps > phase.first) & (curve.flip_steps <= phase.last)
        ]
        # At its ends, half way from the record to the average within the phase: a turn stays sharp.
        start, end = ((row[-1] + recent_average(row, smoothing)) / 2 for row in (y[::-1], y))
        found.append(PhaseSummary(
            phase, float(start - end), float(-1000 * fit[0]), (float(high), float(low)),
            float(flips.mean()) if len(flips) else math.nan,
        ))  # fmt: skip
    return found


def phases_text(curve: Curve, smoothing: float = 0.8) -> str:
    """The summary of a run's phases, one line each."""
    lines = [f"{curve.name}: schedule {curve.config.optimizer.schedule}, peak rate "
             f"{curve.config.optimizer.learning_rate:g}"]  # fmt: skip
    for s in summarise_phases(curve, smoothing):
        flips = (
            "" if math.isnan(s.flip_share) else f", {s.flip_share:.2%} of trits flip between looks"
        )
        low, high = s.interval
        lines.append(
            f"  {s.phase.name:<10} steps {s.phase.first + 1:>5}-{s.phase.last:<5} loss falls by "
            f"{s.drop:.3f}, {s.slope:.3f} [{low:.3f}, {high:.3f}] each 1,000 steps{flips}"
        )
    return "\n".join(lines)


def plot_phases(curve: Curve, smoothing: float = 0.8) -> "Figure":
    """Loss, learning rate and flips of one run, with the phases of its schedule shaded."""
    from matplotlib.figure import Figure

    rows = 3 if len(curve.flip_steps) else 2
    figure = Figure(figsize=(7.0, 1.2 + 2.4 * rows), layout="constrained")
    loss, rate, *flips = figure.subplots(rows, 1, sharex=True)
    loss.plot(curve.steps, curve.loss, color=COLOURS[0], alpha=0.3, linewidth=0.8,
              label="training, as recorded")  # fmt: skip
    loss.plot(curve.steps, smooth(curve.loss, smoothing), color=COLOURS[0],
              label=f"training, smoothed ({smoothing:g})")  # fmt: skip
    loss.plot(curve.eval_steps, curve.eval_loss, "o", color=COLOURS[1], markersize=4,
              label="held-out")  # fmt: skip
    loss.set(ylabel="loss (nats a token)", title=curve.name)
    loss.legend(frameon=False, fontsize=9, title=curve.name, title_fontsize=9)
    show_late(loss)
    rate.plot(curve.steps, curve.rate, color=COLOURS[2])
    rate.set(ylabel="learning rate", ylim=(0, None))
    for axes in flips:
        axes.plot(curve.flip_steps, 100 * curve.zero_share, "o-", color=COLOURS[6], markersize=4,
                  label="zero")  # fmt: skip
        axes.plot(curve.flip_steps, 100 * curve.flip_share, "s-", color=COLOURS[3], markersize=4,
                  label="changed since the look before")  # fmt: skip
        axes.set(ylabel="ternary weights (%)", ylim=(0, None))
        axes.legend(frameon=False, fontsize=9)
    for i, phase in enumerate(phases(curve.config)):
        for axes in (loss, rate, *flips):
            axes.axvspan(phase.first, phase.last, color="#000000", alpha=0.06 * (i % 2), lw=0)
        rate.annotate(phase.name, ((phase.first + phase.last) / 2, 1), (0, 3),
                      xycoords=("data", "axes fraction"), textcoords="offset points",
                      ha="center", fontsize=8, annotation_clip=False)  # fmt: skip
    for axes in (loss, rate, *flips):
        axes.grid(alpha=0.25)
        set_ticks(axes.yaxis)
    set_ticks(loss.xaxis, count)
    figure.axes[-1].set_xlabel("step")
    return figure
