"""Documented coverages of intervals are those of results/coverage."""

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
