"""`mmfree crossing`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from mmfree_jax.cli.parse import parse
from mmfree_jax.experiments.cli.options import Fitting, outputs
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.ranges import Range

_DESCRIPTION = """Compares two families of runs: every crossing of their loss curves under every
law, with a joint bootstrap, the probability that either has the lower loss at a compute and that
they do not cross, and what can be concluded."""

LawName = Literal["line", "power", "power-floor", "chinchilla", "gadre", "broken"]


@dataclass(frozen=True, kw_only=True)
class Arguments(Fitting):
    """Options of `mmfree crossing`."""

    a: Annotated[PlaceOrUrl, tyro.conf.Positional]
    """First family: a CSV or parquet file, a run directory or a folder of them."""
    b: Annotated[PlaceOrUrl, tyro.conf.Positional]
    """Second family, likewise; may be the same file with --families."""
    families: tuple[str, str] | None = None
    """Names in the family column that pick the two families out of their files."""
    laws: tuple[LawName, ...] = ("line", "power", "power-floor", "chinchilla", "gadre", "broken")
    """Laws to compare; those that the runs cannot determine are skipped with the reason."""
    use: Literal["frontier", "all"] = "frontier"
    """Runs for laws of compute alone: those that no cheaper run beats, or all."""
    horizon: Annotated[float, Range(0, 100, open_low=True)] = 30.0
    """Where the search for crossings ends (log10 FLOPs)."""
    out: PlaceOrUrl = "crossing.json"


def crossing(argv: Sequence[str]) -> int:
    """Find where the loss curves of two families cross, with uncertainty."""
    a = parse(Arguments, argv, prog="mmfree crossing", description=_DESCRIPTION)

    from mmfree_jax.experiments.scaling.crossing import cross
    from mmfree_jax.experiments.scaling.errors import ScalingError
    from mmfree_jax.experiments.scaling.objectives import Objective
    from mmfree_jax.experiments.scaling.plots import plot_crossing
    from mmfree_jax.experiments.scaling.report import crossing_document, crossing_text

    outputs(a.out, (a.a, a.b))
    frames, names = [], []
    for k, path in enumerate((a.a, a.b)):
        frame = a.read([path])
        found = sorted({str(f) for f in frame.family if f})
        column = frame.sources.get("family", "family")
        if a.families is not None:
            if a.families[k] not in found:
                known = ", ".join(map(repr, found)) or "no family column"
                raise ScalingError(f"families: {path} has no family {a.families[k]!r}; it has "
                                   f"{known} (column {column!r})")  # fmt: skip
            frame = frame.take(frame.family == a.families[k])
        elif len(found) > 1:
            raise ScalingError(f"{path}: holds {len(found)} families ({', '.join(found)}) by the "
                               f"column {column!r}; choose with --families FIRST SECOND, or take "
                               "all as one with --columns.family none")  # fmt: skip
        frames.append(frame)
        names.append(a.families[k] if a.families else found[0] if found else Path(path).stem)
    if names[0] == names[1]:
        names = [f"{names[0]} (first)", f"{names[1]} (second)"]
    objective = None if a.objective == "auto" else Objective(a.objective, a.delta)
    if objective is None and a.delta != 1e-3:
        raise ScalingError("delta: needs --objective huber, since auto uses 1e-3")
    result = cross(
        (frames[0], frames[1]), (names[0], names[1]), a.laws, objective=objective, size=a.size,
        flops=a.flops, points=a.use, resamples=a.bootstrap, resample=a.resample, level=a.level,
        horizon=a.horizon, seed=a.seed,
    )  # fmt: skip
    return a.finish(crossing_text(result), crossing_document(result), lambda: plot_crossing(result))
