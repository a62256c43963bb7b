"""`mmfree bench packing`: how far packed forms of a trained model agree with it."""

import datetime
from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_packing(argv: Sequence[str]) -> int:
    """Compare packed forms of a trained model with it: greedy text, logits, size and speed."""
    from mmfree_jax.experiments.bench.packing import Plan, run

    plan = parse(Plan, argv, prog="mmfree bench packing")
    command = "mmfree bench packing " + " ".join(argv)
    run(plan, {"command": command, "date": datetime.date.today().isoformat()})
    return 0
