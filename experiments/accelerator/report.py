"""What `mmfree hardware report` prints: laws against the paper's tables, and estimates."""

import dataclasses
from typing import Any

from rich.console import Console
from rich.table import Table

from mmfree_jax.experiments.accelerator.paper import Laws, Prediction
from mmfree_jax.experiments.accelerator.performance import Estimate

# Table 3 of arXiv 2503.18002, generating: name, tokens/s, mJ a token.
LOIHI = (
    ("Loihi 2, 24 chips (370M; no embedding, no head)", 59.4, 70.8),
    ("Loihi 2, one chip times 24 (370M; no embedding, no head)", 71.3, 59.0),
    ("MatMul-free 370M on an H100", 13.4, 10_100.0),
    ("Transformer++ 370M on an H100", 22.4, 5_500.0),
    ("Qwen2-500M on a Jetson Orin Nano", 13.4, 791.0),
)


def as_dict(
    laws: Laws,
    rows: list[Prediction],
    notes: list[str],
    estimates: dict[str, list[Estimate]],
) -> dict[str, Any]:
    """The report as plain values."""
    return {
        "fitted": dataclasses.asdict(laws),
        "tables": [dataclasses.asdict(row) | {"error": row.error} for row in rows],
        "inconsistencies": notes,
        "estimates": {
            model: [
                dataclasses.asdict(e)
                | {
                    "token_ms": e.token_ms,
                    "tokens_per_s": e.tokens_per_s,
                    "mj_per_token": e.mj_per_token,
                }
                for e in own
            ]
            for model, own in estimates.items()
        },
        "loihi_2_published": [
            {"name": name, "tokens_per_s": rate, "mj_per_token": energy}
            for name, rate, energy in LOIHI
        ],
    }


def show(
    console: Console,
    laws: Laws,
    rows: list[Prediction],
    notes: list[str],
    estimates: dict[str, list[Estimate]],
) -> None:
    """Prints tables."""
    table = Table(title="published rows and the laws that give them", title_justify="left")
    for name in ("table", "quantity", "row"):
        table.add_column(name)
    for name in ("published", "law", "error"):
        table.add_column(name, justify="right")
    table.add_column("")
    for row in rows:
        table.add_row(
            row.table,
            row.quantity,
            row.row,
            f"{row.published:.4g}",
            f"{row.predicted:.4g}",
            f"{row.error:+.1%}",
            "fitted" if row.fitted else "held out",
        )
    console.print(table)
    table = Table("fitted parameter", title_justify="left")
    table.add_column("value", justify="right")
    for name, value in dataclasses.asdict(laws).items():
        table.add_row(name, f"{value:.5g}")
    console.print(table)
    console.print("inconsistencies in the published numbers:", highlight=False)
    for note in notes:
        console.print(f"- {note}", highlight=False, soft_wrap=True)
    for model, own in estimates.items():
        title = f"{model}: simulated cycles, clock and power by the paper's Table 5"
        table = Table("machine", title=title, title_justify="left")
        for name in (
            "cores", "MHz", "block ms", "blocks ms", "ends ms", "token ms", "tokens/s", "W",
            "mJ/token",
        ):  # fmt: skip
            table.add_column(name, justify="right")
        for e in own:
            values = (e.clock_mhz, e.block_ms, e.blocks_ms, e.ends_ms, e.token_ms)
            cells = [f"{v:.4g}" for v in (*values, e.tokens_per_s, e.power_w)]
            table.add_row(e.machine, str(e.cores), *cells, f"{e.mj_per_token:,.0f}")
        console.print(table)
    table = Table("published elsewhere (arXiv 2503.18002, generating)")
    for name in ("tokens/s", "mJ/token"):
        table.add_column(name, justify="right")
    for name, rate, energy in LOIHI:
        table.add_row(name, f"{rate:g}", f"{energy:,.4g}")
    console.print(table)
    console.print(
        '"ends": embedding, final norm and head, which the paper leaves out. Nothing ran on a '
        "board.",
        highlight=False,
    )
