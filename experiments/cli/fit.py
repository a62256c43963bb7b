"""`mmfree fit`."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Fitting, outputs
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import CountOrZero, Share

if TYPE_CHECKING:
    from mmfree_jax.experiments.scaling.objectives import Objective

_DESCRIPTION = """Fits a scaling law to runs from many starts and reports every parameter with its
bootstrap and profile interval, the held-out error by size, and what the data cannot
tell. Runs are CSV or parquet files, run directories, or folders of run directories. With --joint
two or more families share parameters, and a likelihood-ratio test says whether they may."""


@dataclass(frozen=True, kw_only=True)
class Arguments(Fitting):
    """Options of `mmfree fit`."""

    runs: Annotated[tuple[PlaceOrUrl, ...], tyro.conf.Positional]
    """CSV or parquet files, run directories, or folders of them."""
    law: Literal["chinchilla", "power", "power-floor", "line", "gadre", "broken", "precision",
                 "repeated", "accuracy"] = "chinchilla"  # fmt: skip
    """Functional form; docs/scaling.md lists the formulas."""
    joint: bool = False
    """Fit all families of the runs together, with the parameters of --share in common. A file
    without a family column is a family by its name."""
    share: str = ""
    """Parameters that are one for all families, such as E,alpha. By default the law's floor E."""
    chance: Share | None = None
    """Accuracy by guessing, for the law accuracy, where no column gives it (a fraction)."""
    bootstrap: CountOrZero = 4000
    """Resamples for the intervals (a count; 0 for none)."""
    out: PlaceOrUrl = "fit.json"


def fit(argv: Sequence[str]) -> int:
    """Fit a scaling law to runs, with uncertainty."""
    a = parse(Arguments, argv, prog="mmfree fit", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.errors import ScalingError
    from mmfree_jax.experiments.scaling.fit import fit_law
    from mmfree_jax.experiments.scaling.fit_plots import plot_fit
    from mmfree_jax.experiments.scaling.law_plots import plot_measured
    from mmfree_jax.experiments.scaling.laws import get_law
    from mmfree_jax.experiments.scaling.objectives import Objective
    from mmfree_jax.experiments.scaling.report import fit_document, fit_text

    outputs(a.out, a.runs)
    kind = get_law(a.law).objective if a.objective == "auto" else a.objective
    objective = Objective(kind, a.delta)
    if a.joint:
        return _fit_joint(a, objective)
    if a.share:
        raise ScalingError(f"share: {a.share!r} needs --joint, which fits families together")
    frame = a.read_family(a.runs)
    if a.chance is not None:
        frame = replace(frame, chance=np.where(np.isnan(frame.chance), a.chance, frame.chance))
    result = fit_law(
        frame, a.law, objective, size=a.size, flops=a.flops, resamples=a.bootstrap,
        resample=a.resample, level=a.level, seed=a.seed,
    )  # fmt: skip
    draw = plot_measured if result.law.also else plot_fit
    return a.finish(fit_text(result), fit_document(result), lambda: draw(result))


def _fit_joint(a: Arguments, objective: "Objective") -> int:
    """Families together."""
    from mmfree_jax.experiments.scaling.errors import ScalingError
    from mmfree_jax.experiments.scaling.fit_plots import plot_joint
    from mmfree_jax.experiments.scaling.joint import by_family, fit_joint
    from mmfree_jax.experiments.scaling.joint_report import joint_document, joint_text
    from mmfree_jax.experiments.scaling.laws import get_law

    law = get_law(a.law)
    shared = [name.strip() for name in a.share.split(",")] if a.share else [law.floor or ""]
    if shared == [""] and not law.also:
        raise ScalingError(f"share: {law.name} has no floor to share; name parameters by --share, "
                           f"of {', '.join(law.parameters)}")  # fmt: skip
    families = by_family([(Path(place).name.split(".")[0], a.read([place])) for place in a.runs])
    result = fit_joint(
        families, a.law, objective, shared=shared, size=a.size, flops=a.flops,
        resamples=a.bootstrap, resample=a.resample, level=a.level, seed=a.seed,
    )  # fmt: skip
    return a.finish(joint_text(result), joint_document(result), lambda: plot_joint(result))
