"""What a sweep found: one row a run that counts, the rates and how they were chosen, in text."""

import collections
import dataclasses
import math
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.experiments.scaling.output_files import write_csv
from mmfree_jax.experiments.sweep.axes import Setting
from mmfree_jax.experiments.sweep.cost import Estimate
from mmfree_jax.experiments.sweep.plan import parameters
from mmfree_jax.experiments.sweep.planned_run import PlannedRun, format_tokens
from mmfree_jax.experiments.sweep.rate_fit import fit_rules, rules_text, write_rules
from mmfree_jax.experiments.sweep.rate_rule import RULE
from mmfree_jax.experiments.sweep.rates import Choice, best_rate, best_setting
from mmfree_jax.experiments.sweep.state import Snapshot
from mmfree_jax.experiments.sweep.table import RESULTS, Row
from mmfree_jax.files import check_file, write_bytes
from mmfree_jax.readable import format_seconds

BEST, RATES, FIGURE = "best.csv", "rates.csv", "report"


def table(rows: Sequence[Sequence[Any]], header: Sequence[str]) -> str:
    """Columns of text, numbers to the right."""
    cells = [list(header), *([str(c) for c in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        parts = [c.ljust(w) if i < 2 else c.rjust(w)
                 for i, (c, w) in enumerate(zip(row, widths, strict=True))]  # fmt: skip
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def plan_text(runs: Sequence[PlannedRun], data_tokens: dict | None) -> str:
    """The plan, a line a cell: what is run and what it costs, of branches without their trunks.

    Args:
      runs: those to list.
      data_tokens: data paths -> training tokens, for the number of passes; None: not known.
    """
    cells: dict[tuple, list[PlannedRun]] = {}
    ordered = sorted(runs, key=lambda r: (r.stage != "tuning", r.family, r.flops / r.tokens,
                                          r.stage != "trunk", r.tokens))  # fmt: skip
    for run in ordered:
        what = run.stage if run.trunk is None else "branch"
        cells.setdefault((what, run.family, run.size, run.tokens), []).append(run)
    rows = []
    for (stage, family, size, tokens), members in cells.items():
        first = members[0]
        rates = sorted({r.learning_rate for r in members if r.rate_known})
        passes = ""
        if data_tokens is not None:
            passes = f"{tokens / data_tokens[first.config.data.paths]:.2f}"
        rows.append([
            family, size, stage, f"{parameters(first.config, 'non-embedding') / 1e6:.2f}M",
            format_tokens(tokens), passes,
            ", ".join(map(str, sorted({r.config.steps for r in members}))),
            ", ".join(f"{r:.3g}" for r in rates) or "tuned",
            ", ".join(str(s) for s in sorted({r.seed for r in members})),
            str(len(members)), f"{sum(r.own_flops for r in members):.3g}",
        ])  # fmt: skip
    header = ("family", "size", "stage", "N", "tokens", "passes", "steps", "rates", "seeds",
              "runs", "FLOPs")  # fmt: skip
    return table(rows, header)


def cost_text(whole: Estimate, left: Estimate | None, label: str = "all") -> str:
    """FLOPs and time, and what they rest on.

    Args:
      whole: all runs.
      left: those to be run now; None where they are all.
      label: what `whole` is.
    """
    lines = [f"{label}: {whole.runs} runs, {whole.flops:.3g} FLOPs, about "
             f"{format_seconds(whole.seconds)}"]  # fmt: skip
    if left is not None:
        lines.append(f"left: {left.runs} runs, {left.flops:.3g} FLOPs, about "
                     f"{format_seconds(left.seconds)}")  # fmt: skip
    lines.append(f"time from {(left or whole).basis}")
    return "\n".join(lines)


def status_text(found: Snapshot) -> str:
    """How many runs are where, and every failure with its reason."""
    states = {run.name: found.status(run) for run in found.runs}
    counts = collections.Counter(states.values())
    spent = sum(run.own_flops for run in found.runs if states[run.name] == "done")
    total = sum(run.own_flops for run in found.runs if states[run.name] != "dropped")
    lines = [", ".join(f"{n} {state}" for state, n in counts.most_common())
             + f"; {spent:.3g} of {total:.3g} FLOPs done"]  # fmt: skip
    for name, state in states.items():
        if state in ("running", "cut off"):
            lines.append(f"  {state:<8} {name}")
    for name, failure in found.failures.items():
        if states.get(name) == "failed":
            lines.append(f"  failed   {name}: {failure.get('reason')} ({failure.get('log')})")
    if counts["failed"]:
        lines.append("--retry-failed tries them again")
    waiting = sum(not run.rate_known for run in found.runs)
    if waiting:
        lines.append(f"{waiting} runs wait for the tuning runs that choose their learning rate")
    if branches := counts["waiting"] - waiting:
        lines.append(f"{branches} branches wait for their trunks")
    return "\n".join(lines)


def best_rows(found: Snapshot) -> list[Row]:
    """The rows to fit laws to: one for each (family, size, tokens, seed).

    With a tuning stage, the main runs at the tuned rate; without one, in each cell the rate (and
    the setting of other axes) that is best on the first seed, at every seed, so that no seed
    chooses for itself.
    """
    ended = [run for run in found.main if run.name in found.rows]
    if not found.sweep.tuning.is_on:
        best = {key: (choice.setting, choice.rate) for key, choice in _best_of_cells(found).items()}
        ended = [run for run in ended if best.get(run.cell) == (run.setting, run.learning_rate)]
    return [found.rows[run.name] for run in ended]


def grid_choices(found: Snapshot) -> list[Choice]:
    """Of a sweep without tuning stage: the best rate of each cell, by the same rule."""
    return list(_best_of_cells(found).values())


def _best_of_cells(found: Snapshot) -> dict[tuple, Choice]:
    cells: dict[tuple, dict[Setting, dict[float, float]]] = {}
    size_of: dict[tuple, float] = {}
    for run in found.main:
        loss = found.loss(run)
        if run.seed == found.sweep.seeds[0] and loss is not None:
            cells.setdefault(run.cell, {}).setdefault(run.setting, {})[run.learning_rate] = loss
            size_of[run.cell] = parameters(run.config, "non-embedding")
    chosen = {}
    for cell, tried in cells.items():
        _, family, size, tokens = cell
        setting = best_setting(tried)
        losses = tried[setting]
        if any(map(math.isfinite, losses.values())):
            rate, loss, at_edge = best_rate(losses, "grid")
            where = f"{size} at {format_tokens(tokens)}"
            every = tuple(sorted(losses.items()))
            chosen[cell] = Choice(
                family, where, size_of[cell], rate, loss, at_edge, every, setting, tokens
            )
    return chosen


def rates_text(found: Snapshot, choices: Iterable[Choice]) -> str:
    """The learning rates, and the losses behind them."""
    rows = []
    for c in sorted(choices, key=lambda c: (c.family, c.params, c.size)):
        tried = ", ".join(f"{r:.3g}: {_loss_text(c, r, loss)}" for r, loss in c.tried)
        note = "from the other sizes" if c.is_transferred else tried
        rows.append([c.family, c.size, f"{c.rate:.3g}", " ".join(c.setting.parts),
                     "edge" if c.at_edge else "", note])  # fmt: skip
    rule = found.sweep.tuning.rule if found.sweep.tuning.is_on else "grid"
    return (
        f"learning rates (rule {rule}: lowest held-out loss among the rates tried, seed "
        f"{found.sweep.seeds[0]}; edge: the best may lie beyond the rates tried)\n"
        + table(rows, ("family", "size", "rate", "", "", "loss by rate"))
    )


def _loss_text(choice: Choice, rate: float, loss: float) -> str:
    if math.isfinite(loss):
        return f"{loss:.4f}"
    return "ended early" if rate in choice.dropped else "diverged"


def losses_text(rows: Sequence[Row]) -> str:
    """Held-out loss by family, size and tokens; the half-range of the seeds where there are two."""
    cells: dict[tuple[str, float, str, int], list[Row]] = {}
    for row in rows:
        key = (row["family"], float(row["params_non_embedding"]), row["size"], int(row["tokens"]))
        cells.setdefault(key, []).append(row)
    lines = []
    for (family, params, size, tokens), members in sorted(cells.items()):
        losses = [float(r["loss"]) for r in members]
        spread = ""
        if len(losses) > 1:
            spread = f"± {(max(losses) - min(losses)) / 2:.4f}"
        lines.append([family, size, f"{params / 1e6:.2f}M", format_tokens(tokens),
                      f"{float(members[0]['flops']):.3g}",
                      ", ".join(sorted({f"{float(r['learning_rate']):.3g}" for r in members})),
                      str(len(losses)), f"{statistics.mean(losses):.4f}", spread])  # fmt: skip
    header = ("family", "size", "N", "tokens", "FLOPs", "rate", "seeds", "loss", "half range")
    return table(lines, header)


def write_report(found: Snapshot, *, plot: bool = True) -> tuple[str, list[Path]]:
    """Writes best.csv, rates.csv and rate_rule.json beside the table; returns text and paths.

    With `plot` report.png as well, and in report.plot.csv the numbers that it shows.

    Raises:
      ScalingError: they cannot be written.
    """
    out = Path(found.sweep.out)
    rows = best_rows(found)
    choices = list(found.choices.values()) if found.sweep.tuning.is_on else grid_choices(found)
    parts, paths = [status_text(found)], []
    if choices:
        write_csv(out / RATES, [
            {"family": c.family, "size": c.size, "params_non_embedding": int(c.params),
             "tokens": c.tokens, "learning_rate": c.rate, "loss": c.loss, "at_edge": c.at_edge,
             "transferred": c.is_transferred, "tried": len(c.tried),
             **dataclasses.asdict(c.setting)} for c in choices
        ])  # fmt: skip
        parts.append(rates_text(found, choices))
        paths.append(out / RATES)
        rules = fit_rules(choices)
        parts.append(rules_text(rules))
        if any(rule.law is not None for rule in rules):
            write_rules(out / RULE, rules)
            paths.append(out / RULE)
    if rows:
        write_csv(out / BEST, list(rows))
        parts.append("held-out loss (nats a token)\n" + losses_text(rows))
        if branched := [row for row in rows if row["trunk"]]:
            trunks = len({row["trunk"] for row in branched})
            parts.append(
                f"{len(branched)} of these {len(rows)} runs are decays branched from {trunks} "
                "trunks; those of one trunk share its seed, data and noise"
            )
        paths.append(out / BEST)
    else:
        parts.append(f"no run to compare yet in {out / RESULTS}")
    if plot and (rows or choices):
        paths += _write_figure(out, rows, choices, [f.label for f in found.sweep.families])
    return "\n\n".join(parts), paths


def _write_figure(
    out: Path, rows: Sequence[Row], choices: Sequence[Choice], families: Sequence[str]
) -> list[Path]:
    from mmfree_jax.experiments.scaling.plots import png  # Matplotlib, which the text does without
    from mmfree_jax.experiments.sweep.figure import plot_report

    paths = [out / f"{FIGURE}.png", out / f"{FIGURE}.plot.csv"]
    check_file(paths[1], "series,", beside=paths[:1])
    figure, numbers = plot_report(rows, choices, families)
    write_bytes(paths[0], png(figure))
    write_csv(paths[1], numbers)
    return paths
