"""Documented estimates of the accelerator are those of `mmfree hardware report`."""

import json
from math import floor, log10

from mmfree_jax.cli.main import main

MACHINES = {
    "as built: 8-bit reads": "as built: 8-bit reads",
    "512-bit bus, reads as slow": "512-bit bus, reads as slow (the paper's 1/64)",
    "512-bit bus, bursts": "512-bit bus, bursts",
}
"""Names of the machines in the report and in the document."""


def significant(value, digits, most=3):
    """So many significant digits, at most so many decimals; zeros for what is left of them."""
    places = digits - 1 - floor(log10(value))
    return f"{round(value, min(places, most)):,.{min(max(places, 0), most)}f}"


def milliseconds(value):
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}"


def test_estimates(capsys, compare):
    assert main(["hardware", "report", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    lines = []
    for size in ("370M", "1.3B", "2.7B"):
        for found in report["estimates"][size]:
            cells = [
                size,
                MACHINES[found["machine"]],
                significant(found["block_ms"], 4),
                milliseconds(found["blocks_ms"]),
                milliseconds(found["token_ms"]),
                significant(found["tokens_per_s"], 3, most=2),
                f"{found['power_w']:.2f}",
                significant(found["mj_per_token"], 3),
            ]
            lines.append(f"| {' | '.join(cells)} |")
    compare("docs/hardware.md", lines)
