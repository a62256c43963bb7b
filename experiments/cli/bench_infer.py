"""`mmfree bench infer`: memory and latency of decoding by model size."""

from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_infer(argv: Sequence[str]) -> int:
    """Time decoding and prefill by model size, packed against bfloat16, with memory and energy."""
    from mmfree_jax.experiments.bench.infer import STUDY, Plan, measure

    plan = parse(Plan, argv, prog="mmfree bench infer")
    rows = measure(plan, "mmfree bench infer " + " ".join(argv))
    STUDY.conclude(rows, plan.out, measured=not plan.join)
    return 0
