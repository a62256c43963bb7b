"""Tables for people: task scores beside the paper's, and held-out loss by position."""

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from mmfree_jax.evaluate.needle import NeedleScore
from mmfree_jax.evaluate.perplexity import HeldOut, Interval
from mmfree_jax.evaluate.recall import MqarScore, RightShare
from mmfree_jax.evaluate.tasks import PAPER_TASKS
from mmfree_jax.readable import perplexity

# Zero-shot accuracy (%), arXiv 2406.02528, Table 1, in the order of `PAPER_TASKS` below. The
# average printed for the 370M MatMul-free model, 40.3, is not that of its six scores (39.97).
_ORDER = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande")
_SHORT = ("ARCe", "ARCc", "HS", "OQ", "PQ", "WG")
PAPER_TABLE = (
    ("Transformer++ 370M", (45.0, 24.0, 34.3, 29.2, 64.0, 49.9)),
    ("MatMul-free 370M", (42.6, 23.8, 32.8, 28.4, 63.0, 49.2)),
    ("Transformer++ 1.3B", (54.1, 27.1, 49.3, 32.4, 70.3, 54.9)),
    ("MatMul-free 1.3B", (54.0, 25.9, 44.9, 31.4, 68.4, 52.4)),
    ("Transformer++ 2.7B", (59.7, 27.4, 54.2, 34.4, 72.5, 56.2)),
    ("MatMul-free 2.7B", (58.5, 29.7, 52.3, 35.4, 71.1, 52.1)),
)


def scores_of(results: dict[str, Any], task: str, metric: str) -> tuple[float, float] | None:
    """A metric of a task and its standard error, in percent; None where it has none."""
    values = results["results"].get(task, {})
    if f"{metric},none" not in values:
        return None
    error = values.get(f"{metric}_stderr,none")
    error = float(error) if isinstance(error, (int, float)) else float("nan")
    return 100 * float(values[f"{metric},none"]), 100 * error


def task_table(results: dict[str, Any], name: str) -> Table:
    """The model's accuracies with standard errors, chance, and the paper's Table 1."""
    table = Table(title="zero-shot accuracy, %", title_justify="left")
    table.add_column("model", no_wrap=True)
    for short in (*_SHORT, "average"):
        table.add_column(short, justify="right", no_wrap=True)
    for metric in ("acc", "acc_norm"):
        found = [scores_of(results, task, metric) for task in _ORDER]
        if not any(found):
            continue
        cells = ["" if s is None else f"{s[0]:.1f}±{s[1]:.1f}" for s in found]
        means = [s[0] for s in found if s is not None]
        average = f"{sum(means) / len(means):.1f}" if len(means) == len(_ORDER) else ""
        table.add_row(f"{name} ({metric})", *cells, average)
    chances = [100 * PAPER_TASKS[task].chance for task in _ORDER]
    table.add_row("chance", *(f"{c:.1f}" for c in chances), f"{sum(chances) / len(chances):.1f}")
    table.add_section()
    for row, values in PAPER_TABLE:
        average = f"{sum(values) / len(values):.1f}"
        table.add_row(f"paper: {row}", *(f"{v:.1f}" for v in values), average)
    return table


def chance_lines(results: dict[str, Any]) -> list[str]:
    """One plain line about each of the paper's tasks: above, at or below chance."""
    lines = []
    for task in _ORDER:
        score = scores_of(results, task, "acc")
        if score is None:
            continue
        value, error = score
        chance = 100 * PAPER_TASKS[task].chance
        if not abs(value - chance) > 2 * error:
            verdict = "at chance (within two standard errors)"
        else:
            verdict = "above chance" if value > chance else "below chance"
        lines.append(f"{task}: acc {value:.2f} ± {error:.2f}, chance {chance:.0f}: {verdict}")
    return lines


def held_out_table(result: HeldOut) -> Table:
    """Loss, perplexity and bits per byte, whole and by position in the document."""
    title = "held-out loss; intervals: 95 %, bootstrap over documents"
    if result.context is not None:
        title += f"; memory cut to {result.context} tokens"
    table = Table(title=title, title_justify="left")
    table.add_column("position")
    for name in ("nats/token", "interval", "perplexity", "bits/byte", "tokens", "documents"):
        table.add_column(name, justify="right")

    def row(label: str, x: Interval) -> None:
        bits = result.bits_per_byte(x.mean)
        interval = "" if x.low is None or x.high is None else f"{x.low:.4f} - {x.high:.4f}"
        table.add_row(
            label,
            f"{x.mean:.4f}",
            interval,
            f"{perplexity(x.mean):.2f}",
            "" if bits is None else f"{bits:.4f}",
            f"{x.tokens:,}",
            f"{x.documents:,}",
        )

    row("all", result.loss)
    table.add_section()
    for first, end, interval in result.by_position:
        row(f"{first:,}+" if end is None else f"{first:,} - {end - 1:,}", interval)
    return table


def _percent(x: RightShare) -> tuple[str, str]:
    return f"{100 * x.share:.1f}", f"{100 * x.low:.1f} - {100 * x.high:.1f}"


def mqar_table(scores: Sequence[MqarScore]) -> Table:
    """Accuracy by length and number of pairs, beside what guessing gets."""
    table = Table(title="multi-query associative recall, %; intervals: 95 %", title_justify="left")
    for name in (
        "length", "pairs", "right", "interval", "nats/answer", "chance", "a value of the row",
        "answers", "rows",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for x in scores:
        pairs = x.task.pairs
        table.add_row(
            f"{x.length:,}", f"{pairs:,}", *_percent(x.accuracy), f"{x.nats:.4f}",
            f"{100 / x.task.vocab:.2g}", f"{100 / pairs:.3g}",
            f"{x.accuracy.asked:,}", f"{x.accuracy.rows:,}",
        )  # fmt: skip
    return table


def needle_table(scores: Sequence[NeedleScore], candidates: int) -> Table:
    """Answers chosen and written, by length and depth."""
    table = Table(
        title=f"needle in a haystack, %; intervals: 95 %; chance of chosen: {100 / candidates:.3g}",
        title_justify="left",
    )
    for name in (
        "length", "depth", "chosen", "interval", "written", "interval", "nats/answer", "trials",
    ):  # fmt: skip
        table.add_column(name, justify="right")
    for k, x in enumerate(scores):
        if k and x.length != scores[k - 1].length:
            table.add_section()
        depth = "no fact" if x.depth is None else f"{100 * x.depth:g} %"
        table.add_row(
            f"{x.length:,}", depth, *_percent(x.chosen), *_percent(x.written),
            f"{x.nats:.3f}", f"{x.chosen.asked:,}",
        )  # fmt: skip
    return table
