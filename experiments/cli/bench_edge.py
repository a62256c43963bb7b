"""`mmfree bench edge`: speed and memory on a CPU, exports against llama.cpp."""

from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_edge(argv: Sequence[str]) -> int:
    """Time decoding and prefill on a CPU: ONNX exports against llama.cpp, with their memory."""
    from mmfree_jax.experiments.bench.edge import STUDY, Plan, measure

    plan = parse(Plan, argv, prog="mmfree bench edge")
    rows = measure(plan, "mmfree bench edge " + " ".join(argv))
    if not plan.prepare_only:
        return STUDY.exit_code(rows, plan.out)
    for row in rows:
        print(STUDY.describe(row))
    return 1 if rows else 0
