"""Options that several subcommands share, and where their results go."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.frame import RunFrame
from mmfree_jax.experiments.scaling.output_files import write_csv, write_json
from mmfree_jax.experiments.scaling.read import Columns, read_runs
from mmfree_jax.files import StrPath, check_file, write_bytes
from mmfree_jax.places import PlaceOrUrl, locate
from mmfree_jax.ranges import AboveZero, CountOrZero, InnerShare, Seed
from mmfree_jax.storage import Url

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Size = Literal["auto", "total", "non-embedding", "ternary"]
Flops = Literal["auto", "6nd", "6nd-non-embedding", "exact", "budget", "bit-operations", "energy"]
Points = Literal["last", "all"]


@dataclass(frozen=True)
class Reading:
    """How the runs are read."""

    columns: Columns = field(default_factory=Columns)
    """Names of the file's columns, where they are not the usual ones."""
    where: tuple[str, ...] = ()
    """Rows to keep, such as 'loss < 3.5' or 'family = mmfree' (the file's own columns)."""
    points: Points = "last"
    """Of a run directory: its last evaluation, or all of them."""


@dataclass(frozen=True, kw_only=True)
class Output:
    """Where the result of an analysis goes."""

    out: PlaceOrUrl
    """JSON result; the figure and its data go beside it as .png and .plot.csv."""
    plot: bool = True
    """Write the figure and its data as well."""

    def finish(
        self,
        text: str,
        document: dict[str, Any],
        draw: Callable[[], tuple["Figure", list[dict]]],
    ) -> int:
        """Shows a result and writes its JSON, and with `plot` its figure and the rows drawn."""
        from mmfree_jax.experiments.scaling.plots import png

        print(text)
        paths: list[PlaceOrUrl | Path | Url] = [self.out]
        write_json(self.out, document)
        if self.plot:
            figure, rows = draw()
            paths += outputs(self.out)
            write_bytes(paths[1], png(figure))
            write_csv(paths[2], rows)
        print("wrote " + ", ".join(map(str, paths)))
        return 0


@dataclass(frozen=True, kw_only=True)
class Analysis(Output):
    """What every analysis of runs asks for."""

    size: Size = "auto"
    """Which parameters N counts. auto: those without embedding and head where every run has that
    column, else the column of parameters."""
    flops: Flops = "auto"
    """How compute C is counted. auto: the column of FLOPs where every run has it (for isoflop the
    budgets first), else 6 N D."""
    bootstrap: CountOrZero = 1000
    """Resamples for the intervals (a count; 0 for none)."""
    level: InnerShare = 0.95
    """Level of all intervals (a fraction)."""
    seed: Seed = 0
    """Of the bootstrap and the restarts."""
    reading: Annotated[Reading, tyro.conf.arg(name="")] = field(default_factory=Reading)

    def read(self, paths: Sequence[StrPath]) -> RunFrame:
        """The runs in files or directories."""
        reading = self.reading
        return read_runs(paths, reading.columns, where=reading.where, points=reading.points)

    def read_family(self, paths: Sequence[StrPath]) -> RunFrame:
        """The runs in files or directories, which are of one family.

        Raises:
            ScalingError: they are of several; the message says which column makes them.
        """
        frame = self.read(paths)
        families = sorted({str(f) for f in frame.family if f})
        if len(families) > 1:
            column = frame.sources.get("family", "family")
            raise ScalingError(f"runs: {len(families)} families ({', '.join(families)}) in one "
                               f"fit, by the column {column!r}; choose one with --where "
                               f"'{column} = {families[0]}', or take all with "
                               "--columns.family none")  # fmt: skip
        return frame


@dataclass(frozen=True, kw_only=True)
class Fitting(Analysis):
    """What an analysis that fits laws asks for besides."""

    objective: Literal["auto", "huber", "lad", "log-lsq", "lsq"] = "auto"
    """Sum over runs that is minimised: Huber or absolute value of log-loss residuals, squares of
    log loss, squares of loss. auto: lsq for line and accuracy, huber otherwise."""
    delta: AboveZero = 1e-3
    """Where Huber's loss turns from quadratic to linear (log loss)."""
    resample: Literal["runs", "noise"] = "runs"
    """Draw runs with replacement, or redraw each loss from its loss-sd column."""


def outputs(out: PlaceOrUrl, sources: Sequence[StrPath] = ()) -> tuple[Path | Url, Path | Url]:
    """Where the figure and its data go: beside `out`, as NAME.png and NAME.plot.csv.

    Raises:
        ScalingError: the folder does not exist or `out` is not a .json file.
        OutputError: what is there is one of `sources`, or no result of an analysis.
    """
    place = locate(out, "out")
    beside = place.with_suffix(".png"), place.with_suffix(".plot.csv")
    check_output(out, "laws?|families|approaches", beside=beside, sources=sources)
    return beside


def check_output(
    out: PlaceOrUrl,
    first: str,
    *,
    beside: Sequence[Path | Url] = (),
    sources: Sequence[StrPath] = (),
) -> None:
    """Refuses a JSON result that cannot be written, or would replace what is no such result.

    Args:
        out: the result; `beside`: what is written with it; `sources`: what is read.
        first: regular expression for the first key of its document.

    Raises:
        ScalingError, OutputError: as `outputs`.
    """
    place = locate(out, "out")
    if place.suffix != ".json":
        raise ScalingError(f"out: {out} must end in .json")
    if isinstance(place, Path) and not place.parent.is_dir():
        raise ScalingError(f"out: the folder {place.parent} does not exist; create it first")
    check_file(out, rf'\{{\s*"({first})"', beside=beside, sources=sources)
