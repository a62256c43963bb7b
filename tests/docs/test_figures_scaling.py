"""Documented coverages of intervals are those of results/coverage."""

from mmfree_jax.experiments.study import gap_slope
from mmfree_jax.experiments.study.misfit_coverage import score_interval

RECORD = "coverage/coverage.json"
LABELS = {
    "profile": "profile of {}",
    "bootstrap": "bootstrap of {}",
    "crossing": "crossing of the two families",
    "gap": "gap, {}",
}
NAMES = {
    "a": "a in N* ~ C^a",
    "centre": "at its centre",
    "per_size": "a decade of size",
    "per_tokens": "a decade of tokens",
    "per_both": "a decade of both",
}


def test_coverage(records, compare, fixed):
    record = records[RECORD]
    rows = {}
    for row in record["rows"]:
        name = NAMES.get(row["quantity"], row["quantity"])
        label = LABELS[row["method"]].format(name)
        cell = f"{fixed(row['coverage'], 3)} ± {fixed(row['standard_error'], 3)}"
        rows.setdefault(label, []).append(cell)
    lines = [f"| {label} | {' | '.join(cells)} |" for label, cells in rows.items()]
    about = [f"* `{name}`: {text}." for name, text in record["designs"].items()]
    compare("docs/scaling.md", [f"`{record['command']}`", *about, *lines])


def test_coverage_is_what_is_claimed(records):
    """Two designs are within 92% and 98% everywhere, and no interval anywhere holds less often."""
    rows = records[RECORD]["rows"]
    assert {row["repetitions"] for row in rows} == {400}
    assert min(row["coverage"] for row in rows) >= 0.92
    greatest = {}
    for row in rows:
        greatest[row["design"]] = max(row["coverage"], greatest.get(row["design"], 0))
    assert greatest["isoflop-48"] <= 0.98
    assert greatest["grid-20"] <= 0.98


MISFIT = "coverage/misfit.json"
WRONG = ("product", "bend", "strong bend", "break", "floors")
COLUMNS = [(ratio, quantity) for ratio in (20, 80)
           for quantity in ("gap at the smallest", "gap at the largest", "slope")]  # fmt: skip


def chosen(rows, method, column, level=0.95, truths=None):
    return [r for r in rows if (r["method"], r["ratio"], r["quantity"], r["level"])
            == (method, *column, level) and (truths is None or r["truth"] in truths)]  # fmt: skip


def misfit_lines(record, fixed):
    """The tables of docs/scaling.md, out of the record."""
    rows, lines = record["rows"], []
    for name, truth in record["truths"].items():
        cells = []
        for column in COLUMNS:
            ((without,), (with_it,)) = (chosen(rows, m, column, truths=[name])
                                        for m in ("left out", "in"))  # fmt: skip
            ends = (fixed(with_it[key], 2) for key in ("coverage_low", "coverage_high"))
            cells.append(f"{without['holds']}, {with_it['holds']} ({' to '.join(ends)})")
        missed = f"{fixed(100 * truth['missed_rms'], 2)}, {fixed(100 * truth['missed_most'], 2)}"
        lines.append(f"| {name} | {missed} | {' | '.join(cells)} |")
    for name in record["truths"]:
        cells = []
        for column in ((20, "slope"), (80, "slope")):
            for method in ("left out", "in", "no law"):
                (row,) = chosen(rows, method, column, truths=[name])
                cells.append(f"{fixed(row['median_width'], 4)}, {fixed(row['bias'], 4)}")
        lines.append(f"| {name} | {' | '.join(cells)} |")
    for level in (0.95, 0.9):
        for method in ("left out", "in", "by cell", "no law"):
            cells = []
            for column in [*COLUMNS, (20, "gap at 1e20")]:
                found = chosen(rows, method, column, level, WRONG)
                holds, of = (sum(r[key] for r in found) for key in ("holds", "of"))
                cells.append(f"{fixed(holds / of, 2)} of {of}" if of else "-")
            lines.append(f"| {method}, {level:.0%} | {' | '.join(cells)} |")
    return lines


def test_coverage_under_a_wrong_law(records, compare, fixed):
    record = records[MISFIT]
    about = [f"* `{name}`: {truth['about']}." for name, truth in record["truths"].items()]
    compare("docs/scaling.md", [f"`{record['command']}`", *about, *misfit_lines(record, fixed)])


def test_the_coverage_beside_the_studys_intervals_is_measured(records):
    rows = records[MISFIT]["rows"]
    for column in COLUMNS:
        shares = [row["coverage"] for row in chosen(rows, "in", column)]
        assert gap_slope.HELD[column] == (round(min(shares), 2), round(max(shares), 2)), column
    for row in rows:
        ends = [row["coverage_low"], row["coverage_high"]]
        assert [round(end, 4) for end in score_interval(row["holds"], row["of"])] == ends
