"""`mmfree bench coverage`: how often intervals of scaling laws hold a known truth."""

import datetime
from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_coverage(argv: Sequence[str]) -> int:
    """Measure how often intervals of scaling laws hold a known truth, on synthetic runs."""
    from mmfree_jax.experiments.bench.coverage import Plan, run

    plan = parse(Plan, argv, prog="mmfree bench coverage")
    command = "mmfree bench coverage " + " ".join(argv)
    run(plan, {"command": command, "date": datetime.date.today().isoformat()})
    return 0
