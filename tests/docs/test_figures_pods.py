"""Documented figures of several GPUs are those of scaling.json, exchange.json, processes.json."""

import re


def test_several_gpus(records, compare):
    record = records["h100/scaling.json"]
    alone = {r["case"]["preset"]: r["tokens_per_s"] for r in record["records"] if r["devices"] == 1}
    lines = [" ".join(record["command"])]
    for found in record["records"]:
        size, devices, layout = found["case"]["preset"], found["devices"], found["case"]["layout"]
        each = found["tokens_per_s"] / devices
        share = ""
        if size in alone:
            share = "100%" if devices == 1 else f"{each / alone[size]:.1%}"
        moved = hidden = ""
        if "exchange" in found:
            ms = found["exchange"]["ms_a_step"]
            moved, hidden = f"{ms:.1f}", f"{found['exchange']['hidden_ms_a_step'] / ms:.0%}"
        cells = [
            size, str(devices), layout.replace("one", ""), str(found["batch_size"]),
            f"{each:,.0f}", share, f"{found['step_ms']:.1f}", f"{found['peak_gib']:.1f}", moved,
            hidden,
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    compare("docs/pods.md", lines)


def test_gradients_in_bfloat16(records, compare):
    found = records["h100/exchange.json"]["records"]
    alone = {r["case"]["preset"]: r["tokens_per_s"] for r in found if r["devices"] == 1}
    lines, shares = [], []
    for r in found:
        size, devices, layout = r["case"]["preset"], r["devices"], r["case"]["layout"]
        rounded = ["optimizer.gradient_dtype", "bfloat16"] in r["case"]["changes"]
        each = r["tokens_per_s"] / devices
        share = ""
        if size in alone:
            share = "100%" if devices == 1 else f"{each / alone[size]:.1%}"
            shares += [each / alone[size]] * (devices > 1)
        dtype = "" if devices == 1 else "bfloat16" if rounded else "float32"
        if dtype == "float32" and not r["case"]["flags"]:  # thresholds of 1 MiB
            lines.append(f"({each:,.0f} instead of")
            lines.append(f"tokens/s a GPU, {r['peak_gib']:.1f} instead of")
            continue
        cells = [
            size, str(devices), layout.replace("one", ""), dtype, str(r["batch_size"]),
            f"{each:,.0f}", share, f"{r['step_ms']:.1f}", f"{r['peak_gib']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    lines.append(f"95% is reached nowhere yet: {max(shares):.1%} at 1.3B on two GPUs")
    losses = {key: run["eval_loss"] for key, run in records["exchange/summaries.json"].items()}
    worse = sum(losses[f"bfloat16-{s}"] - losses[f"float32-{s}"] for s in (0, 1)) / 2
    lines.append(f"({worse:+.4f} nats;")
    parts = records["h100/processes.json"]["parts"]
    for part in ("exact", "kill"):
        difference = parts[part]["largest relative difference of a loss"]
        lines.append(f"to {difference:.1e}")
    lines.append(f"the other left {parts['kill']['others left after (s)']} s later")
    lines.append(f"the other left after {parts['stop']['others left after (s)']} s")
    compare("docs/pods.md", lines)


def test_the_exchange_on_two_h200(records, compare):
    record = records["h200/exchange.json"]
    found = {entry["name"]: entry for entry in record["records"]}
    alone = found["x1"]["measurement"]
    lines = [f"{record['date']}, jax {record['versions']['jax']}, commit {record['commit']} ("]
    shares = []
    for entry in record["records"]:
        step, command = entry["measurement"], entry["command"]
        devices = step["devices"]
        each = step["tokens_per_s"] / devices
        share = each / alone["tokens_per_s"]
        shares += [share] * (devices > 1)
        combined = re.search(r"all_reduce_combine_threshold_bytes=(\d+)", entry["XLA_FLAGS"])
        dtype = "bfloat16" if "--optimizer.gradient-dtype bfloat16" in command else "float32"
        cells = [
            "1.3B", str(devices), dtype if devices > 1 else "",
            f"{int(combined[1]) >> 20} MiB" if combined else "", f"{each:,.0f}",
            f"{share:.1%}" if devices > 1 else "100%",
            f"{step['step_ms']:.1f} ({step['spread_ms']:.1f})", f"{step['peak_gib']:.1f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |".replace("  ", " "))
    assert max(shares) < 0.95
    ms = {name: entry["measurement"]["step_ms"] for name, entry in found.items()}
    rounded = [entry["measurement"] for name, entry in found.items() if "bf16" in name]
    times = [step["step_ms"] for step in rounded]
    assert max(times) - min(times) < min(step["spread_ms"] for step in rounded)
    earlier = records["h200/without_triton.json"]["train"]["with"]
    assert abs(alone["tokens_per_s"] / earlier["tokens_per_s"] - 1) < 0.006
    lines += [
        found["x2-bf16-128"]["command"].partition(" --out")[0],
        f"Bfloat16 saves {ms['x2-f32-128'] - ms['x2-bf16-128']:.1f} ms of float32's step",
        f"One GPU took {earlier['step_ms']:.1f} ms at an earlier commit",
    ]
    compare("docs/pods.md", lines)
    lines = [
        f"in bfloat16 on 2 GPUs {ms['x2-bf16-1']:.1f} ms, with 32 MiB {ms['x2-bf16-32']:.1f}, "
        f"{ms['x2-bf16-128']:.1f} so (results/h200/exchange.json)"
    ]
    compare("launch/xla_flags.py", lines)


def test_where_the_time_of_two_gpus_goes(records, compare):
    trace = records["h200/exchange.json"]["trace"]
    one, two = trace["records"]
    exchange = two["exchange"]
    kernels = {found["kernel"]: found for found in trace["kernels"]}
    groups = {
        "products of the matrices' gradients (float32, here bfloat16 out)": [
            "nvjet_sm90_tssx128x6x2_h_bz_NTT",
            "nvjet_sm90_tssx128x4x2_h_bz_coopA_NTT",
            "nvjet_sm90_tssx128x6x4_h_bz_NTT",
            "nvjet_sm90_tstx192x3x2_h_bz_coopB_NTN",
            "nvjet_sm90_tstx128x4x2_h_bz_coopA_NTT",
            "nvjet_sm90_tstx128x6x4_h_bz_NTT",
        ],
        "joining, cutting out, turning, converting": [
            "wrapped_concatenate", "memcpy128", "memcpy32_post", "transpose_", "transpose",
            "wrapped_convert",
        ],
        "products of trits and of int8": ["anonymous_mosaic_gpu_kernel"],
    }  # fmt: skip
    lines = [
        f"{one['step_ms']:.1f} ms on one GPU, {two['step_ms']:.1f} on two, "
        f"{two['tokens_per_s'] / 2 / one['tokens_per_s']:.1%}.",
        f"Collectives take {exchange['ms_a_step']:.1f} ms of a step, "
        f"{exchange['hidden_ms_a_step'] / exchange['ms_a_step']:.0%} of it beside other kernels",
    ]
    for label, names in groups.items():
        found = [kernels[name] for name in names if name in kernels]
        alone, beside = (sum(k[gpus]["ms"] for k in found) for gpus in ("one", "two"))
        lines.append(f"| {label} | {alone:.1f} | {beside:.1f} | {beside - alone:+.1f} |")
    (product,) = (
        k
        for k in trace["beside_collectives"]
        if k["kernel"] == "nvjet_sm90_tstx128x4x2_h_bz_coopA_NTT"
    )
    alone, beside = (product[share]["median_us"] for share in ("none", "all"))
    lines.append(f"those of {alone:.0f} us take {beside:.0f} where collectives run beside")
    compare("docs/pods.md", lines)
