"""`mmfree bench infer`: memory and latency of decoding by model size."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from mmfree_jax.cli.parse import names, numbers, parse
from mmfree_jax.ranges import AboveZero, Count, CountOrZero

Form = Literal["packed", "matmulfree-bf16", "transformer-bf16"]


@dataclasses.dataclass(frozen=True)
class BenchInferConfig:
    """Time decoding and prefill with random weights, each measurement in its own process."""

    out: Path
    """Folder that receives infer.json, infer.md (a table) and infer.png."""
    sizes: str = "370M,1.3B,2.7B,7B,13B"
    """Presets to measure, separated by commas."""
    forms: str = "packed,matmulfree-bf16,transformer-bf16"
    """packed: ternary weights at 2 bits; the others compute with dense bfloat16 weights."""
    batch_sizes: str = "1"
    """Rows decoded at once, separated by commas."""
    batch_forms: str = "packed"
    """Forms decoded with more than one row, separated by commas."""
    steps: Count = 64
    """Tokens of one timed loop."""
    repeats: Count = 5
    """Timed loops; the median counts."""
    prefill: CountOrZero = 0
    """Also time reading a prompt of this many tokens; 0: do not."""
    prefill_sizes: str = ""
    """Presets for the prompt, separated by commas; empty: those of --sizes."""
    energy: bool = False
    """Also read NVML's energy counter while decoding with --energy-size."""
    energy_seconds: AboveZero = 20.0
    """Shortest time over which the energy is read (seconds)."""
    energy_size: str = "370M"
    """Preset whose energy is read."""
    energy_batch_sizes: str = "1,64"
    """Rows decoded at once while the energy is read, separated by commas."""
    agreement: str = ""
    """Preset for which packed and unpacked logits are compared; empty: none."""
    timeout: AboveZero = 600.0
    """Longest time for one measurement (seconds)."""
    join: str = ""
    """Folders of earlier runs, separated by commas: put their rows together in --out and measure
    nothing."""


def bench_infer(argv: Sequence[str]) -> int:
    """Time decoding and prefill by model size, packed against bfloat16, with memory and energy.

    Args:
      argv: the arguments behind `mmfree bench infer`.

    Returns:
      The exit code: 1 if no measurement succeeded.

    Raises:
      ConfigError: an unknown size or form, or a number that cannot be read.
    """
    config = parse(BenchInferConfig, argv, prog="mmfree bench infer")
    from mmfree_jax.experiments.bench import infer

    if config.join:
        rows = infer.join([Path(name) for name in names(config.join)], config.out)
        print(f"{config.out / infer.RECORDS}, {infer.TABLE}, {infer.FIGURE}: {len(rows)} rows")
        return 0
    plan = infer.Plan(
        sizes=names(config.sizes),
        forms=names(config.forms),
        batch_sizes=numbers("batch-sizes", config.batch_sizes),
        batch_forms=names(config.batch_forms),
        steps=config.steps,
        repeats=config.repeats,
        prefill=config.prefill,
        prefill_sizes=names(config.prefill_sizes),
        energy_s=config.energy_seconds if config.energy else 0.0,
        energy_size=config.energy_size,
        energy_batch_sizes=numbers("energy-batch-sizes", config.energy_batch_sizes),
        agreement=config.agreement,
        timeout_s=config.timeout,
    )
    infer.check(plan)
    command = "mmfree bench infer " + " ".join(argv)
    rows = infer.measure(plan, config.out, command, lambda line: print(line, flush=True))
    print(f"{config.out / infer.RECORDS}, {infer.TABLE}, {infer.FIGURE}")
    return 1 if all("failed" in row for row in rows) else 0
