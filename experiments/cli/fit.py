"""`mmfree fit`."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Flops, Reading, Size, outputs, save
from mmfree_jax.ranges import AboveZero, CountOrZero, InnerShare, Seed

_DESCRIPTION = """Fits a scaling law to runs from many starts and reports every parameter with its
bootstrap and profile-likelihood interval, the held-out error by size, and what the data cannot
tell. Runs are CSV or parquet files, run directories, or folders of run directories."""


@dataclass(frozen=True)
class Arguments:
    """Options of `mmfree fit`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """CSV or parquet files, run directories, or folders of them."""
    law: Literal["chinchilla", "power", "power-floor", "line", "gadre", "broken"] = "chinchilla"
    """Functional form; docs/scaling.md lists the formulas."""
    objective: Literal["auto", "huber", "lad", "log-lsq", "lsq"] = "auto"
    """Sum over runs that is minimised: Huber or absolute value of log-loss residuals, squares of
    log loss, squares of loss. auto: lsq for the line, huber otherwise."""
    delta: AboveZero = 1e-3
    """Where Huber's loss turns from quadratic to linear (log loss)."""
    size: Size = "total"
    """Which parameters N counts."""
    flops: Flops = "6nd"
    """How compute C is counted."""
    bootstrap: CountOrZero = 4000
    """Resamples for the intervals (a count; 0 for none)."""
    resample: Literal["runs", "noise"] = "runs"
    """Draw runs with replacement, or redraw each loss from its loss-sd column."""
    level: InnerShare = 0.95
    """Level of all intervals (a fraction)."""
    seed: Seed = 0
    """Of the bootstrap and the restarts."""
    out: Path = Path("fit.json")
    """JSON result; the figure and its data go beside it as .png and .plot.csv."""
    plot: bool = True
    """Write the figure and its data as well."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)


def fit(argv: Sequence[str]) -> int:
    """Fit a scaling law to runs, with uncertainty."""
    a = parse(Arguments, argv, prog="mmfree fit", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.errors import ScalingError
    from mmfree_jax.experiments.scaling.fit import fit_law
    from mmfree_jax.experiments.scaling.objectives import Objective
    from mmfree_jax.experiments.scaling.read import read_runs
    from mmfree_jax.experiments.scaling.report import fit_document, fit_text

    outputs(a.out)
    kind = ("lsq" if a.law == "line" else "huber") if a.objective == "auto" else a.objective
    objective = Objective(kind, a.delta)
    frame = read_runs(a.runs, a.reading.columns, where=a.reading.where, points=a.reading.points)
    families = sorted({str(f) for f in frame.family if f})
    if len(families) > 1:
        raise ScalingError(f"runs: {len(families)} families ({', '.join(families)}) in one fit; "
                           f"choose one with --where 'family = {families[0]}'")  # fmt: skip
    result = fit_law(
        frame, a.law, objective, size=a.size, flops=a.flops, resamples=a.bootstrap,
        resample=a.resample, level=a.level, seed=a.seed,
    )  # fmt: skip
    print(fit_text(result))
    paths = save(a.out, fit_document(result), (lambda: _plot(result)) if a.plot else None)
    print("wrote " + ", ".join(map(str, paths)))
    return 0


def _plot(result):
    from mmfree_jax.experiments.scaling.plots import plot_fit

    return plot_fit(result)
