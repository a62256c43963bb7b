"""`mmfree fit`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Fitting, outputs
from mmfree_jax.ranges import CountOrZero

_DESCRIPTION = """Fits a scaling law to runs from many starts and reports every parameter with its
bootstrap and profile-likelihood interval, the held-out error by size, and what the data cannot
tell. Runs are CSV or parquet files, run directories, or folders of run directories."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Fitting):
    """Options of `mmfree fit`."""

    runs: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """CSV or parquet files, run directories, or folders of them."""
    law: Literal["chinchilla", "power", "power-floor", "line", "gadre", "broken"] = "chinchilla"
    """Functional form; docs/scaling.md lists the formulas."""
    bootstrap: CountOrZero = 4000
    """Resamples for the intervals (a count; 0 for none)."""
    out: Path = Path("fit.json")


def fit(argv: Sequence[str]) -> int:
    """Fit a scaling law to runs, with uncertainty."""
    a = parse(Arguments, argv, prog="mmfree fit", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.fit import fit_law
    from mmfree_jax.experiments.scaling.objectives import Objective
    from mmfree_jax.experiments.scaling.plots import plot_fit
    from mmfree_jax.experiments.scaling.report import fit_document, fit_text

    outputs(a.out, a.runs)
    kind = ("lsq" if a.law == "line" else "huber") if a.objective == "auto" else a.objective
    objective = Objective(kind, a.delta)
    frame = a.read_family(a.runs)
    result = fit_law(
        frame, a.law, objective, size=a.size, flops=a.flops, resamples=a.bootstrap,
        resample=a.resample, level=a.level, seed=a.seed,
    )  # fmt: skip
    return a.finish(fit_text(result), fit_document(result), lambda: plot_fit(result))
