"""How often the study's intervals hold the truth where the law has the wrong form.

`python -m mmfree_jax.experiments.study.misfit_coverage --out experiments/results/coverage` draws
tables of the study's cells (`synthetic_tables`) from losses that the law can express and from
losses that it cannot, analyses each as the study does, and counts how often the intervals hold the
gap along D / N = 20 and 80 and its slope: with what the law misses left out, in, and with a
departure of every cell's own in its place. Fits begin at the optimum of the table without noise.
"""

import argparse
import dataclasses
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.experiments.bench.records import cpu_name, markdown
from mmfree_jax.experiments.scaling.laws import Law, get_law
from mmfree_jax.experiments.scaling.misfit import LENGTHS
from mmfree_jax.experiments.scaling.output_files import write_json
from mmfree_jax.experiments.scaling.ratio_path import (
    log_losses_of,
    path_gap,
    residuals_of,
    size_on_path,
)
from mmfree_jax.experiments.scaling.training_cost import training_cost
from mmfree_jax.experiments.study.gap_slope import measured, on_path, path_ends
from mmfree_jax.experiments.study.refits import fit_mean, refit_draws
from mmfree_jax.experiments.study.runs import REPEATS_WORTH, Runs, frame_of
from mmfree_jax.experiments.study.synthetic_tables import (
    CELLS,
    COSTS,
    NAMES,
    UNIQUE,
    Table,
    Truth,
    draw_table,
    rows_at,
)
from mmfree_jax.files import write_text
from mmfree_jax.installed import versions

TRUTHS = {
    "law": Truth("the law"),
    "law, rates known": Truth("the law; every run has its best rate"),
    "product": Truth("a term in N D, 0.6 and -0.3 times the root of both terms' product",
                     product=(0.6, -0.3)),
    "bend": Truth("MatMul-free's size term bends by 0.0075 (log N)^2", bend=(0.0075, 0.0)),
    "strong bend": Truth("the same by 0.015 (log N)^2", bend=(0.015, 0.0)),
    "break": Truth("MatMul-free's token term falls with an exponent 0.25 larger beyond 150M tokens",
                   steeper=(0.25, 0.0)),
    "floors": Truth("MatMul-free's floor is 0.15 nats higher, while E is shared in the fit",
                    floor=(0.15, 0.0)),
}  # fmt: skip
KNOWN = "law, rates known"
OUT, IN, BY_CELL, NO_LAW = "left out", "in", "by cell", "no law"
METHODS = {OUT: (), IN: LENGTHS, BY_CELL: (0.05,)}
EVERY = 2
"""The alternative, a departure of every cell's own, is tried on every second table."""
RATIOS = (20, 80)
LEVELS = (0.95, 0.9)
BEYOND = 20.0
"""log10 FLOPs far beyond the runs."""


def without_noise(truth: Truth) -> dict[str, Runs]:
    """The runs with their mean losses at the best rates."""
    found = {}
    for name in NAMES:
        n, d = (np.array(c) for c in zip(
            *((n, n * 5 * 2.0**k) for n, budgets, seeds in CELLS for _ in range(seeds)
              for k in range(budgets)), strict=True))  # fmt: skip
        rows = rows_at(name, n, d, np.zeros(len(n)), np.ones(len(n)))
        loss = truth.run_loss(name, n, d)
        order = np.argsort([float(row["flops"]) for row in rows], kind="stable")
        found[name] = Runs([rows[i] for i in order], loss[order], loss[order][None],
                           loss[order][None])  # fmt: skip
    return found


def prepared(truth: Truth) -> tuple[Law, np.ndarray]:
    """The law, to begin at its optimum for a truth, and by how much it misses log losses [n]."""
    fit = fit_mean(without_noise(truth), ["E"], UNIQUE, REPEATS_WORTH, 0)
    starts = np.stack([found.vector() for found in fit.fits.values()])
    law = dataclasses.replace(get_law("chinchilla"),
                              starts=lambda model, x, y: model.from_parameters(starts))  # fmt: skip
    return law, residuals_of(fit, fit.search.point[None], log_losses_of(fit)[None])[0]


def true_gap(truth: Truth, ratio: float, log10_c: Sequence[float]) -> np.ndarray:
    """Loss of the first family less that of the second at equal compute on a path [m]."""
    first, second = (
        truth.loss(name, n, ratio * n)
        for name in NAMES
        for n in [size_on_path(COSTS[name], ratio, np.asarray(log10_c))]
    )
    return first - second


def trial(truth: Truth, law: Law, table: Table, seed: int, methods: Sequence[str],
          ) -> Iterator[dict[str, Any]]:  # fmt: skip
    """All intervals of one table."""
    families = table.families
    fit = fit_mean(families, ["E"], UNIQUE, REPEATS_WORTH, 0, law)
    costs = {
        name: training_cost(frame_of(runs, runs.fitted, None, 1.0), "non-embedding", "exact")
        for name, runs in families.items()
    }
    pairs = {ratio: [on_path(runs, ratio) for runs in families.values()] for ratio in RATIOS}
    for method in methods:
        refits = refit_draws(fit, families, table.noise, seed, METHODS[method])
        for ratio, level in ((r, x) for r in RATIOS for x in LEVELS):
            ends = path_ends(pairs[ratio])
            assert ends is not None
            gap = true_gap(truth, ratio, [*ends, BEYOND])
            slope = (gap[1] - gap[0]) / (ends[1] - ends[0])
            found = path_gap(fit, refits.draws, costs, NAMES, ratio, ends,
                             [BEYOND - 1, BEYOND], level, refits.beside)  # fmt: skip
            low, high = found.gap_intervals
            rows = [("gap at the smallest", found.gap[0], gap[0], low),
                    ("gap at the largest", found.gap[1], gap[1], high),
                    ("slope", found.slope, slope, found.slope_interval),
                    ("gap at 1e20", None, gap[2], found.lead.gap[:, 1])]  # fmt: skip
            yield from (_row(ratio, level, method, *row) for row in rows)
            plain = measured(pairs[ratio], level) if method == OUT else None
            if plain:
                yield _row(ratio, level, NO_LAW, "slope", plain["slope"], slope, plain["interval"])


def _row(ratio: float, level: float, method: str, quantity: str, estimate: float | None,
         truth: float, interval: Sequence[float]) -> dict[str, Any]:  # fmt: skip
    low, high = interval
    error = np.nan if estimate is None else estimate - truth
    return {"ratio": ratio, "level": level, "method": method, "quantity": quantity,
            "truth": truth, "holds": low <= truth <= high, "width": high - low,
            "error": error}  # fmt: skip


def score_interval(holds: int, of: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share that was counted."""
    z, share = 1.96, holds / of
    middle, half = (
        share + z * z / (2 * of),
        z * np.sqrt(share * (1 - share) / of + (z / of) ** 2 / 4),
    )
    return float((middle - half) / (1 + z * z / of)), float((middle + half) / (1 + z * z / of))


def summary(name: str, trials: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """A row for each interval of one truth."""
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for x in trials:
        groups.setdefault((x["ratio"], x["quantity"], x["level"], x["method"]), []).append(x)
    out = []
    for (ratio, quantity, level, method), own in groups.items():
        holds = sum(bool(x["holds"]) for x in own)
        errors = np.array([x["error"] for x in own])
        low, high = score_interval(holds, len(own))
        out.append({
            "truth": name, "ratio": ratio, "quantity": quantity, "level": level, "method": method,
            "holds": holds, "of": len(own), "coverage": round(holds / len(own), 4),
            "coverage_low": round(low, 4), "coverage_high": round(high, 4),
            "median_width": round(float(np.median([x["width"] for x in own])), 5),
            "true": round(float(np.mean([x["truth"] for x in own])), 5),
            "bias": round(float(errors.mean()), 5), "rms_error": round(
                float(np.sqrt((errors**2).mean())), 5),
        })  # fmt: skip
    return out


def table_of(rows: Sequence[dict[str, Any]]) -> str:
    """The 95% intervals as Markdown."""
    lines = [
        (x["truth"], f"{x['ratio']}", x["quantity"], x["method"],
         f"{x['holds']} of {x['of']}", f"{x['coverage_low']:.2f} to {x['coverage_high']:.2f}",
         f"{x['median_width']:.4f}", "" if np.isnan(x["bias"]) else f"{x['bias']:+.4f}")
        for x in rows if x["level"] == LEVELS[0]
    ]  # fmt: skip
    head = (
        "truth",
        "D / N",
        "of",
        "what the law misses",
        "held",
        "95% of the share",
        "width",
        "bias",
    )
    return markdown(head, lines, words=4) + "\n"


def measure(repetitions: int, resamples: int, seed: int, out: Path,
            truths: Sequence[str] = tuple(TRUTHS)) -> list[dict[str, Any]]:  # fmt: skip
    """Measures all truths table by table, and writes the record after each round of them."""
    begin = time.process_time()
    laws, missed = {}, {}
    for name in truths:
        laws[name], missed[name] = prepared(TRUTHS[name])
    trials: dict[str, list[dict[str, Any]]] = {name: [] for name in truths}
    rows: list[dict[str, Any]] = []
    for k in range(repetitions):
        methods = [method for method in METHODS if method != BY_CELL or k % EVERY == 0]
        for name in truths:
            table = draw_table(TRUTHS[name], resamples, np.random.default_rng([seed, k]),
                               rates_known=name == KNOWN)  # fmt: skip
            trials[name] += trial(TRUTHS[name], laws[name], table, seed + k, methods)
        rows = [row for name in truths for row in summary(name, trials[name])]
        write_json(out / "misfit.json", {
            "command": "python -m mmfree_jax.experiments.study.misfit_coverage --repetitions "
                       f"{k + 1} --resamples {resamples} --seed {seed} "
                       "--out experiments/results/coverage",
            "date": time.strftime("%Y-%m-%d"), "machine": cpu_name(), "repetitions": k + 1,
            "resamples": resamples, "seed": seed, "cpu_s": round(time.process_time() - begin),
            "versions": versions("mmfree-jax", "numpy", "scipy"),
            "truths": {name: {
                "about": TRUTHS[name].about,
                "missed_rms": round(float(np.sqrt((missed[name] ** 2).mean())), 5),
                "missed_most": round(float(np.abs(missed[name]).max()), 5),
            } for name in truths}, "rows": rows,
        })  # fmt: skip
        write_text(out / "misfit.md", table_of(rows))
    return rows


def main() -> None:
    """Measures, writes misfit.json and misfit.md, and prints the latter."""
    parser = argparse.ArgumentParser(description="Coverage of intervals under a wrong law.")
    parser.add_argument("--repetitions", type=int, default=100)
    parser.add_argument("--resamples", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("coverage"))
    given = parser.parse_args()
    print(table_of(measure(given.repetitions, given.resamples, given.seed, given.out)))


if __name__ == "__main__":
    main()
