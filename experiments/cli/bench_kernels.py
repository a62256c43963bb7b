"""`mmfree bench kernels`: every op at real models' shapes, against the device's limits."""

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from mmfree_jax.cli.parse import Names, parse
from mmfree_jax.errors import ConfigError
from mmfree_jax.files import check_file, write_text
from mmfree_jax.model_config import Dtype
from mmfree_jax.ranges import Count

_DESCRIPTION = """Time every implementation of the kernels at the shapes of real models, beside what
the device's data sheet allows. Writes kernels.json and, on a known device, roofline.png."""


@dataclasses.dataclass(frozen=True)
class _Arguments:
    out: Path | None = None
    """Folder for kernels.json and roofline.png; none: print only."""
    ops: Names = ("recurrence", "norm_quant", "ternary_matmul", "bitlinear", "cross_entropy")
    """Which ones, separated by commas."""
    sizes: Names = ("370M", "1.3B")
    """Presets whose shapes are taken, separated by commas."""
    tokens: Count = 16_384
    """In a batch."""
    seq_len: Count = 2048
    """Of the recurrence's rows (tokens)."""
    dtype: Dtype = "bfloat16"
    """Of the float inputs, where an op has a choice."""
    choices: Path | None = None
    """Table to put this device's winners into: pallas_kernels/dispatch.json in a checkout."""


def kernels(argv: Sequence[str]) -> int:
    """Time the kernels, draw their roofline and keep which implementation is fastest."""
    arguments = parse(_Arguments, argv, prog="mmfree bench kernels", description=_DESCRIPTION)
    if arguments.choices is not None and not arguments.choices.parent.is_dir():
        raise ConfigError(f"--choices is {arguments.choices}: its folder does not exist")
    if arguments.out is not None:
        figure = arguments.out / "roofline.png"
        check_file(arguments.out / "kernels.json", r'\{\s*"command"', beside=[figure])

    import jax  # JAX starts here, not for --help

    from mmfree_jax.experiments.bench.kernels import measure, provenance, write_choices
    from mmfree_jax.experiments.bench.roofline import plot
    from mmfree_jax.train.flops import find_device

    command = "mmfree bench kernels " + " ".join(argv)
    rows = []
    for row in measure(
        arguments.ops,
        arguments.sizes,
        tokens=arguments.tokens,
        seq_len=arguments.seq_len,
        dtype=arguments.dtype,
    ):
        rows.append(row)
        print(_line(row), flush=True)
        if arguments.out is not None:  # at once, so that a run cut short leaves what it measured
            record = {"command": command, "versions": provenance(), "rows": rows}
            write_text(arguments.out / "kernels.json", json.dumps(record, indent=1) + "\n")
    device = find_device(jax.devices()[0].device_kind)
    if arguments.out is not None and device is not None:
        plot(rows, device, arguments.out / "roofline.png")
    if arguments.choices is not None:
        write_choices(rows, arguments.choices, command=command)
    Console().print(_table(rows))
    return 0


_MEASURED = ("error", "ms", "forward_ms", "with_backward_ms", "tflops", "gb_per_s", "over_bf16")
_NOT_SHOWN = (*_MEASURED, "op", "variant", "key", "dtype", "candidate", "differ", "operations",
              "bytes", "limit_ms", "of_limit", "temp_mb", "resets")  # fmt: skip


def _shape(row: dict) -> str:
    return " ".join(f"{name}={row[name]}" for name in row if name not in _NOT_SHOWN)


def _line(row: dict) -> str:
    measured = {name: row[name] for name in (*_MEASURED, "of_limit") if name in row}
    return f"{row['op']} {_shape(row)} {row['variant']}: {json.dumps(measured)}"


def _table(rows: Sequence[dict]) -> Table:
    table = Table("op", "shape", "implementation", "ms", "limit", "share", title="Kernels")
    for row in rows:
        ms = row.get("ms", row.get("with_backward_ms"))
        table.add_row(
            row["op"],
            _shape(row),
            row["variant"],
            row["error"][:60] if "error" in row else f"{ms:.4f}",
            f"{row['limit_ms']:.4f}" if "limit_ms" in row else "",
            f"{100 * row['of_limit']:.0f}%" if "of_limit" in row else "",
        )
    return table
