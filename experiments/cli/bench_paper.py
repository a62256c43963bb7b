"""`mmfree bench paper`: the paper's tables of speed, memory and energy, measured here."""

from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_paper(argv: Sequence[str]) -> int:
    """Measure training, inference and energy as the paper's tables do, its values beside."""
    from mmfree_jax.experiments.bench.paper import STUDY, Plan, measure

    plan = parse(Plan, argv, prog="mmfree bench paper")
    STUDY.conclude(measure(plan, "mmfree bench paper " + " ".join(argv)), plan.out)
    return 0
