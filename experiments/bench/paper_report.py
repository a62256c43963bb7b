"""Tables and figure of the paper's cases, its own values beside those measured here."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mmfree_jax.experiments.bench.paper_peers import PEERS
from mmfree_jax.experiments.bench.paper_values import (
    NOTES,
    PARTS,
    PUBLISHED,
    Published,
    published,
)
from mmfree_jax.experiments.bench.records import Row, by_size, markdown
from mmfree_jax.files import open_atomically

FORMS = {
    "fused": "MatMul-free, fused",
    "plain": "MatMul-free, plain",
    "transformer": "Transformer++",
    "packed": "MatMul-free (here packed, 2 bits)",
    "transformer-bf16": "Transformer++ (here bf16)",
    **PEERS,
}
WORKS = {"train": "step", "prefill": "read", "decode": "generate"}


def at(row: Row) -> int:
    """Rows of a training step, else the tokens that are read or generated behind."""
    return row["batch"] if row["work"] == "train" else row.get("tokens", row.get("context", 0))


def milliseconds(row: Row) -> float:
    """Of a step, a prompt or a generated token."""
    return (row["ms_per_token"] if row["work"] == "decode" else row["ms"])["median"]


def rate(row: Row) -> float:
    """Tokens a second."""
    if "tokens_per_s" in row:
        return row["tokens_per_s"]
    return 1e3 * row["batch"] * row["tokens"] / milliseconds(row)


def energy(row: Row) -> float | None:
    """Millijoules a token; None where it was not measured."""
    found = row.get("energy")
    return found["mj_per_token"] if isinstance(found, dict) else None


def describe(row: Row) -> str:
    """One line for a row."""
    name = f"{row['part']}: {WORKS[row['work']]} {row['size']} {row['form']} at {at(row)}"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    text = f"{name}: {milliseconds(row):,.3f} ms, {rate(row):,.0f} tokens/s"
    if "peak_gb" in row:
        text += f", peak {row['peak_gb']:.2f} GB"
    if "energy" in row:
        found = energy(row)
        text += f", {row['energy'] if found is None else f'{found:,.1f} mJ a token'}"
    return text


def table(rows: Sequence[Row]) -> str:
    """A Markdown table for each part that was measured, and what to know beside it."""
    lines = []
    for part, title in PARTS.items():
        own = [row for row in rows if row["part"] == part]
        if own:
            lines += [f"## {title}", "", _table(part, own), "", NOTES[part], ""]
            lines += [f"Energy: {reason}." for reason in _no_energy(own)]
    if rows and not any(row["form"] in PEERS for row in rows):
        lines += ["The authors' package and HF Llama were not run.", ""]
    return "\n".join(lines)


def _no_energy(rows: Sequence[Row]) -> list[str]:
    """Why fields of energy are empty."""
    return sorted({row["energy"] for row in rows if isinstance(row.get("energy"), str)})


def _table(part: str, rows: Sequence[Row]) -> str:
    header = ("size", "form", "work", "rows" if part == "training" else "tokens", "ms", "tokens/s",
              "peak, GB", "mJ a token", "the paper", "its card", "where")  # fmt: skip
    order = list(FORMS)

    def place(row: Row) -> tuple[Any, ...]:
        return by_size(row["size"]), row["work"], at(row), order.index(row["form"])

    cells = []
    shown = set()
    for row in sorted(rows, key=place):
        value = published(part, row["work"], row["size"], row["form"], at(row))
        shown.add(value)
        cells.append([*_where(row), *_measured(row), *_published(value)])
    for value in PUBLISHED:
        if value.part == part and value not in shown:
            about = (value.size or "not said", FORMS[value.form], WORKS[value.work], str(value.at))
            cells.append([*about, "", "", "", "", *_published(value)])
    return markdown(header, cells, words=3)


def _where(row: Row) -> tuple[str, ...]:
    return row["size"], FORMS[row["form"]], WORKS[row["work"]], str(at(row))


def _measured(row: Row) -> tuple[str, ...]:
    if "failed" in row:
        return row["failed"], "", "", ""
    found = energy(row)
    return (
        f"{milliseconds(row):,.3f}",
        f"{rate(row):,.0f}",
        f"{row['peak_gb']:.2f}" if "peak_gb" in row else "",
        "" if found is None else f"{found:,.1f}",
    )


def _published(value: Published | None) -> tuple[str, ...]:
    if value is None:
        return "", "", ""
    parts = (
        "" if value.seconds is None else f"{1e3 * value.seconds:,.4g} ms",
        "" if value.gb is None else f"{value.gb:g} GB",
        "" if value.tokens_per_s is None else f"{value.tokens_per_s:,g} tokens/s",
        "" if value.mj_per_token is None else f"{value.mj_per_token:,g} mJ",
    )
    return ", ".join(filter(None, parts)), value.card or "not said", value.source


class _Panel(NamedTuple):
    """One curve of the figure: which rows, the axes, and the height of a row and of the paper's."""

    part: str
    work: str
    x: str
    y: str
    value: Callable[[Row], float | None]
    of_paper: Callable[[Published], float | None]

    def shows(self, row: Row, form: str = "") -> bool:
        """Whether a row belongs to it, and is of the form where one is given."""
        return (row["part"], row["work"]) == self[:2] and form in ("", row["form"])


def _peak_gb(row: Row) -> float | None:
    return row.get("peak_gb")


def _ms(value: Published) -> float | None:
    return None if value.seconds is None else 1e3 * value.seconds


_PANELS = (
    _Panel("training", "train", "Rows", "Step (ms)", milliseconds, _ms),
    _Panel("training", "train", "Rows", "Memory (GB)", _peak_gb, lambda v: v.gb),
    _Panel("inference", "prefill", "Model", "Reading (ms)", milliseconds, _ms),
    _Panel("inference", "prefill", "Model", "Memory (GB)", _peak_gb, lambda v: v.gb),
    _Panel("lengths", "prefill", "Tokens", "Reading (tokens/s)", rate, lambda v: v.tokens_per_s),
    _Panel("lengths", "prefill", "Tokens", "Reading (mJ a token)", energy,
           lambda v: v.mj_per_token),
    _Panel("lengths", "decode", "Tokens", "Generating (tokens/s)", rate, lambda v: v.tokens_per_s),
    _Panel("lengths", "decode", "Tokens", "Generating (mJ a token)", energy,
           lambda v: v.mj_per_token),
)  # fmt: skip


def draw(record: Row, path: Path) -> None:
    """A panel for each curve of the paper that has rows: lines ours, open circles the paper's."""
    from matplotlib.figure import Figure

    rows = [row for row in record["rows"] if "failed" not in row]
    panels = [panel for panel in _PANELS if any(panel.shows(row) for row in rows)]
    figure = Figure(figsize=(4 * len(panels) or 1, 3.5), layout="constrained")
    for number, panel in enumerate(panels, 1):
        axis = figure.add_subplot(1, len(panels), number)
        for colour, (form, label) in enumerate(FORMS.items()):
            found = [(_place(r), panel.value(r)) for r in rows if panel.shows(r, form)]
            points = sorted((place, v) for place, v in found if v is not None)
            if points:
                axis.plot(*zip(*points, strict=True), "-o", ms=3, color=f"C{colour}", label=label)
            for value in PUBLISHED:
                at_paper = panel.of_paper(value)
                if (value.part, value.work, value.form) == (*panel[:2], form) and at_paper:
                    place = _model(value.size) if value.part == "inference" else value.at
                    axis.plot(place, at_paper, "o", mfc="none", color=f"C{colour}")
        axis.set(xlabel=panel.x, ylabel=panel.y, xscale="log", yscale="log")
        if axis.lines:
            axis.legend(fontsize=6)
    devices = sorted({row["device"] for row in rows})
    figure.suptitle(", ".join(devices), fontsize=10)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=120)


def _place(row: Row) -> float:
    """Where a row stands on the x axis."""
    return _model(row["size"]) if row["part"] == "inference" else at(row)


def _model(size: str) -> float:
    """A model's place on an axis: its parameters, about (10^6)."""
    return by_size(size) / 1e6
