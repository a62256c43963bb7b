"""`mmfree bench edge`: speed and memory on a CPU, exports against llama.cpp."""

from collections.abc import Sequence

from mmfree_jax.cli.parse import parse
from mmfree_jax.errors import MMFreeError


def bench_edge(argv: Sequence[str]) -> int:
    """Time decoding and prefill on a CPU: ONNX exports against llama.cpp, with their memory."""
    from mmfree_jax.experiments.bench.edge import STUDY, Plan, measure

    plan = parse(Plan, argv, prog="mmfree bench edge")
    rows = measure(plan, "mmfree bench edge " + " ".join(argv))
    if not plan.prepare_only:
        STUDY.conclude(rows, plan.out)
        return 0
    for row in rows:
        print(STUDY.describe(row))
    if rows:
        raise MMFreeError(f"{len(rows)} models could not be prepared: their reasons are above")
    return 0
