"""`mmfree bench edge`: speed and memory on a CPU, exports against llama.cpp."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from mmfree_jax.cli.parse import names, numbers, parse
from mmfree_jax.ranges import AboveZero, Count, CountOrZero, NotNegative


@dataclasses.dataclass(frozen=True)
class BenchEdgeConfig:
    """Time decoding and prefill on a CPU with random weights, each in its own process."""

    out: Path
    """Folder that receives edge.json, edge.md (tables) and edge.png."""
    sizes: str = "370M,1.3B"
    """Presets to measure, separated by commas; the peer is the same preset's Transformer++."""
    forms: str = (
        "onnx-fast,llama-q4_0,onnx-exact,llama-tq2_0,llama-q4_k_m,jax-cpu,onnx-f32,llama-f16"
    )
    """What to measure, separated by commas, in this order; llama-q8_0 and llama-tq1_0 exist too."""
    contexts: str = "32,512,2048,16384"
    """Tokens read before decoding, separated by commas; all forms at the first of them."""
    context_forms: str = "onnx-fast,llama-q4_0"
    """Forms that are measured at the other contexts too, separated by commas."""
    threads: Count = 2
    """Threads, and cores that a measurement may use."""
    steps: Count = 64
    """Tokens of one timed loop."""
    repeats: Count = 3
    """Timed loops; the median counts."""
    prefill: CountOrZero = 512
    """Also time reading a prompt of this many tokens; 0: do not."""
    peer_python: str = ""
    """Python interpreter that has llama-cpp-python and gguf; empty: the peer is left out."""
    models: Path | None = None
    """Folder for the models' files and saved contexts, several GB, which later runs reuse; none:
    a temporary one."""
    prepare_only: bool = False
    """Make those files and stop."""
    quiet: NotNegative = 0.2
    """Take a measurement again, three times at most, if other processes used more cores than this
    meanwhile; the least disturbed one counts."""
    timeout: AboveZero = 600.0
    """Longest time for one measurement (seconds)."""


def bench_edge(argv: Sequence[str]) -> int:
    """Time decoding and prefill on a CPU: ONNX exports against llama.cpp, with their memory.

    Args:
      argv: the arguments behind `mmfree bench edge`.

    Returns:
      The exit code: 1 if no measurement succeeded.

    Raises:
      ConfigError: an unknown size or form, a number that cannot be read or does not fit, or a
        peer's interpreter without its packages.
    """
    config = parse(BenchEdgeConfig, argv, prog="mmfree bench edge")
    from mmfree_jax.experiments.bench import edge

    plan = edge.Plan(
        sizes=names(config.sizes),
        forms=names(config.forms),
        contexts=numbers("contexts", config.contexts),
        context_forms=names(config.context_forms),
        threads=config.threads,
        steps=config.steps,
        repeats=config.repeats,
        prefill=config.prefill,
        peer_python=config.peer_python,
        models=config.models,
        quiet=config.quiet,
        timeout_s=config.timeout,
    )
    edge.check(plan)
    command = "mmfree bench edge " + " ".join(argv)
    rows = edge.measure(
        plan,
        config.out,
        command,
        lambda line: print(line, flush=True),
        prepare_only=config.prepare_only,
    )
    if config.prepare_only:
        for row in rows:
            print(edge.describe(row))
        return 1 if rows else 0
    print(f"{config.out / edge.RECORDS}, {edge.TABLE}, {edge.FIGURE}")
    return 1 if all("failed" in row for row in rows) else 0
