"""What a kernel must at least do, and how near a measurement comes to the device's limits."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.files import open_atomically
from mmfree_jax.train.flops import Device

Row = dict[str, Any]

# Operations an element, counted from the definitions: an exponential, a root or a division is
# one. They place a point on the chart; such kernels are bound by memory anyway.
_RECURRENCE_OPS = {"forward": 2, "backward": 3, "mlgru_forward": 12, "mlgru_backward": 24}
_RECURRENCE_ARRAYS = {"forward": 3, "backward": 5, "mlgru_forward": 3, "mlgru_backward": 6}
_NORM_OPS = {"forward": (6, 4), "backward": (10, 12)}  # of the input, of each consumer
_FORM_OPS = {"outer": 4, "times_silu": 10, "gated": 6}


@dataclasses.dataclass(frozen=True)
class Work:
    """The fewest operations and bytes that a kernel can do its work with."""

    operations: float
    bytes: float
    matrix: str | None
    """Dtype of its matrix products, "int8" or "bfloat16"; None: element-wise."""

    def limit_ms(self, device: Device) -> float:
        """The data sheet's limit: the longer of the time for the bytes and for the products."""
        seconds = self.bytes / device.memory_bandwidth
        if self.matrix is not None:
            rate = device.int8_ops if self.matrix == "int8" else device.bf16_flops
            seconds = max(seconds, self.operations / rate)
        return 1e3 * seconds


def work_of(row: Mapping[str, Any]) -> Work | None:
    """The work behind a row of an op's `benchmark`; None where there is no single kernel."""
    op, _, step = row["op"].partition(" ")
    if op == "recurrence":
        size = row["shape"][0] * row["shape"][1] * row["shape"][2]
        return Work(_RECURRENCE_OPS[step] * size, 2 * _RECURRENCE_ARRAYS[step] * size, None)
    if op == "norm_quant":
        m, k, consumers, form = row["m"], row["k"], row["consumers"], row["form"]
        read = 1 if form == "outer" else 2
        own, each = _NORM_OPS[step]
        operations = m * k * (own + _FORM_OPS[form] + each * consumers)
        moved = 2 * read + consumers if step == "forward" else 2 * (2 * read + 2 * consumers)
        return Work(operations, m * k * moved, None)
    if op == "ternary_matmul":
        m, n, k = row["m"], row["n"], row["k"]
        if row["variant"].startswith("bf16"):
            return Work(2 * m * n * k, 2 * (m * k + n * k + m * n), "bfloat16")
        return Work(2 * m * n * k, m * k + n * k + 2 * m * n, "int8")
    return None


def with_limits(row: Row, device: Device | None) -> Row:
    """The row with its operations, bytes, the device's limit (ms) and the share of it reached."""
    work = work_of(row)
    if work is None or "ms" not in row:
        return row
    row = {**row, "operations": work.operations, "bytes": work.bytes}
    if device is not None:
        limit = work.limit_ms(device)
        row |= {"limit_ms": round(limit, 5), "of_limit": round(limit / row["ms"], 3)}
    return row


def plot(rows: Sequence[Row], device: Device, output: Path) -> None:
    """Draws the rows that have limits under the device's roofline, as a PNG."""
    import numpy as np
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    intensity = np.geomspace(0.1, 1e5, 200)
    for name, peak, style in (
        ("int8", device.int8_ops, "-"),
        ("bfloat16", device.bf16_flops, "--"),
    ):
        roof = np.minimum(peak, intensity * device.memory_bandwidth)
        axes.plot(intensity, 1e-12 * roof, style, color="grey", label=f"{name} limit")
    # Okabe and Ito's colours, which colour-blind readers can tell apart.
    colours = iter(("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"))
    groups: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        if "limit_ms" in row:
            name = f"{row['op'].split()[0]} {row['variant']}"
            point = (row["operations"] / row["bytes"], 1e-9 * row["operations"] / row["ms"])
            groups.setdefault(name, []).append(point)
    markers = {"xla": "x", "bf16": "+"}
    for name, points in groups.items():
        marker = next((m for key, m in markers.items() if f" {key}" in name), "o")
        colour = next(colours, "#999999")
        axes.scatter(*zip(*points, strict=True), s=28, marker=marker, color=colour, label=name)
    axes.set(
        xscale="log", yscale="log", xlabel="operations a byte", ylabel="tera-operations a second",
        title=f"Kernels on one {device.name}", ylim=(0.05, 4e-12 * device.int8_ops),
    )  # fmt: skip
    axes.legend(fontsize=7, loc="lower right")
    axes.grid(alpha=0.3, which="major")
    with open_atomically(output) as file:
        figure.savefig(file, dpi=150)
