"""`mmfree isoflop`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Analysis, outputs
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import NotNegative

_DESCRIPTION = """Compute-optimal model size and data by the three approaches of Hoffmann et al.:
isoflop (the minimum of a parabola at each FLOP budget), envelope (the lowest of all training
curves) and parametric (a fitted law). Maxima and minima at an edge of the sizes are refused."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Analysis):
    """Options of `mmfree isoflop`."""

    runs: Annotated[tuple[PlaceOrUrl, ...], tyro.conf.Positional]
    """CSV or parquet files, run directories, or folders of them."""
    approach: tuple[Literal["isoflop", "envelope", "parametric"], ...] = ("isoflop",)
    """One or several approaches."""
    tolerance: NotNegative = 0.1
    """Computes within this fraction of each other are one budget, without a budget column."""
    out: PlaceOrUrl = "isoflop.json"
    """JSON result; the figure and its data (of the first approach) go beside it as .png and
    .plot.csv."""


def isoflop(argv: Sequence[str]) -> int:
    """Find compute-optimal sizes and their exponents, with uncertainty."""
    a = parse(Arguments, argv, prog="mmfree isoflop", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.fit import fit_law
    from mmfree_jax.experiments.scaling.isoflop import envelope, parametric
    from mmfree_jax.experiments.scaling.isoflop import isoflop as parabolas
    from mmfree_jax.experiments.scaling.plots import plot_allocation
    from mmfree_jax.experiments.scaling.report import allocation_document, allocation_text

    outputs(a.out, a.runs)
    frame = a.read_family(a.runs)
    common = {"size": a.size, "flops": a.flops, "resamples": a.bootstrap, "level": a.level,
              "seed": a.seed}  # fmt: skip
    results = []
    for approach in a.approach:
        if approach == "isoflop":
            results.append(parabolas(frame, tolerance=a.tolerance, **common))
        elif approach == "envelope":
            results.append(envelope(frame, **common))
        else:
            fit = fit_law(frame, "chinchilla", profile=False, holdout=False, **common)
            results.append(parametric(fit))
    return a.finish(
        allocation_text(results), allocation_document(results), lambda: plot_allocation(results[0])
    )
