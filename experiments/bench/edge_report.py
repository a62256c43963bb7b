"""Lines, tables and the figure of the records of `mmfree bench edge`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmfree_jax.presets import preset

Row = dict[str, Any]

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
    speed = row["tokens_per_s"]
    return (
        f"{name}: {speed['median']:.1f} tokens/s ({speed['min']:.1f} to {speed['max']:.1f}), "
        f"file {row['file_mb']:.0f} MB, loaded in {row['load_s']:.2f} s, "
        f"peak {row['peak_mb']:.0f} MB"
    )


def table(rows: Sequence[Row]) -> str:
    """All rows as Markdown: forms side by side, then speed and memory by context."""
    parts = [
        "\n".join(_form_lines(rows)),
        "\n".join(_context_lines(rows)),
        verdicts(rows),
        disturbance(rows),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _form_lines(rows: Sequence[Row]) -> list[str]:
    first = _first_context(rows)
    prefill = {(r["size"], r["form"]): r for r in rows if r["work"] == "prefill"}
    decode = [r for r in rows if r["work"] == "decode" and r["context"] == first]
    if not decode:
        return []
    read = next(iter(prefill.values()), {"tokens": 0})["tokens"]
    lines = [
        f"| size | form | decode at {first} tokens, tokens/s (min to max) | prompt of {read} "
        "tokens, tokens/s | file, MB | load, s | memory loaded, MB | peak, MB |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in decode:
        cells = [row["size"], LABELS[row["form"]]]
        if "failed" in row:
            cells += [row["failed"], "", "", "", "", ""]
        else:
            other = prefill.get((row["size"], row["form"]), {})
            cells += [
                _speed(row),
                f"{other['tokens_per_s']['median']:,.0f}" if "tokens_per_s" in other else "-",
                f"{row['file_mb']:.0f}",
                f"{row['load_s']:.2f}",
                f"{row['rss_loaded_mb']:.0f}",
                f"{row['peak_mb']:.0f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def _context_lines(rows: Sequence[Row]) -> list[str]:
    decode = [r for r in rows if r["work"] == "decode"]
    contexts = sorted({r["context"] for r in decode})
    if len(contexts) < 2:
        return []
    lines = [
        "| size | form | " + " | ".join(f"{c:,} tokens" for c in contexts) + " |",
        "|---|---|" + "---|" * len(contexts),
    ]
    found = {(r["size"], r["form"], r["context"]): r for r in decode}
    later = {(r["size"], r["form"]) for r in decode if r["context"] != contexts[0]}
    for size, form in sorted(
        later, key=lambda key: (_parameters(key[0]), list(LABELS).index(key[1]))
    ):
        cells = []
        for context in contexts:
            row = found.get((size, form, context), {"failed": "-"})
            cells.append(
                row["failed"]
                if "failed" in row
                else f"{row['tokens_per_s']['median']:.1f} tokens/s, {row['peak_mb']:,.0f} MB"
            )
        lines.append(f"| {size} | {LABELS[form]} | " + " | ".join(cells) + " |")
    return lines


def _speed(row: Row) -> str:
    speed = row["tokens_per_s"]
    return f"{speed['median']:.1f} ({speed['min']:.1f} to {speed['max']:.1f})"


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
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = [r for r in record["rows"] if r["work"] == "decode" and "failed" not in r]
    sizes = sorted({r["size"] for r in rows}, key=_parameters)
    forms = [form for form in LABELS if any(r["form"] == form for r in rows)]
    colors = {form: f"C{number % 10}" for number, form in enumerate(LABELS)}
    first = _first_context(rows)
    figure, axes = plt.subplots(2, 2, figsize=(12, 8.5), layout="constrained")
    if len({r["context"] for r in rows}) < 2:
        for axis in axes[1]:
            axis.set_visible(False)
    panels = (
        ("Decoding (tokens/s)", lambda r: r["tokens_per_s"]["median"]),
        ("Peak memory of the process (MB)", lambda r: r["peak_mb"]),
    )
    for column, (label, value) in enumerate(panels):
        top, bottom = axes[0][column], axes[1][column]
        for number, form in enumerate(forms):
            found = {
                r["size"]: value(r) for r in rows if r["form"] == form and r["context"] == first
            }
            shift = 0.9 / max(1, len(forms)) * (number - (len(forms) - 1) / 2)
            bars = top.bar(
                [sizes.index(s) + shift for s in found],
                list(found.values()),
                width=0.85 / max(1, len(forms)),
                label=LABELS[form],
                color=colors[form],
            )
            top.bar_label(bars, fmt="{:,.0f}", fontsize=6)
        top.set_xticks(range(len(sizes)), sizes)
        top.set_xlabel(f"Model, {first} tokens of context")
        top.set_ylabel(label)
        for size_number, size in enumerate(sizes):
            for form in forms:
                points = sorted(
                    (r["context"], value(r)) for r in rows if (r["size"], r["form"]) == (size, form)
                )
                if len(points) > 1:
                    bottom.plot(
                        *zip(*points, strict=True),
                        "-o" if size_number == 0 else "--s",
                        color=colors[form],
                        label=f"{size} {LABELS[form]}",
                    )
        bottom.set_xscale("log", base=2)
        bottom.xaxis.set_major_formatter("{x:g}")
        bottom.set_ylim(bottom=0)
        bottom.set_xlabel("Context (tokens)")
        bottom.set_ylabel(label)
        if bottom.lines and column:
            bottom.legend(fontsize=7)
    if rows:
        axes[0][0].legend(fontsize=7)
    machine = record["machine"]
    figure.suptitle(f"One row, greedy, {machine['threads']} threads, {machine['cpu']}", fontsize=10)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def _first_context(rows: Sequence[Row]) -> int:
    return min((r["context"] for r in rows if r["work"] == "decode"), default=0)


def _parameters(size: str) -> float:
    model = preset(size).model
    return model.num_layers * model.hidden_size**2
