"""Documented figures of exports on a CPU are those of the records in results/edge."""

from statistics import median

FORMS = {
    "onnx-fast": "ONNX fast",
    "onnx-exact": "ONNX exact",
    "llama-q4_0": "llama.cpp Q4_0",
    "llama-q4_k_m": "llama.cpp Q4_K_M",
    "llama-tq2_0": "llama.cpp TQ2_0, ternary",
    "llama-f16": "llama.cpp F16",
    "onnx-f32": "ONNX float32 (earlier run)",
    "jax-cpu": "JAX on the CPU (earlier run)",
}
SIZES = ("370M", "1.3B")
CONTEXTS = (32, 512, 2048, 16384)


def decode(records, size, form, context=32, name="edge/edge.json"):
    return records.row(name, work="decode", size=size, form=form, context=context)


def speed(records, size, form, context=32):
    return decode(records, size, form, context)["tokens_per_s"]["median"]


def short(value):
    """Whole numbers from 10 on, else one decimal."""
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.1f}"


def test_command(records, compare):
    compare("docs/edge.md", [records["edge/edge.json"]["command"]])


def test_forms(records, compare):
    lines = []
    for size in SIZES:
        for form, label in FORMS.items():
            name = "edge/first.json" if "earlier" in label else "edge/edge.json"
            found = decode(records, size, form, name=name)
            middle, low, high = (short(found["tokens_per_s"][k]) for k in ("median", "min", "max"))
            prompt = records.row(name, work="prefill", size=size, form=form)["tokens_per_s"]
            title = f"**{size}**: {label}" if form == "onnx-fast" else label
            lines.append(
                f"| {title} | {middle} ({low} to {high}) | {prompt['median']:.0f} | "
                f"{found['file_mb']:,.0f} | {short(found['load_s'])} | {found['peak_mb']:,.0f} |"
            )
    compare("docs/edge.md", lines)


def test_contexts(records, compare):
    lines = []
    for size in SIZES:
        for form in ("onnx-fast", "llama-q4_0", "llama-tq2_0"):
            found = [decode(records, size, form, context) for context in CONTEXTS]
            cells = [f"{short(r['tokens_per_s']['median'])}, {r['peak_mb']:,.0f} MB" for r in found]
            lines.append(f"| {size}, {FORMS[form].partition(',')[0]} | {' | '.join(cells)} |")
    compare("docs/edge.md", lines)


def test_beside_the_peer(records, compare):
    pairs = {}
    for size in SIZES:
        rows = [r for r in records["edge/pairs.json"]["rows"] if r["size"] == size]
        runs = [r["tokens_per_s"]["median"] for r in rows]
        pairs[size] = [ours / peer for ours, peer in zip(runs[::2], runs[1::2], strict=True)]
    texts = [", ".join(f"{r:.2f}" for r in pairs[size]) for size in SIZES]
    small, large = (" and".join(text.rsplit(",", 1)) for text in texts)
    ratio = {
        size: [
            speed(records, size, "onnx-fast", n) / speed(records, size, "llama-q4_0", n)
            for n in CONTEXTS
        ]
        for size in SIZES
    }
    memory = [
        decode(records, size, "onnx-fast")["peak_mb"]
        / decode(records, size, "llama-q4_0")["peak_mb"]
        for size in SIZES
    ]
    a, b = ratio["370M"], ratio["1.3B"]
    lines = [
        f"it was {small} times at 370M and {large} times at 1.3B",
        f"medians {median(pairs['370M']):.1f} and {median(pairs['1.3B']):.1f}",
        f"The table has {a[0]:.2f} and {b[0]:.2f} times",
        f"Memory is {memory[0]:.2f} and {memory[1]:.2f} times the peer's",
        f"{a[1]:.1f}, {a[2]:.1f} and {a[3]:.0f} times at 370M for 512, 2,048 and 16,384 tokens",
        f"{b[1]:.1f} (just), {b[2]:.1f} and {b[3]:.0f} times at 1.3B",
    ]
    compare("docs/edge.md", lines)


def test_sizes(records, compare):
    exact, fast = (
        decode(records, "370M", f"onnx-{grade}")["file_mb"] for grade in ("exact", "fast")
    )
    lines = [
        f"size at 370M | {exact:.0f} MB | {fast:.0f} MB |",
        f"At 370M a download is {fast:.0f} to {exact:.0f} MB.",
    ]
    compare("docs/edge.md", lines)
