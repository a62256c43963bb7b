"""How often the intervals of the scaling-law library hold a known truth.

Runs are drawn again and again from a known law with known noise (`coverage_designs`) and go
through the library as a user's would, but for one thing: a fit begins at the truth instead of at
thousands of points, which find the same optimum.
"""

import dataclasses
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.cli.parse import Names
from mmfree_jax.experiments.bench.coverage_designs import (
    DESIGNS,
    LAW,
    OTHER,
    PLANE,
    TRUTH,
    Design,
)
from mmfree_jax.experiments.bench.records import Row, Study, cpu_name, markdown, one_of
from mmfree_jax.experiments.scaling.compute_optimal import curve, optimal_allocation
from mmfree_jax.experiments.scaling.fit import Fit, fit_law
from mmfree_jax.experiments.scaling.frame import RunFrame
from mmfree_jax.experiments.scaling.gap import trend
from mmfree_jax.experiments.scaling.isoflop import parametric
from mmfree_jax.experiments.scaling.law_crossing import compare
from mmfree_jax.experiments.scaling.lead import crossings, leaders
from mmfree_jax.experiments.scaling.uncertainty import Interval
from mmfree_jax.files import write_bytes
from mmfree_jax.installed import versions
from mmfree_jax.ranges import Count, CountOrZero

METHODS = ("profile", "bootstrap", "crossing", "gap")
LEVEL = 0.95
_GRID = np.arange(16.0, 26.0, 0.02)  # log10 FLOPs in which crossings are looked for


@dataclasses.dataclass(frozen=True)
class Plan:
    """Measure how often 95% intervals of scaling laws hold a known truth."""

    out: Path
    """Folder that receives coverage.json, .md and .png."""
    designs: Names = tuple(DESIGNS)
    """Which runs, separated by commas."""
    methods: Names = METHODS
    """Whose intervals, separated by commas."""
    repetitions: Count = 400
    """Data sets drawn of each design."""
    resamples: Count = 400
    """Bootstrap refits of each fit."""
    seed: CountOrZero = 0
    """Of the data sets and resamples."""


@dataclasses.dataclass(frozen=True)
class Trial:
    """One interval of one repetition; None: there was none."""

    method: str
    quantity: str
    truth: float
    interval: Interval | None


def trials(plan: Plan, design: Design, repetition: int) -> Iterator[Trial]:
    """All intervals of one data set."""
    place = list(DESIGNS).index(design.name)
    rng = np.random.default_rng([plan.seed, place, repetition])
    one, other = (design.runs(truth, rng) for truth in (TRUTH, OTHER))
    pairs = design.pairs(rng)
    seed = int(rng.integers(2**31))
    refits = bool({"bootstrap", "crossing"} & set(plan.methods))
    if {"profile", "bootstrap", "crossing"} & set(plan.methods):
        fit = _fit(one, TRUTH, design, plan, seed, refits=refits)
        for name, truth in zip(LAW.parameters, TRUTH.tolist(), strict=True):
            if "profile" in plan.methods:
                profile = fit.profiles.get(name)
                yield Trial("profile", name, truth, profile and profile.interval)
            if "bootstrap" in plan.methods:
                yield Trial("bootstrap", name, truth, fit.intervals.get(name))
        if "bootstrap" in plan.methods:
            exponent = float(optimal_allocation(TRUTH)[1])
            yield Trial("bootstrap", "a", exponent, parametric(fit).intervals.get("a"))
        if "crossing" in plan.methods:
            second = _fit(other, OTHER, design, plan, seed + 1, refits=True, profile=False)
            found = compare((fit, second), ("first", "second"), _GRID, LEVEL)
            yield Trial("crossing", "log10 C", true_crossing(), found.interval)
    if "gap" in plan.methods:
        found = trend(pairs, level=LEVEL)
        for name, truth in zip(("centre", "per_size", "per_tokens"), PLANE.tolist(), strict=True):
            yield Trial("gap", name, truth, found.intervals[name])
        yield Trial("gap", "per_both", float(PLANE[1:].sum()), found.intervals["per_both"])


def _fit(
    frame: RunFrame,
    truth: np.ndarray,
    design: Design,
    plan: Plan,
    seed: int,
    *,
    refits: bool,
    profile: bool = True,
) -> Fit:
    law = dataclasses.replace(LAW, starts=lambda model, x, y: model.from_parameters(truth)[None])
    return fit_law(
        frame, law, design.objective, size="total", flops="6nd", level=LEVEL, holdout=False,
        resamples=plan.resamples if refits else 0, restarts=0, seed=seed,
        profile=profile and "profile" in plan.methods,
    )  # fmt: skip


def true_crossing() -> float:
    """Where the two families' compute-optimal curves cross (log10 FLOPs)."""
    one, other = (curve(LAW, truth, _GRID)[0] for truth in (TRUTH, OTHER))
    found = crossings(
        lambda x: (curve(LAW, TRUTH, x) - curve(LAW, OTHER, x))[0], leaders(one, other), _GRID
    )
    ((place, _),) = found
    return place


def measure(plan: Plan) -> Iterator[Row]:
    """A row for each quantity of each design.

    Raises:
      ConfigError: a design or a method is unknown.
    """
    one_of(plan, DESIGNS, "designs")
    one_of(plan, METHODS, "methods")
    for name in plan.designs:
        start = time.process_time()
        kept: dict[tuple[str, str], list[Trial]] = {}
        for repetition in range(plan.repetitions):
            for trial in trials(plan, DESIGNS[name], repetition):
                kept.setdefault((trial.method, trial.quantity), []).append(trial)
        seconds = round(time.process_time() - start, 1)
        for key in sorted(kept, key=lambda key: METHODS.index(key[0])):
            yield {"design": name} | _row(kept[key]) | {"design_cpu_s": seconds}


def _row(found: Sequence[Trial]) -> Row:
    """What became of one quantity's intervals. An open end holds everything on its side."""
    count = len(found)
    ends = np.array([
        [np.nan if t.interval is None else sign * np.inf if t.interval[side] is None
         else t.interval[side] for side, sign in enumerate((-1, 1))] for t in found
    ], dtype=float)  # fmt: skip
    truth = np.array([t.truth for t in found])
    none = int(np.isnan(ends).any(1).sum())
    below, above = int((truth < ends[:, 0]).sum()), int((truth > ends[:, 1]).sum())
    share = 1 - (below + above + none) / count
    return {
        "method": found[0].method,
        "quantity": found[0].quantity,
        "truth": found[0].truth,
        "repetitions": count,
        "coverage": round(share, 4),
        "standard_error": round(float(np.sqrt(share * (1 - share) / count)), 4),
        "truth_below": below,
        "truth_above": above,
        "no_interval": none,
        "open_ended": int(np.isinf(ends).any(1).sum()),
    }


def describe(row: Row) -> str:
    """A line for a row."""
    return (
        f"{row['design']}, {row['method']} of {row['quantity']}: {row['coverage']:.3f} "
        f"+- {row['standard_error']:.3f} of {row['repetitions']}"
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown: a line for a quantity, a column for a design."""
    designs = list(dict.fromkeys(row["design"] for row in rows))
    cells: dict[tuple[str, str], dict[str, str]] = {}
    for row in rows:
        own = cells.setdefault((row["method"], row["quantity"]), {})
        own[row["design"]] = f"{row['coverage']:.3f} ± {row['standard_error']:.3f}"
    lines = [(*key, *(found.get(d, "") for d in designs)) for key, found in cells.items()]
    return markdown(("interval", "of", *designs), lines, words=2) + "\n"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """Coverage of every quantity with two standard errors, a panel for a design."""
    from matplotlib.figure import Figure

    from mmfree_jax.experiments.scaling.plots import png

    rows = record["rows"]
    designs = list(dict.fromkeys(row["design"] for row in rows))
    figure = Figure(figsize=(3.6 * len(designs), 4.6), layout="constrained")
    panels = figure.subplots(1, len(designs), sharex=True, squeeze=False)[0]
    for panel, name in zip(panels, designs, strict=True):
        own = [row for row in rows if row["design"] == name]
        panel.axvspan(0.92, 0.98, color="0.9", lw=0)
        panel.axvline(LEVEL, color="0.5", lw=1)
        panel.errorbar(
            [row["coverage"] for row in own], range(len(own)),
            xerr=[2 * row["standard_error"] for row in own], fmt="o", ms=4, lw=1,
        )  # fmt: skip
        panel.set_yticks(range(len(own)), [f"{r['method']}: {r['quantity']}" for r in own])
        panel.invert_yaxis()
        panel.set_title(name)
        panel.set_xlabel("share of intervals that hold the truth")
    write_bytes(path, png(figure))


STUDY = Study("coverage", describe, table, draw)


def run(plan: Plan, about: Mapping[str, Any]) -> Sequence[Row]:
    """Measures a plan and keeps it in its folder.

    Args:
      plan: what to measure.
      about: what the record begins with (command, date).
    """
    rows = STUDY.collect(
        {
            **about,
            "level": LEVEL,
            "seed": plan.seed,
            "resamples": plan.resamples,
            "designs": {name: DESIGNS[name].about for name in plan.designs if name in DESIGNS},
            "versions": versions("mmfree-jax", "numpy", "scipy"),
            "machine": {"cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform()},
        },
        measure(plan),
        plan.out,
    )
    STUDY.conclude(rows, plan.out)
    return rows
