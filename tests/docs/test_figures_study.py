"""Documented figures of the scaling study are those of the tables in results/study."""

import csv

import numpy as np
import pytest
import yaml

from mmfree_jax.experiments.scaling import read_runs
from mmfree_jax.experiments.scaling.gap import pair, trend

DOCUMENT = "docs/scaling-study.md"
SIZES = ("1M", "3M", "7M", "18M", "61M")
BUDGETS = (3, 6, 12, 24)  # million tokens
FAMILIES = ("matmulfree", "transformer")


@pytest.fixture(scope="module")
def table(records):
    def read(name):
        with open(records.folder / "study" / name, newline="", encoding="utf-8") as stream:
            return list(csv.DictReader(stream))

    return read


@pytest.fixture(scope="module")
def losses(table):
    """Mean held-out loss over seeds by (family, size, million tokens)."""
    found = {}
    for row in table("best.csv"):
        budget = round(float(row["tokens"]) / 1e6)
        key = (row["family"], row["size"].removeprefix("rung-"), budget)
        found.setdefault(key, []).append(float(row["loss"]))
    return {key: float(np.mean(values)) for key, values in found.items()}


def test_losses(losses, compare):
    def cell(*key):
        return f"{losses[key]:.3f}" if key in losses else "cut off"

    lines = []
    for size in SIZES:
        cells = [" / ".join(cell(f, size, budget) for f in FAMILIES) for budget in BUDGETS]
        lines.append(f"| {size} | {' | '.join(cells)} |".replace("cut off / cut off", "cut off"))
    compare(DOCUMENT, lines)


def test_six_n_d_over_exact_flops(table, compare):
    rows = {(r["family"], r["size"].removeprefix("rung-")): r for r in table("results.csv")}

    def cell(family, size):
        params, tokens, flops = (
            float(rows[family, size][name]) for name in ("params", "tokens", "flops")
        )
        return f"{6 * params * tokens / flops:.2f}"

    lines = [
        f"| {label} | {' | '.join(cell(family, size) for size in SIZES)} |"
        for family, label in zip(FAMILIES, ("MatMul-free", "Transformer++"), strict=True)
    ]
    compare("docs/scaling.md", lines)


def test_rates(table, compare):
    lines = []
    for family, label in zip(FAMILIES, ("MatMul-free", "Transformer++"), strict=True):
        cells = []
        for row in (r for r in table("rates.csv") if r["family"] == family):
            rate = f"{float(row['learning_rate']):.1e}".replace(".0e", "e").replace("e-0", "e-")
            cells.append(
                rate
                + " (lowest tried)" * (row["at_edge"] == "True")
                + " (carried over)" * (row["transferred"] == "True")
            )
        lines.append(f"| {label} | {' | '.join(cells)} |")
    compare(DOCUMENT, lines)


def test_gap(records, compare):
    families = [
        read_runs([records.folder / "study" / "best.csv"], where=[f"family = {family}"])
        for family in FAMILIES
    ]
    late = [f.take(f.tokens >= 1e7) for f in families]
    trends = [
        trend(pair(*frames))
        for frames in (late, [f.take(f.params_non_embedding < 5e7) for f in late], families)
    ]

    def cells(name):
        return " | ".join(
            f"{getattr(t, name):+.3f} [{t.intervals[name][0]:+.3f}, {t.intervals[name][1]:+.3f}]"
            for t in trends
        )

    lines = [
        f"| pairs, cells | {' | '.join(f'{t.n}, {t.cells}' for t in trends)} |",
        f"| a decade of size, at fixed tokens | {cells('per_size')} |",
        f"| a decade of tokens, at fixed size | {cells('per_tokens')} |",
        f"| a decade of both | {cells('per_both')} |",
        "| left over, and between seeds (nats) | "
        + " | ".join(f"{t.residual:.3f}, {t.seed_sd:.3f}" for t in trends)
        + " |",
    ]
    first = trends[0]
    size, tokens, both = (first.intervals[f"per_{name}"] for name in ("size", "tokens", "both"))
    lines += [  # the findings at the top
        f"by {-first.per_size:.3f} nats a decade of parameters "
        f"[95%: {-size[1]:.3f}, {-size[0]:.3f}]",
        f"by {first.per_tokens:.2f} nats a decade [{tokens[0]:.2f}, {tokens[1]:.2f}]",
        f"by {first.per_both:.2f} nats a decade of both [{both[0]:.2f}, {both[1]:.2f}]",
    ]
    compare(DOCUMENT, lines)


def test_five_longer_runs(records, compare):
    runs, lines, ends = records["h200/trained_61M.json"]["runs"], [], {}
    for run in runs:
        label = {"61M": "MatMul-free", "61M-transformer": "Transformer++"}[run["run"]]
        config = yaml.safe_load(run["config"])["optimizer"]
        settings = [run["learning_rate"], run["decay_fraction"]]
        assert [config["learning_rate"], config["decay_fraction"]] == settings
        losses = {point["step"]: point["loss"] for point in run["held_out"]}
        cells = [f"{losses[step]:.3f}" for step in (2000, 10_000, 20_000, 34_000, 43_000)]
        rate = f"{settings[0]:.2e}".replace("e-0", "e-")
        lines.append(f"| {label} | {rate} | {settings[1]:.0%} | {' | '.join(cells)} |")
        ends[label, *settings] = losses[43_000]
        assert run["summary"]["tokens"] == 43_000 * 16_384
    best = [min(v for k, v in ends.items() if k[0] == f) for f in ("MatMul-free", "Transformer++")]
    lines.append(f"Between the best of each the gap is {best[0] - best[1]:.3f} nats")
    gained = ends["MatMul-free", 9.86e-4, 0.6] - ends["MatMul-free", 1.97e-3, 0.6]
    lines.append(f"twice the rate gained MatMul-free {gained:.3f} nats")
    lines.append(f"{runs[0]['summary']['tokens'] / 1e6:.0f}M tokens or 11.5 a parameter")
    assert round(43_000 * 16_384 / 61.1e6, 1) == 11.5
    compare("docs/scaling-study.md", lines)


def test_ablations(table, losses, compare):
    ours = losses["matmulfree", "7M", 12]
    best = {row["family"]: float(row["loss"]) for row in table("ablation-best.csv")}
    best["transformer"] = losses["transformer", "7M", 12]
    starts = {
        "float": "float weights and activations, norms kept | 2e-3, 4e-3 | 2e-3",
        "float-head": "float head | 4e-3 | 4e-3",
        "attention": "attention for the MLGRU, all layers ternary | 2e-3, 4e-3 | 4e-3",
        "paper-schedule": "the paper's schedule | 5e-4, 4e-3, 1.6e-2 | 4e-3",
        "transformer": "Transformer++ | 1e-3 to 1.6e-2 (5) | 2e-3",
    }
    lines = [f"| MatMul-free | 2e-3 to 3.2e-2 (5) | 4e-3 | {ours:.3f} | |"]
    for family, start in starts.items():
        lines.append(f"| {start} | {best[family]:.3f} | {best[family] - ours:+.3f} |")
    compare(DOCUMENT, lines)
