"""Lines, tables and the figure of the records of `mmfree bench edge`."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.experiments.bench.records import Row, by_size, draw_bars, markdown, spread
from mmfree_jax.files import open_atomically

LABELS = {
    "onnx-fast": "MatMul-free, ONNX fast (2 bits)",
    "onnx-exact": "MatMul-free, ONNX exact (2 bits)",
    "onnx-f32": "MatMul-free, ONNX float32",
    "jax-cpu": "MatMul-free, JAX on the CPU (int8 trits)",
    "llama-q4_0": "Transformer++, llama.cpp Q4_0",
    "llama-q4_k_m": "Transformer++, llama.cpp Q4_K_M",
    "llama-q8_0": "Transformer++, llama.cpp Q8_0",
    "llama-tq1_0": "Transformer++, llama.cpp TQ1_0 (ternary)",
    "llama-tq2_0": "Transformer++, llama.cpp TQ2_0 (ternary)",
    "llama-f16": "Transformer++, llama.cpp F16",
}
OURS, PEER = "onnx-fast", "llama-q4_0"  # whose ratio is the target
TARGET = 2.0


def describe(row: Row) -> str:
    """One line for a row."""
    tokens = row["context"] if row["work"] == "decode" else row["tokens"]
    name = f"{row['work']} {row['size']} {row['form']} at {tokens} tokens"
    if "failed" in row:
        return f"{name}: {row['failed']}"
    return (
        f"{name}: {spread(row['tokens_per_s'], '.1f')} tokens/s, "
        f"file {row['file_mb']:.0f} MB, loaded in {row['load_s']:.2f} s, "
        f"peak {row['peak_mb']:.0f} MB"
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown: forms side by side, then speed and memory by context."""
    parts = (_forms(rows), _contexts(rows), verdicts(rows), disturbance(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _forms(rows: Sequence[Row]) -> str:
    first = _first_context(rows)
    prefill = {(r["size"], r["form"]): r for r in rows if r["work"] == "prefill"}
    decode = [r for r in rows if r["work"] == "decode" and r["context"] == first]
    if not decode:
        return ""
    read = next(iter(prefill.values()), {"tokens": 0})["tokens"]
    header = ("size", "form", f"decode at {first} tokens, tokens/s (min to max)",
              f"prompt of {read} tokens, tokens/s", "file, MB", "load, s", "memory loaded, MB",
              "peak, MB")  # fmt: skip
    lines = []
    for row in decode:
        cells = [row["size"], LABELS[row["form"]]]
        if "failed" in row:
            lines.append([*cells, row["failed"]])
            continue
        speed = prefill.get((row["size"], row["form"]), {}).get("tokens_per_s")
        lines.append([
            *cells, spread(row["tokens_per_s"], ".1f"), f"{speed['median']:,.0f}" if speed else "-",
            f"{row['file_mb']:.0f}", f"{row['load_s']:.2f}", f"{row['rss_loaded_mb']:.0f}",
            f"{row['peak_mb']:.0f}",
        ])  # fmt: skip
    return markdown(header, lines)


def _contexts(rows: Sequence[Row]) -> str:
    decode = [r for r in rows if r["work"] == "decode"]
    contexts = sorted({r["context"] for r in decode})
    if len(contexts) < 2:
        return ""
    found = {(r["size"], r["form"], r["context"]): _speed_and_memory(r) for r in decode}
    later = {(r["size"], r["form"]) for r in decode if r["context"] != contexts[0]}
    order = sorted(later, key=lambda key: (by_size(key[0]), list(LABELS).index(key[1])))
    return markdown(
        ("size", "form", *(f"{c:,} tokens" for c in contexts)),
        [(s, LABELS[f], *(found.get((s, f, c), "-") for c in contexts)) for s, f in order],
    )


def _speed_and_memory(row: Row) -> str:
    if "failed" in row:
        return row["failed"]
    return f"{row['tokens_per_s']['median']:.1f} tokens/s, {row['peak_mb']:,.0f} MB"


def verdicts(rows: Sequence[Row]) -> str:
    """The fast grade against the 4-bit peer, at every size and context where both were measured."""
    good = {
        (r["size"], r["context"], r["form"]): r
        for r in rows
        if r["work"] == "decode" and "failed" not in r
    }
    lines = []
    for (size, context, form), ours in good.items():
        peer = good.get((size, context, PEER))
        if form != OURS or peer is None:
            continue
        speed = ours["tokens_per_s"]["median"] / peer["tokens_per_s"]["median"]
        memory = ours["peak_mb"] / peer["peak_mb"]
        reached = "reached" if speed >= TARGET and memory < 1 else "**not reached**"
        lines.append(
            f"- {size} at {context:,} tokens: {LABELS[OURS]} has {speed:.2f} times the tokens/s "
            f"of {LABELS[PEER]} and {memory:.2f} times its peak memory; target {TARGET:g} and "
            f"below 1: {reached}."
        )
    return "\n".join(lines)


def disturbance(rows: Sequence[Row]) -> str:
    """How much of the machine other processes took during the measurements."""
    shares = sorted(
        (r["cores_of_others"], describe(r).partition(":")[0])
        for r in rows
        if "cores_of_others" in r
    )
    if not shares:
        return ""
    median, (most, where) = shares[len(shares) // 2][0], shares[-1]
    return (
        f"Other processes used {median:.2f} cores during the median measurement and {most:.2f} "
        f"at most ({where})."
    )


def draw(record: Row, path: Path) -> None:
    """Speed and memory by form, and by context."""
    from matplotlib.figure import Figure

    rows = [r for r in record["rows"] if r["work"] == "decode" and "failed" not in r]
    first = _first_context(rows)
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    axes = figure.subplots(2, 2)
    panels = (
        ("Decoding (tokens/s)", lambda r: r["tokens_per_s"]["median"]),
        ("Peak memory of the process (MB)", lambda r: r["peak_mb"]),
    )
    for (top, bottom), (label, value) in zip(axes.T, panels, strict=True):
        at_first = [r for r in rows if r["context"] == first]
        draw_bars(top, at_first, LABELS, value, number="{:,.0f}")
        top.set(xlabel=f"Model, {first} tokens of context", ylabel=label)
        bottom.set_visible(len({r["context"] for r in rows}) > 1)
        _draw_by_context(bottom, rows, value)
        bottom.set(xlabel="Context (tokens)", ylabel=label)
    if rows:
        axes[0][0].legend(fontsize=7)
    if axes[1][1].lines:
        axes[1][1].legend(fontsize=7)
    machine = record["machine"]
    figure.suptitle(f"One row, greedy, {machine['threads']} threads, {machine['cpu']}", fontsize=10)
    with open_atomically(path) as file:
        figure.savefig(file, dpi=150)


def _draw_by_context(axis: Any, rows: Sequence[Row], value: Callable[[Row], float]) -> None:
    sizes = sorted({r["size"] for r in rows}, key=by_size)
    for number, form in enumerate(LABELS):
        for size in sizes:
            points = sorted(
                (r["context"], value(r)) for r in rows if (r["size"], r["form"]) == (size, form)
            )
            if len(points) > 1:
                style = "-o" if size == sizes[0] else "--s"
                label = f"{size} {LABELS[form]}"
                axis.plot(*zip(*points, strict=True), style, color=f"C{number % 10}", label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter("{x:g}")
    axis.set_ylim(bottom=0)


def _first_context(rows: Sequence[Row]) -> int:
    return min((r["context"] for r in rows if r["work"] == "decode"), default=0)
