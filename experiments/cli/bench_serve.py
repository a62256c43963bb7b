"""`mmfree bench serve`: tokens a second and delays of the server, by streams and load."""

import datetime
from collections.abc import Sequence

from mmfree_jax.cli.parse import parse


def bench_serve(argv: Sequence[str]) -> int:
    """Measure the server: tokens a second beside the bare loop, delays by load, prefix cache."""
    from mmfree_jax.experiments.bench.serve import Plan, run

    plan = parse(Plan, argv, prog="mmfree bench serve")
    command = "mmfree bench serve " + " ".join(argv)
    run(plan, {"command": command, "date": datetime.date.today().isoformat()})
    return 0
