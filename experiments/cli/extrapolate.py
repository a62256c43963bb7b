"""`mmfree extrapolate`."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.crossing import LawName
from mmfree_jax.experiments.cli.options import Analysis, outputs
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import Count

_DESCRIPTION = """Chooses between scaling laws by what each says of budgets that it has not seen:
the largest are held out, every law is fitted to the cheaper runs, and its errors weigh it in an
average over laws. Laws that fit all runs equally well may differ by much beyond them."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Analysis):
    """Options of `mmfree extrapolate`."""

    runs: Annotated[tuple[PlaceOrUrl, ...], tyro.conf.Positional]
    """CSV or parquet files, run directories, or folders of them; one family."""
    laws: tuple[LawName, ...] = ("line", "power", "power-floor", "chinchilla", "gadre", "broken")
    """Laws to score; those that the cheaper runs cannot determine are skipped with the reason."""
    hold_out: Count = 3
    """Budgets held out, at most (a count); never more than a third of all."""
    out: PlaceOrUrl = "extrapolate.json"


def extrapolate(argv: Sequence[str]) -> int:
    """Score scaling laws by their predictions of held-out budgets."""
    a = parse(Arguments, argv, prog="mmfree extrapolate", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.extrapolation import extrapolate as score
    from mmfree_jax.experiments.scaling.extrapolation_report import (
        extrapolation_document,
        extrapolation_text,
        plot_extrapolation,
    )

    outputs(a.out, a.runs)
    result = score(
        a.read_family(a.runs), a.laws, hold_out=a.hold_out, size=a.size, flops=a.flops,
        resamples=a.bootstrap, level=a.level, seed=a.seed,
    )  # fmt: skip
    return a.finish(extrapolation_text(result), extrapolation_document(result),
                    lambda: plot_extrapolation(result))  # fmt: skip
