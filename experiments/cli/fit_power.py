"""`mmfree fit power`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Output, outputs
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import AboveZero, InnerShare

_DESCRIPTION = """Fits y = k x1^a x2^b between columns of a table by least squares in logarithms,
with intervals: a best learning rate by size and tokens, a best batch by tokens, a best size by
compute. Rows are optima, or with --best all that was tried, and the optima are found first."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Output):
    """Options of `mmfree fit power`."""

    table: Annotated[PlaceOrUrl, tyro.conf.Positional]
    """CSV or parquet file, such as the results of a sweep."""
    y: str
    """Column that the power gives, such as learning_rate."""
    x: tuple[str, ...]
    """Columns that it is a power of, such as params_non_embedding tokens."""
    best: str = ""
    """Column of losses: y is then what has the least loss at each combination of x, by a parabola
    over log y. Empty: each row is an optimum."""
    family: str = ""
    """Column of families, where it has no usual name; none: all rows are of one family."""
    where: tuple[str, ...] = ()
    """Rows to keep, such as 'loss < 3.5' or 'family = mmfree'."""
    at: tuple[AboveZero, ...] = ()
    """A value for each x at which y is estimated; empty: at their geometric means."""
    level: InnerShare = 0.95
    """Level of all intervals (a fraction)."""
    out: PlaceOrUrl = "power.json"


def fit_power(argv: Sequence[str]) -> int:
    """Fit a power between columns: best rates, batches or sizes."""
    a = parse(Arguments, argv, prog="mmfree fit power", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.errors import ScalingError
    from mmfree_jax.experiments.scaling.power_relation import best_of
    from mmfree_jax.experiments.scaling.power_relation import fit_power as fit
    from mmfree_jax.experiments.scaling.power_report import plot_power, power_document, power_text
    from mmfree_jax.experiments.scaling.read import read_columns

    outputs(a.out, [a.table])
    if not a.x:
        raise ScalingError("x: name at least one column that y is a power of")
    if a.at and len(a.at) != len(a.x):
        raise ScalingError(f"at: {len(a.at)} values for {len(a.x)} columns of x "
                           f"({', '.join(a.x)}); give one for each")  # fmt: skip
    names = list(dict.fromkeys((a.y, *a.x, *((a.best,) if a.best else ()))))
    if len(names) < 1 + len(a.x) + bool(a.best):
        raise ScalingError(f"x: a column is named twice among y, x and best ({a.y}, "
                           f"{', '.join(a.x)}{', ' + a.best if a.best else ''})")  # fmt: skip
    columns, notes = read_columns(a.table, names, where=a.where, family=a.family)
    found: list[str] = []
    if a.best:
        columns, found = best_of(columns, a.y, a.x, a.best)
    result = fit(columns, a.y, a.x, level=a.level)
    result = replace(result, warnings=[*notes, *found, *result.warnings])
    estimate = result.at(dict(zip(a.x, a.at, strict=True)) if a.at else result.centre())
    return a.finish(
        power_text(result, estimate), power_document(result, estimate), lambda: plot_power(result)
    )
