"""The study's primary estimand from whatever runs there are: the slope of the gap a decade.

`python -m mmfree_jax.experiments.study.gap_slope --tables sweeps/study2/results.csv --documents
sweeps/study2/documents.npz --out gap.json` fits both families together, draws held-out documents,
the noise of training and the rule of the rate anew in each resample, and prints the gap at equal
exact FLOPs along each ratio of tokens to parameters, its slope, and P(the first leads).
"""

import argparse
import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.misfit import LENGTHS
from mmfree_jax.experiments.scaling.output_files import write_json
from mmfree_jax.experiments.scaling.ratio_path import PathGap, measured_slope, path_gap
from mmfree_jax.experiments.scaling.training_cost import training_cost
from mmfree_jax.experiments.scaling.uncertainty import corrected_quantiles
from mmfree_jax.experiments.study.documents import merged, read_losses
from mmfree_jax.experiments.study.rate_excess import draw_rule
from mmfree_jax.experiments.study.refits import fit_mean, refit_draws
from mmfree_jax.experiments.study.runs import (
    REPEATS_WORTH,
    Runs,
    frame_of,
    gather,
    losses_of,
    tried_rates,
)
from mmfree_jax.experiments.study.trunk_noise import trunk_noise
from mmfree_jax.experiments.sweep.table import read_results

ON_PATH = 0.05
"""A run is on a path whose ratio its own is within this share of."""

HELD = {
    (20, "gap at the smallest"): (0.85, 0.92),
    (20, "gap at the largest"): (0.57, 0.95),
    (20, "slope"): (0.74, 0.97),
    (80, "gap at the smallest"): (0.82, 0.89),
    (80, "gap at the largest"): (0.8, 0.86),
    (80, "slope"): (0.88, 0.96),
}
"""Least and greatest share of 95% intervals that held the truth, over the truths of
experiments/results/coverage/misfit.json."""


@dataclass(frozen=True)
class OnPath:
    """The sizes of a family on one ratio, mean over seeds: log10 FLOPs [k], losses [k], [B, k]."""

    log10_c: np.ndarray
    fitted: np.ndarray
    draws: np.ndarray


def on_path(runs: Runs, ratio: float) -> OnPath:
    """A family's sizes at a ratio of tokens to parameters."""
    ratios = runs.column("tokens") / runs.column("params_non_embedding")
    near = np.flatnonzero(np.abs(ratios / ratio - 1) < ON_PATH)
    sizes = dict.fromkeys(runs.rows[i]["size"] for i in near)
    groups = [[i for i in near if runs.rows[i]["size"] == size] for size in sizes]
    flops = np.log10(runs.column("flops"))
    return OnPath(
        np.array([flops[group].mean() for group in groups]),
        np.array([runs.fitted[group].mean() for group in groups]),
        np.stack([runs.draws[:, group].mean(1) for group in groups], axis=1)
        if groups else np.zeros((len(runs.draws), 0)),
    )  # fmt: skip


def measured(pair: Sequence[OnPath], level: float) -> dict[str, Any] | None:
    """The slope without a law, where both families have two sizes on the path."""
    a, b = pair
    try:
        (slope,) = measured_slope((a.log10_c, b.log10_c), (a.fitted[None], b.fitted[None]))
        drawn = measured_slope((a.log10_c, b.log10_c), (a.draws, b.draws))
    except ScalingError:
        return None
    interval = corrected_quantiles(slope, drawn, level)[:, 0]
    return {"slope": float(slope), "interval": interval.tolist(), "sizes": len(a.log10_c)}


def path_ends(pair: Sequence[OnPath]) -> tuple[float, float] | None:
    """log10 FLOPs of the smallest and the largest size that both families have on a path."""
    computes = [family.log10_c for family in pair]
    if min(map(len, computes)) < 2:
        return None
    return float(max(c.min() for c in computes)), float(min(c.max() for c in computes))


def held(ratio: float, quantity: str) -> str:
    """What synthetic tables say of an interval; "" where they were not asked."""
    found = HELD.get((int(ratio), quantity)) if ratio % 1 == 0 else None
    return f" (held in {found[0]:.0%} to {found[1]:.0%})" if found else ""


def text_of(
    gap: PathGap,
    without_law: dict[str, Any] | None,
    names: tuple[str, str],
    tell: Callable[[float, str], str] = held,
) -> str:
    """One path in words, with what `tell` says of each interval."""
    low, high = gap.slope_interval
    verdict = "narrows" if high < 0 else "widens" if low > 0 else "has no trend that was found"
    lines = [f"D / N = {gap.ratio:g}: loss of {names[0]} less that of {names[1]}"]
    sizes = ("gap at the smallest", "gap at the largest")
    for at, value, ends, size in zip(gap.ends, gap.gap, gap.gap_intervals, sizes, strict=True):
        lines.append(f"  at 10^{at:.2f} FLOPs {value:+.4f} [{ends[0]:+.4f}, {ends[1]:+.4f}] nats"
                     + tell(gap.ratio, size))  # fmt: skip
    lines.append(f"  slope {gap.slope:+.4f} [{low:+.4f}, {high:+.4f}] nats a decade"
                 f"{tell(gap.ratio, 'slope')}: it {verdict}")  # fmt: skip
    if without_law:
        a, b = without_law["interval"]
        lines.append(f"  without a law {without_law['slope']:+.4f} [{a:+.4f}, {b:+.4f}] "
                     f"({without_law['sizes']} sizes)")  # fmt: skip
    shown = [(c, p) for c, p in zip(gap.lead.log10_c, gap.lead.first, strict=True) if c % 1 < 1e-9]
    lines.append(f"  P({names[0]} leads) at 10^C: "
                 + ", ".join(f"{c:.0f}: {p:.2f}" for c, p in shown))  # fmt: skip
    return "\n".join(lines)


def analyse(given: argparse.Namespace) -> dict[str, Any]:
    """All that is printed and written."""
    names = (given.families[0], given.families[1])
    rows = list({r["run"]: r for path in given.tables for r in read_results(path.parent)}.values())
    tuning = [r for path in given.rates for r in read_results(path.parent)]
    documents = None
    for path in given.documents:
        found = read_losses(path)
        documents = found if documents is None else merged(documents, found)
    if documents is not None:
        documents = documents.of_sources(given.without)
    count, seed = given.resamples, given.seed
    families, notes = {}, []
    noise = trunk_noise([r for r in rows if r["family"] in names])
    notes.append(noise.text())
    for name in names:
        own = [r for r in rows if r["family"] == name]
        base = given.rates_of.get(name, name)
        rule = None
        tried = [r for r in tuning if r["family"] == base]
        try:
            rule = draw_rule(tried_rates(tried, losses_of(tried, documents, count, seed)),
                             np.random.default_rng(seed + 1))  # fmt: skip
        except ScalingError as e:
            notes.append(f"{name}: the choice of rate is not in the intervals ({e})")
        if not own:
            raise ScalingError(f"families: no run of {name!r} is in the tables")
        families[name] = gather(own, documents, rule, noise, count, seed)
    if documents is None:
        notes.append(
            "held-out documents are not in the intervals: give the files of their losses too"
        )
    fit = fit_mean(families, given.share, given.unique_tokens, given.worth, given.restarts)
    refits = refit_draws(fit, families, noise, seed, () if given.no_misfit else LENGTHS)
    notes.append("what the law misses is not in the intervals" if refits.misfit is None
                 else refits.misfit.text())  # fmt: skip
    costs = {
        name: training_cost(frame_of(runs, runs.fitted, None, given.worth), "non-embedding",
                            "exact")
        for name, runs in families.items()
    }  # fmt: skip
    paths, texts = [], []
    # Measured with the misfit in, at 95% and with one floor.
    known = refits.misfit is not None and given.level == 0.95 and list(given.share) == ["E"]
    tell = held if known else lambda ratio, quantity: ""
    if known:
        notes.append("(held in ...): the share of such intervals that held the truth in synthetic "
                     "tables, least and greatest over seven truths (docs/scaling.md)")  # fmt: skip
    for ratio in given.ratios:
        path = [on_path(runs, ratio) for runs in families.values()]
        ends = path_ends(path)
        if ends is None:
            notes.append(f"D / N = {ratio:g}: fewer than two sizes of both families")
            continue
        grid = np.arange(np.floor(ends[0]), given.horizon + 0.05, 0.1).round(1)
        gap = path_gap(fit, refits.draws, costs, names, ratio, ends, list(grid), given.level,
                       refits.beside)  # fmt: skip
        plain = measured(path, given.level)
        texts.append(text_of(gap, plain, names, tell))
        paths.append({**dataclasses.asdict(gap), "without_law": plain})
    parameters = {name: dict(zip(fit.sharing.law.parameters, fit.fits[name].vector().tolist(),
                                 strict=True)) for name in names}  # fmt: skip
    return {
        "families": names, "runs": {n: len(r.rows) for n, r in families.items()},
        "share": list(given.share), "parameters": parameters, "paths": paths, "notes": notes,
        "text": "\n".join([*texts, *(f"note: {n}" for n in notes)]),
    }  # fmt: skip


def parser() -> argparse.ArgumentParser:
    """The arguments."""
    out = argparse.ArgumentParser(description="The gap of two families along tokens a parameter.")
    out.add_argument("--tables", type=Path, nargs="+", required=True, help="results.csv of sweeps")
    out.add_argument("--rates", type=Path, nargs="*", default=[], help="tables of tuned rates")
    out.add_argument("--documents", type=Path, nargs="*", default=[], help="documents.npz of them")
    out.add_argument("--families", nargs=2, default=["matmulfree", "transformer"])
    out.add_argument("--rates-of", type=json.loads, default={"float-head": "matmulfree"},
                     help="family -> family whose rule its rates follow")  # fmt: skip
    out.add_argument("--without", nargs="*", default=[], help="sources that are left out")
    out.add_argument("--ratios", type=float, nargs="+", default=[20, 80], help="D / N")
    out.add_argument("--share", nargs="+", default=["E"], help="parameters that are one for both")
    out.add_argument("--unique-tokens", type=float, help="of the training data")
    out.add_argument("--worth", type=float, default=REPEATS_WORTH, help="R_D of repeated tokens")
    out.add_argument("--no-misfit", action="store_true",
                     help="leave what the law misses out of the intervals")  # fmt: skip
    out.add_argument("--resamples", type=int, default=2000)
    out.add_argument("--restarts", type=int, default=128)
    out.add_argument("--horizon", type=float, default=24.0, help="log10 FLOPs of the last P")
    out.add_argument("--level", type=float, default=0.95)
    out.add_argument("--seed", type=int, default=0)
    out.add_argument("--out", type=Path, default=Path("gap.json"))
    return out


def main() -> None:
    """Prints the text and writes the JSON."""
    given = parser().parse_args()
    found = analyse(given)
    write_json(given.out, found)
    print(found["text"])


if __name__ == "__main__":
    main()
