"""Figures of the day without Pallas-Triton are those of without_triton.json."""


def test_without_triton(records, compare):
    name = "h200/without_triton.json"
    train = records[name]["train"]
    ours, none = train["with"], train["without"]

    def rows(work, size):
        wanted = {"work": work, "size": size, "form": "packed", "batch": 1}
        key = "ms" if work == "prefill" else "ms_per_token"
        return [
            records.row(record, **wanted)[key]["median"] for record in ("h200/infer.json", name)
        ]

    lines = [
        "| a training step of 1.3B, `int8_dx`, 8 rows of 2,048 tokens "
        f"| {ours['step_ms']:.1f} ms | {none['step_ms']:.1f} ms |"
    ]
    for size in ("370M", "1.3B"):
        before, after = rows("decode", size)
        lines.append(f"| a token of {size}, packed, batch 1 | {before:.3f} ms | {after:.3f} ms |")
    before, after = rows("prefill", "1.3B")
    lines.append(f"| a prompt of 2,048 tokens, 1.3B, packed | {before:.1f} ms | {after:.1f} ms |")
    wanted = {"work": "decode", "size": "1.3B", "form": "matmulfree-bf16"}
    dense = records.row("h200/infer.json", **wanted)["ms_per_token"]["median"]
    slower = 100 * (none["step_ms"] / ours["step_ms"] - 1)
    lines += [
        f"at {none['tokens_per_s']:,.0f} tokens/s in place of {ours['tokens_per_s']:,.0f}",
        f"than in bfloat16 ({dense:.3f} ms)",
        f"| {slower:.0f}% more time a step of 1.3B, below |",
    ]
    compare("docs/next-jax.md", lines)
