"""Documented figures of training are those of train.txt, kernels.json, scaling.json and others."""

import re

from mmfree_jax.cli.info import describe
from mmfree_jax.cli.train import resolve_config

ONE = {"370M": "370M-weak-one-1-b8", "1.3B": "1.3B-weak-one-1-b8"}

KERNELS = {
    "bfloat16 products of the backward pass, cuBLAS": ("nvjet", "void cublasLt"),
    "int8 products: forward, and what is made again in the backward pass": ("anonymous_mosaic",),
    "norms backward": ("norm_backward",),
    "norms and quantisation, forward and again": ("norm_quant",),
    "recurrence, forward and backward": ("linear_recurrence",),
    "AdamW, one expression a weight, 28 bytes each": ("loop_concatenate_fusion",),
    "softmax rows of the head": ("softmax_rows",),
}
"""Rows of the table of a step, and how the names of their kernels begin in the profile."""

# Forward and backward of pallas_kernels/README.md, without a record, and the columns behind.
RECURRENCE = {
    ("gates fused", 8): (0.116, 0.201, "| | |"),
    ("gates fused", 1): (0.147, 0.201, "| | |"),
    ("f and x given", 8): (0.098, 0.153, "| 0.11 / 0.35 | 0.469 / 1.325 |"),
    ("f and x given", 1): (0.110, 0.176, "| 0.11 / 0.40 | 0.757 / 1.794 |"),
}


def printed(records, size):
    """Milliseconds, tokens/s and peak GiB of a step in train.txt, and milliseconds by kernel."""
    part = next(p for p in records.text("h100/train.txt").split("\n$ ") if f" {size} " in p)
    step = re.search(r": ([\d.]+) ms a step, ([\d,]+) tokens/s, .* peak ([\d.]+) GiB", part)
    rows = re.findall(r"^│ (.*?) │ +\d* +│ +([\d.]+) +│$", part, re.M)
    return (
        [float(number.replace(",", "")) for number in step.groups()],
        {name.strip(): float(ms) for name, ms in rows},
    )


def run(records, name):
    return records[f"h100/{name}.json"]["measurement"]


def scaled(records, name):
    return next(r for r in records["h100/scaling.json"]["records"] if r["name"] == name)


def test_step(records, compare):
    ends = {
        "370M": "190k, 9 GiB | 62.8k, 25.1 GiB | 80.8k, 32.0 GiB |",
        "1.3B": "80k, 24 GiB: **not reached** | 40.0k, 57.1 GiB | 36.2k, 65.9 GiB |",
    }
    lines = []
    for size, end in ends.items():
        ms, speed, gib = printed(records, size)[0]
        lines.append(f"| {size} | {ms:.1f} ms | {speed / 1e3:.1f}k | {gib:.1f} GiB | {end}")
    small, large = (scaled(records, name)["tokens_per_s"] / 1e3 for name in ONE.values())
    lines.append(f"a second run (`scaling.json` beside it) gave {small:.1f}k and {large:.1f}k")
    rows, plain = run(records, "370M-16-rows"), run(records, "370M-plain")
    plus, big = run(records, "370M-transformer"), run(records, "2.7B")
    lines += [
        f"370M with 16 rows takes {rows['step_ms']:.1f} ms, "
        f"{rows['tokens_per_s'] / 1e3:.1f}k tokens/s, {rows['peak_gib']:.1f} GiB",
        f"in {plus['step_ms']:.1f} ms, {plus['tokens_per_s'] / 1e3:.1f}k tokens/s, "
        f"{plus['peak_gib']:.1f} GiB (`370M-transformer.json`)",
        f"2.7B was trained ({big['peak_gib']:.1f} GiB, {big['tokens_per_s'] / 1e3:.1f}k tokens/s "
        "by an earlier version: `2.7B.json`)",
        f"took {plain['tokens_per_s'] / 1e3:.0f}k tokens/s plain (`370M-plain.json`",
    ]
    compare("docs/kernels.md", lines)


def test_memory_by_plan_by_estimate_and_measured(records, compare):
    estimates, plans = [], []
    for size, name in ONE.items():
        argv = ["--preset", size, "--batch-size", "8", "--data.seq-len", "2048"]
        (row,) = describe(resolve_config(argv), [1])["memory"]
        found = scaled(records, name)
        estimates.append(row["total"] / 2**30)
        plans.append(found["compiled"]["planned_gib"])
        all_three = (estimates[-1], plans[-1], found["peak_gib"])
        assert max(all_three) / min(all_three) < 1.04
    assert all(
        abs(r["compiled"]["planned_gib"] / r["peak_gib"] - 1) < 0.04
        for r in records["h100/scaling.json"]["records"]
    )
    lines = [
        f"the compiler's plan ({plans[0]:.1f} and {plans[1]:.1f} GiB)",
        f"({estimates[0]:.1f}; {estimates[1]:.1f} for 1.3B) agree within 4%",
        "in `scaling.json`, plan and measured peak agree within 4%",
    ]
    compare("docs/kernels.md", lines)


def test_kernels_of_a_step(records, compare):
    kernels = {size: printed(records, size)[1] for size in ONE}
    left = {size: kernels[size]["all"] for size in ONE}
    lines = []
    for label, beginnings in KERNELS.items():
        for size in ONE:
            left[size] -= sum(v for k, v in kernels[size].items() if k.startswith(beginnings))
        cells = [
            sum(v for k, v in kernels[size].items() if k.startswith(beginnings)) for size in ONE
        ]
        lines.append(f"| {label} | {cells[0]:.1f} | {cells[1]:.1f} |")
    label = "ternarisation, gradient norm, residual sums, copies of slices"
    lines.append(f"| {label} | {left['370M']:.1f} | {left['1.3B']:.1f} |")
    compare("docs/kernels.md", lines)


def test_recurrence(records, compare, fixed):
    lines = []
    for (label, batch), (first, second, end) in RECURRENCE.items():
        shape = [batch, 16384 // batch, 2048]
        prefix = "mlgru_" if label == "gates fused" else ""
        forward, backward = (
            records.row("h100/kernels.json", op=f"recurrence {prefix}{step}", shape=shape,
                        variant="pallas_gpu")["ms"]
            for step in ("forward", "backward")
        )  # fmt: skip
        lines.append(
            f"| {label}, {shape} | {fixed(first, 3)}, {fixed(forward, 3)} | "
            f"{fixed(first + second, 3)}, {fixed(forward + backward, 3)} {end}"
        )
    kernels = printed(records, "1.3B")[1]  # 24 layers
    lines.append(
        f"gives the fused kernel {kernels['linear_recurrence'] / 24:.3f} ms forward "
        f"and {kernels['linear_recurrence_reversed'] / 24:.3f} backward"
    )
    compare("docs/kernels.md", lines)


def test_rounding_in_the_norm(records, compare):
    rows, lines = records["h100/rounding_in_norm.json"]["rows"], []
    for size in ("1.3B", "370M"):
        for backward in ("int8_dx", "int8"):
            cells = [
                ", ".join(
                    f"{row['step_ms']:.1f}"
                    for row in rows
                    if (row["preset"], row["backward"], row["gradient rounded"])
                    == (size, backward, where)
                )
                for where in ("by a kernel of its own", "in the norm's backward")
            ]
            lines.append(f"| {size}, {backward} | {' | '.join(cells)} |")
    compare("docs/kernels.md", lines)


def test_off_triton(records, compare):
    lines = []
    for row in records["h100/mosaic.json"]["records"]:
        if row["op"] == "norm":
            label = f"norm, K = {row['k']}, {row['form']}, consumers: {row['count']}, {row['way']}"
        elif row["op"] == "recurrence":
            way = row["way"].removeprefix("mlgru_")
            label = f"gates and recurrence, [8, 2048, {row['D']}], {way}"
        else:
            label = f"rows of logits, [{row['P']}, {row['V']}], with the gradient"
        ms = [row[form]["device_ms"] for form in ("xla", "pallas_triton", "mosaic_gpu")]
        lines.append(f"| {label} | {ms[0]:.3f} | {ms[1]:.3f} | {ms[2]:.3f} |")
    for step in records["h200/mosaic.json"]["steps"]:
        by, kernels = step["norms, recurrence and rows of logits by"], step["kernels"]
        parts = [
            f"{sum(k['ms'] for name, k in kernels.items() if name.startswith(group)):.1f}"
            if kernels
            else "-"
            for group in ("norm_quant", "norm_backward", "linear_recurrence", "softmax_rows")
        ]
        first = f"| {step['preset']} | {by} | {step['step_ms']:.1f} | {step['peak_gib']:.1f} |"
        lines.append(f"{first} {' | '.join(parts)} |")
    compare("docs/kernels.md", lines)


def test_paper_runs(records, compare):
    big = run(records, "2.7B")
    measured = {size: printed(records, size)[0][1:] for size in ONE}
    measured["2.7B"] = (big["tokens_per_s"], big["peak_gib"])
    budgets = {"370M": (15e9, "", "5 h"), "1.3B": (100e9, "", "84 h"),
               "2.7B": (100e9, " (an earlier version)", "173 h")}  # fmt: skip
    lines = []
    for size, (tokens, note, papers) in budgets.items():
        rate, gib = measured[size]
        hours = tokens / rate / 3600
        eight = f"{hours / 8 / 0.9:.1f} h | {papers}"
        lines.append(
            f"| {size} | {rate / 1e3:.1f}k{note} | {hours:.0f} | {eight} | {gib:.1f} GiB |"
        )
        compare(
            f"experiments/configs/paper-{size}.yaml",
            [f"# {hours:.0f} hours of one H100 at its measured rate, and {gib:.1f} GiB of it,"],
        )
    compare("docs/paper-runs.md", lines)


def test_backward_products_in_8_bits(records, compare):
    name = "h100/backward8.json"

    def rate(preset, backward, visit):
        row = records.row(name, preset=preset, backward=backward, visit=visit)
        return f"{row['tokens_per_s'] / 1e3:.1f}k"

    losses = {key: run["eval_loss"] for key, run in records["backward8/summaries.json"].items()}

    def worse(backward, seeds):
        differences = [losses[f"{backward}-{s}"] - losses[f"bf16-{s}"] for s in range(seeds)]
        return f"{sum(differences) / seeds:+.4f} ({seeds} seeds)"

    lines = [
        f"| 370M | {rate('370M', 'bf16', 1)} | {rate('370M', 'int8_dx', 1)} "
        f"| {rate('370M', 'int8', 2)} |",
        f"| 1.3B | {rate('1.3B', 'bf16', 1)} | {rate('1.3B', 'int8_dx', 3)} "
        f"| {rate('1.3B', 'int8', 2)} |",
        f"| 2.7B | {rate('2.7B', 'bf16', 2)} | {rate('2.7B', 'int8_dx', 3)} "
        f"| {rate('2.7B', 'int8', 2)} |",
        "| held-out loss at 61M parameters, 82M tokens, against bf16 | "
        f"| {worse('int8_dx', 3)} | {worse('one_scale', 3)} |",
    ]
    compare("docs/kernels.md", lines)


def test_small_models(records, compare):
    found = records["h100/small_models.json"]["records"]

    def cell(name):
        if name not in found:
            return "not measured"
        measured = found[name]["measurement"]
        return f"{measured['step_ms']:.1f} ms, {measured['compile_s']:.0f} s"

    lines = []
    for rung in ("rung-7M", "rung-18M", "rung-61M"):
        unrolled = found[f"{rung}-noscan"]["measurement"]
        scanned = found.get(f"{rung}-scan", {}).get("measurement")
        factor = "" if scanned is None else f"{scanned['step_ms'] / unrolled['step_ms']:.2f} "
        lines.append(
            f"| {rung} | {cell(f'{rung}-scan')} | {cell(f'{rung}-noscan')} "
            f"| {unrolled['tokens_per_s'] / 1e3:,.0f}k | {factor}|"
        )
    compare("docs/kernels.md", lines)


def test_small_models_on_an_h200(records, compare):
    record = records["h200/small_models.json"]
    small, large, smallest = (found["measurement"] for found in record["records"])
    steps = (smallest, small, large)
    kernels = record["records"][1]["kernels"]
    norms = sum(k["ms"] for name, k in kernels.items() if name.startswith("norm_"))
    lines = [
        "took {:.1f}, {:.1f} and {:.1f} ms unrolled".format(*(s["step_ms"] for s in steps)),
        "{:,.0f}k, {:,.0f}k and {:,.0f}k".format(*(s["tokens_per_s"] / 1e3 for s in steps)),
        f"of {record['records'][1]['device_ms']:.1f} ms that rung-61M's kernels took under the "
        f"profiler, the norms took {norms:.1f}, XLA's Triton products "
        f"{kernels['gemm_fusion_dot']['ms']:.1f}.",
    ]
    text = records.text("h200/on_gpu.txt")
    passed = text.count("\npassed tests/on_gpu/")
    day, commit = re.match(r"([\d-]+), .* commit (\w+):", text).groups()
    lines.append(f"and all {passed} on an H200 ({day}, commit {commit},")
    lines.append(f"{text.count('later passed tests/on_gpu/')} cases that came later")
    compare("docs/kernels.md", lines)


def test_starts(records, compare, fixed):
    rows = records["h200/starts.json"]["rows"]
    assert [(row.get("commit"), row["start"]) for row in rows] == [
        (None, 1), (None, 2), ("26e4793", 1), ("26e4793", 2),
    ]  # fmt: skip
    ends = [fixed(row["to_the_end_of_step_1_s"], 1) for row in rows]
    before, after = (fixed(row["before_compiling_s"], 1) for row in rows[::2])
    lines = [
        f"after {ends[0]} s, with nothing kept, and {ends[1]} s at commit cf9b341",
        f"at 26e4793, where a run's parameters are made by a loop over layers, after {ends[2]} "
        f"and {ends[3]} s (the time before the step is compiled fell from {before} to {after} s)",
    ]
    compare("docs/command-line.md", lines)


def test_cuts_of_the_recurrence(records, compare):
    found = {
        (row["unroll"], row["channels"], row["stages"]): sorted(row["device_ms"])[1]
        for row in records["h100/recurrence_cuts.json"]["records"]
    }
    compare(
        "docs/kernels.md",
        [
            f"since have two stages less where that is so, which takes {found[8, 32, 2]:.3f}; 64 "
            f"channels a program, {found[8, 64, 2]:.3f}, are not taken",
        ],
    )


def test_steps_as_printed(records, compare):
    text = records.text("h100/steps.txt")
    small = text.split("rung-61M-transformer", 1)[1]
    scanned, unrolled = re.findall(r"([\d.]+) ms a step", small)
    twins = {
        size: re.search(
            rf"--preset {size}-transformer --model.remat {remat} .*? a step, ([\d,]+) .*? peak "
            r"([\d.]+)",
            text,
        )
        for size, remat in (("370M", "dots"), ("1.3B", "projections"))
    }
    times = [
        float(ms) for ms in re.findall(r"-transformer --model.remat \w+ .*? ([\d.]+) ms", text)
    ]
    shares = [
        int(t) / 989 for t in re.findall(r"-transformer --model.remat .*? (\d+) TFLOP/s", text)
    ]
    speeds, peaks = zip(*(twin.groups() for twin in twins.values()), strict=True)
    first, second = (float(speed.replace(",", "")) / 1e3 for speed in speeds)
    compare(
        "docs/kernels.md",
        [
            f"rung-61M's twin takes {unrolled} ms unrolled and {scanned} scanned",
            f"{first:.1f}k and {second:.1f}k tokens/s in {peaks[0]} and {peaks[1]} GiB",
            f"{times[0]} ms ({first:.1f}k tokens/s, {shares[0]:.0%} of the bfloat16 peak) and "
            f"{times[-1]} ms ({second:.1f}k, {shares[-1]:.0%})",
        ],
    )
