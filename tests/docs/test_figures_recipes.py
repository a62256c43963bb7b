"""Documented figures of the recipes are those of results/recipes."""

import csv
import io

import pytest

DOCUMENT = "docs/recipes.md"
STUDY = "docs/scaling-study.md"
MIDDLE = {"lion": 0.001}


@pytest.fixture(scope="module")
def table(records):
    def read(name):
        return list(csv.DictReader(io.StringIO(records.text(f"recipes/{name}"))))

    return read


@pytest.fixture(scope="module")
def losses(table):
    """Held-out loss and tokens/s of each arm by rate."""
    found = {}
    for row in table("stage1.csv"):
        by_rate = found.setdefault(row["family"], {})
        by_rate[float(row["learning_rate"])] = (float(row["loss"]), float(row["tokens_per_s"]))
    return found


def rate(value):
    return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-")


def test_stage_1(losses, records, compare):
    text = (records.folder.parents[1] / DOCUMENT).read_text(encoding="utf-8")
    said = {}  # What differs is prose, and is the page's own.
    for line in text.splitlines():
        if line.startswith("| `"):
            said[line.split("`")[1]] = line.split(" | ")[1]
    sizes = records["recipes/stage1-sizes.json"]
    middle = {arm: by[MIDDLE.get(arm, 0.004)] for arm, by in losses.items()}
    lines = []
    for arm in sorted(middle, key=lambda arm: middle[arm][0]):
        loss, speed = middle[arm]
        others = [
            f"{other:.4f} at {rate(at)}"
            for at, (other, _) in sorted(losses[arm].items())
            if at != MIDDLE.get(arm, 0.004)
        ]
        size, state = sizes[arm], sizes[arm]["state_bytes"]
        packed = size["packed_bytes"]
        kept = f"{state['constant'] / 1000:.1f}" if state["constant"] > 1000 else "0"
        kept += f" + {state['per_token'] / 1000:.1f} a token" if state["per_token"] else ""
        cells = (
            f"`{arm}`",
            said[arm],
            f"{loss:.4f}" + (" (1e-3)" if arm == "lion" else ""),
            "" if arm == "absmean" else f"{loss - middle['absmean'][0]:+.4f}",
            ", ".join(others),
            f"{speed / 1000:.0f}k",
            f"{size['training_memory_estimate_bytes'] / 2**30:.2f}",
            f"{packed / 1e6:.1f}" if packed else "no",
            kept,
        )
        lines.append(f"| {' | '.join(cells)} |".replace("|  |", "| |"))
    lines.append(f"| `hgrn2` | {said['hgrn2']} | stopped | | | | 2.58 | 6.5 | 1048.6 |")
    compare(DOCUMENT, lines)


def test_what_stage_1_says(losses, compare):
    def less(arm, than="absmean", at=0.004):
        return losses[arm][at][0] - losses[than][at][0]

    best = {arm: min(by.values())[0] for arm, by in losses.items()}
    compare(
        DOCUMENT,
        [
            f"{-less('transformer'):.3f} nats behind Transformer++",
            f"costs {-less('float-twin'):.3f} of these, {-less('float-head'):.3f} of them in the",
            f"leave {less('float-twin', 'transformer'):.3f}",
            f"{-less('hybrid-6-1'):.3f} nats, two of eight {-less('hybrid-3-1'):.3f}",
            f"with float projections {-less('hybrid-3-1-float'):.3f}",
            f"Adafactor {-less('adafactor'):.3f}",
            f"schedule-free AdamW is {less('schedule-free'):.3f} behind",
            f"({best['absmean']:.4f} at 8e-3",
            f"minGRU {less('mingru'):.3f} and RG-LRU {less('rglru'):.3f} above",
        ],
    )


def test_the_ternary_transformer(table, compare):
    training = table("stage1-training.csv")
    rows = [row for row in training if row["run"].startswith("ternary-transformer")]
    losses = {int(r["step"]): float(r["loss"]) for r in rows}
    lowest = min(losses, key=losses.get)
    highest = max((step for step in losses if step > lowest), key=losses.get)
    norms = {int(r["step"]): float(r["grad_norm"]) for r in rows}
    lines = [
        f"falls to {losses[lowest]:.2f} at step {lowest:,}",
        f"rises to {losses[highest]:.2f} at step {highest:,}",
        f"from {norms[lowest]:.1f} to {norms[highest]:,.0f}",
    ]
    compare(DOCUMENT, lines)


def test_five_runs_at_a_time(records, table, compare):
    first = table("stage1.csv")[:5]
    together = sum(float(row["tokens_per_s"]) for row in first)
    steps = records["h200/small_models.json"]["records"]
    (alone,) = (r["measurement"] for r in steps if r["preset"] == "rung-7M")
    compare("docs/sweeps.md", [f"on {together / 1e6:.2f}M tokens/s together"])
    compare("docs/sweeps.md", [f"a step alone gives {alone['tokens_per_s'] / 1e6:.2f}M"])
    step = f"takes {alone['step_ms']:.1f} ms, {alone['tokens_per_s'] / 1e6:.2f}M tokens/s"
    compare(DOCUMENT, [f"alone a step of `absmean` {step}"])
