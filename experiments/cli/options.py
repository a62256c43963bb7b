"""Options that several subcommands share, and where their results go."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.output_files import write_csv, write_json
from mmfree_jax.experiments.scaling.read import Columns
from mmfree_jax.files import write_bytes

Size = Literal["total", "non-embedding", "ternary"]
Flops = Literal["6nd", "6nd-non-embedding", "exact", "bit-operations", "energy"]
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


def outputs(out: Path) -> tuple[Path, Path]:
    """Where the figure and its data go: beside `out`, as NAME.png and NAME.plot.csv.

    Raises:
        ScalingError: the folder does not exist or `out` is not a .json file.
    """
    if out.suffix != ".json":
        raise ScalingError(f"out: {out} must end in .json")
    if not out.parent.is_dir():
        raise ScalingError(f"out: the folder {out.parent} does not exist; create it first")
    return out.with_suffix(".png"), out.with_suffix(".plot.csv")


def save(out: Path, document: dict[str, Any], plot: Any) -> list[Path]:
    """Write the JSON, and where `plot` (a function giving figure and rows) is set, its files."""
    figure_path, data_path = outputs(out)
    write_json(out, document)
    if plot is None:
        return [out]
    from mmfree_jax.experiments.scaling.plots import png

    figure, rows = plot()
    write_bytes(figure_path, png(figure))
    write_csv(data_path, rows)
    return [out, figure_path, data_path]
