"""`mmfree bench`: measurements of this machine, as a table and JSON."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from mmfree_jax.cli.parse import parse
from mmfree_jax.cli.train import base_config, with_vocabulary
from mmfree_jax.config import TrainConfig
from mmfree_jax.files import check_file, write_text
from mmfree_jax.installed import versions
from mmfree_jax.places import PlaceOrUrl
from mmfree_jax.progress import show_progress
from mmfree_jax.ranges import Count


@dataclasses.dataclass(frozen=True)
class _TrainArguments:
    preset: str | None
    """Named size to start from; `mmfree train --help` lists them."""
    config: PlaceOrUrl | None
    """YAML file over it, or its URL."""
    run: Annotated[TrainConfig, tyro.conf.arg(name="")]
    out: Path | None = None
    """File that receives the measurement as JSON."""
    groups: Count = 5
    """Groups of steps that are timed; the median counts."""
    steps_per_group: Count = 4
    """Steps queued at once in a group."""
    trace: Path | None = None
    """Folder for a profiler trace of two more steps; their time is printed kernel by kernel."""


def train(argv: Sequence[str]) -> int:
    """Time the training step and read its peak memory, on random tokens."""
    arguments = parse(
        _TrainArguments,
        argv,
        prog="mmfree bench train",
        default=_TrainArguments(None, None, base_config(argv)),
    )
    if arguments.out is not None:
        check_file(arguments.out, r'\{\s*"measurement"')
    with show_progress("compiling and measuring the step"):
        from mmfree_jax.experiments.bench.train import (
            measure_train_step,  # JAX starts here, not for --help
        )

        result = measure_train_step(
            with_vocabulary(argv, arguments.run),
            groups=arguments.groups,
            steps_per_group=arguments.steps_per_group,
            trace_dir=arguments.trace,
        )
    record = {
        "measurement": dataclasses.asdict(result),
        "command": "mmfree bench train " + " ".join(argv),
        "versions": versions("jax", "jaxlib", "flax"),
    }
    if arguments.out is not None:
        write_text(arguments.out, json.dumps(record, indent=1) + "\n")
    peak = "unknown" if result.peak_gib is None else f"{result.peak_gib:.1f} GiB"
    print(
        f"{result.family} {result.parameters / 1e6:,.0f}M, {result.batch_size} x "
        f"{result.seq_len} tokens on {result.devices} x {result.device_kind}: "
        f"{result.step_ms:.1f} ms a step, {result.tokens_per_s:,.0f} tokens/s, "
        f"{result.model_tflops:.0f} TFLOP/s, peak {peak}, compiled in {result.compile_s:.0f} s"
    )
    if not result.finite:
        print(
            "warning: the loss or its gradient was not finite, so that the steps that were timed "
            "changed nothing: a smaller --optimizer.learning-rate may help, or make gpu tells why",
            file=sys.stderr,
        )
    if arguments.trace is not None:
        _print_kernels(arguments.trace, devices=result.devices)
    return 0


def _print_kernels(trace_dir: Path, *, devices: int, most: int = 40) -> None:
    """A step's device time by kernel, and what the collectives cost."""
    from mmfree_jax.experiments.bench.trace import exchange, kernel_times, read_kernels
    from mmfree_jax.experiments.bench.train import TRACED_STEPS

    kernels = read_kernels(trace_dir)
    times = kernel_times(kernels)
    share = 1 / (TRACED_STEPS * devices)
    table = Table("kernel", "calls", "ms", title="A step on one device")
    for name, calls, ms in times[:most]:
        table.add_row(name[:90], f"{calls * share:g}", f"{ms * share:.3f}")
    rest = times[most:]
    table.add_row(
        f"{len(rest)} others",
        f"{sum(t.calls for t in rest) * share:g}",
        f"{sum(t.milliseconds for t in rest) * share:.3f}",
    )
    table.add_row("all", "", f"{sum(t.milliseconds for t in times) * share:.3f}")
    Console().print(table)
    moved = exchange(kernels)
    if moved.total_ms:
        print(
            f"collectives: {moved.total_ms / TRACED_STEPS:.2f} ms a step, "
            f"{moved.hidden_ms / moved.total_ms:.0%} of it beside other kernels"
        )
