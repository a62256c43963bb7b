"""Documented figures of decoding and prompts are those of infer*.json."""

import statistics

RECORD, SMALL, BATCHES = (f"h100/infer{end}.json" for end in ("", "_small", "_batches"))
FORMS = ("packed", "matmulfree-bf16", "transformer-bf16")
SIZES = ("370M", "1.3B", "2.7B", "7B", "13B")


def decode(records, size, form, batch=1, name=RECORD):
    """Median milliseconds a step."""
    found = records.row(name, work="decode", size=size, form=form, batch=batch)
    return found["ms_per_token"]["median"]


def peak(records, size, form):
    """GB at batch 1."""
    return records.row(RECORD, work="decode", size=size, form=form, batch=1)["peak_gb"]


def prompt(records, size, form="packed"):
    """Median milliseconds of 2,048 tokens."""
    name = RECORD if form == "packed" and size in SIZES else BATCHES
    return records.row(name, work="prefill", size=size, form=form)["ms"]["median"]


def energy(records, batch):
    return records.row(RECORD, size="370M", batch=batch)["energy"]


def times(value):
    """Milliseconds with three decimals below ten, with two above."""
    return f"{value:.{3 if value < 10 else 2}f}"


def test_commands_are_those_that_were_run(records, compare):
    compare("docs/inference.md", ["\n".join(records[RECORD]["commands"])])


def test_batch_1(records, compare):
    ends = {"370M": "0.25 | 75", "1.3B": "0.45 | 101", "2.7B": "0.7 | 98", "7B": "- | -",
            "13B": "2.5 (3.7 GB) | -"}  # fmt: skip
    lines = []
    for size, end in ends.items():
        packed, dense, plus = (times(decode(records, size, form)) for form in FORMS)
        memory = [f"{peak(records, size, form):.2f}" for form in ("packed", "transformer-bf16")]
        lines.append(f"| {size} | {' | '.join(memory)} | {packed} | {dense} | {plus} | {end} |")
    compare("docs/inference.md", lines)


def test_the_dense_forms_rate_of_then(records, compare):
    compare("docs/inference.md", [_rate_of_the_largest(records)])


def test_batch_1_since_the_dense_forms_were_mended(records, compare):
    name, lines = "h200/infer.json", []
    ratios = {"memory": [], "speed": []}
    for size in ("370M", "1.3B", "2.7B", "13B"):
        rows = [records.row(name, work="decode", size=size, form=form, batch=1) for form in FORMS]
        ms = [row["ms_per_token"]["median"] for row in rows]
        packed, plus = rows[0], rows[2]
        rate = plus["weights_gb"] / ms[2]
        lines.append(
            f"| {size} | {packed['peak_gb']:.2f} | {plus['peak_gb']:.2f} | "
            f"{' | '.join(f'{x:.3f}' for x in ms)} | {rate:.2f} |"
        )
        ratios["memory"].append(plus["peak_gb"] / packed["peak_gb"])
        ratios["speed"].append(ms[2] / ms[0])
    memory, speed = ratios["memory"], ratios["speed"]
    assert max(memory) == memory[-1]
    prompts = [
        [
            records.row(name, work="prefill", size=size, form=form)["ms"]
            for size in ("370M", "1.3B", "2.7B")
        ]
        for form in ("packed", "transformer-bf16")
    ]
    ours, theirs = (" {:.1f}, {:.1f} and {:.1f}".format(*(x["median"] for x in p)) for p in prompts)
    few = [
        row["ms_per_token"]["median"] for row in records[name]["rows"] if row["size"] == "1.3B"
        and (row["work"], row["form"]) == ("decode", "packed")
    ]  # fmt: skip
    lines += [
        f"takes {memory[0]:.1f} (370M) to {memory[-1]:.1f} times (13B) less memory and "
        f"{min(speed):.1f} to {max(speed):.1f} times less time a token",
        f"took{ours} ms packed",
        "spread to {:.0f}, {:.0f} and {:.0f})".format(*(x["max"] for x in prompts[0])),
        f"and{theirs} for Transformer++",
        "1.3B as it is chosen now: {:.3f}, {:.3f}, {:.3f} and {:.3f} ms".format(*few[1:]),
        records[name]["commands"][0],
    ]
    compare("docs/inference.md", lines)


def test_prompts_by_cudnn(records, compare):
    name, sizes = "h200/infer.json", ("370M", "1.3B", "2.7B")
    record = records[name]["later"]
    assert record["date"] == "2026-11-28"

    def rows(form, **wanted):
        wanted = {"work": "prefill", "tokens": 2048, "form": form, **wanted}
        return [records.row(name, size=size, **wanted) for size in sizes]

    def three(values, digits):
        return "{}, {} and {}".format(*(f"{value:.{digits}f}" for value in values))

    now = rows("transformer-bf16", commit=record["commit"])
    then, packed = rows("transformer-bf16"), rows("packed")
    assert {row["repeats"] for row in now} == {5}
    ms, ms_then, ms_packed = ([r["ms"]["median"] for r in found] for found in (now, then, packed))
    token = {"work": "decode", "size": "370M", "form": "transformer-bf16"}
    peaks = [
        records.row(name, **token, **of)["peak_gb"] for of in ({"commit": record["commit"]}, {})
    ]
    lines = [
        f"now, in {three(ms, 1)} ms "
        f"({three([a / b for a, b in zip(ms_then, ms, strict=True)], 1)} times as fast",
        f"commit {record['commit']}, {record['date']}, on such a host again",
        f"take {three([a / b for a, b in zip(ms_packed, ms, strict=True)], 2)} of that",
        record["command"],
        f"Their peaks were {three([row['peak_gb'] for row in now], 2)} GB, where they had been "
        f"{three([row['peak_gb'] for row in then], 2)}.",
        "had {:.2f} GB in place of {:.2f}".format(*peaks),
    ]
    compare("docs/inference.md", lines)


def test_dense_decoding_under_flags_of_cuda_graphs(records, compare):
    rows = records["h200/decode_flags.json"]["rows"]
    lines, ms = [], {}
    for flag in dict.fromkeys(row["XLA_FLAGS"] for row in rows):
        both = [records.row("h200/decode_flags.json", XLA_FLAGS=flag, form=f) for f in FORMS[:0:-1]]
        label = f"`{flag}`" if flag else "none"
        if any("failed" in row for row in both):
            lines.append(f"| {label} | unknown to jaxlib 0.11.2, which ends the process | |")
            continue
        ms[label] = [row["ms_per_token"]["median"] for row in both]
        lines.append(f"| {label} | {' | '.join(f'{x:.3f}' for x in ms[label])} |")
    plain = ms["none"]
    regions = ms["`--xla_gpu_graph_enable_concurrent_region=true`"]
    before = [decode(records, "1.3B", form, name="h200/infer.json") for form in FORMS[:0:-1]]
    lines += [
        f"took {1 - regions[0] / plain[0]:.1%} less for Transformer++ and "
        f"{regions[1] / plain[1] - 1:.1%} more for MatMul-free",
        "differ by {:.1%} and {:.1%} without a flag".format(
            *(b / a - 1 for a, b in zip(before, plain, strict=True))
        ),
    ]
    compare("docs/inference.md", lines)


def test_the_papers_lengths(records, compare):
    def cell(work, tokens, form, **of):
        named = {"generate": {"work": "decode", "context": tokens},
                 "read": {"work": "prefill", "tokens": tokens}}[work]  # fmt: skip
        try:
            row = records.row("h200/paper.json", form=form, **named, **of)
        except LookupError:
            return "-", None
        rate = row.get("tokens_per_s") or 1e3 * tokens / row["ms"]["median"]
        return f"{rate:,.0f}, {row['energy']['mj_per_token']:,.1f} mJ", row["peak_gb"]

    lines = []
    for work in ("generate", "read"):
        for tokens in (500, 1000, 4000, 8000, 16000):
            cells = [
                cell(work, tokens, form)[0] for form in ("packed", "transformer-bf16", "hf-llama")
            ]
            lines.append(f"| {work} | {tokens:,} | {' | '.join(cells)} |")
    lines.append(f"({cell('read', 16000, 'transformer-bf16')[1]:.1f} GB at 16,000)")
    compare("docs/inference.md", lines)
    later = records["h200/paper.json"]["later"]
    lines = [f"commit {later['commit']}, `{later['command']}`"]
    for work, tokens in (("generate", 500), ("read", 500), ("read", 1000)):
        cells = [
            cell(work, tokens, form, commit=later["commit"])[0]
            for form in ("packed", "transformer-bf16", "hf-llama")
        ]
        lines.append(f"| {work} | {tokens:,} | {' | '.join(cells)} |")
    compare("docs/inference.md", lines)


def test_the_papers_lengths_by_cudnn(records, compare):
    def ms(tokens, form="transformer-bf16", **of):
        wanted = {"work": "prefill", "tokens": tokens, "form": form, **of}
        return records.row("h200/paper.json", **wanted)["ms"]

    of = {"commit": records["h200/paper.json"]["later"]["commit"]}
    packed, now, before = ms(1000, "packed", **of), ms(500, **of), ms(500)
    assert ms(1000, **of)["median"] < packed["median"]
    lines = [
        f"reads {ms(1000)['median'] / ms(1000, **of)['median']:.2f} times as fast as before",
        f"spread from {packed['min']:.1f} to {packed['max']:.1f} ms",
        f"at 500 it took {now['min']:.1f} to {now['max']:.1f} ms, {before['min']:.1f} to "
        f"{before['max']:.1f} before",
    ]
    compare("docs/inference.md", lines)


def _rate_of_the_largest(records):
    row = records.row(RECORD, work="decode", size="13B", form="transformer-bf16", batch=1)
    weights, ms = row["weights_gb"], row["ms_per_token"]["median"]
    return f"13B's {weights:.2f} GB of weights in {ms:.2f} ms are {weights / ms:.2f} TB/s"


def test_other_work(records, compare):
    many = records.row(RECORD, size="2.7B", batch=128)
    one, batch = energy(records, 1), energy(records, 64)
    lines = [
        f"| decode, 2.7B, batch 128 | {many['tokens_per_s']:,.0f} tokens/s "
        f"({many['ms_per_token']['median']:.2f} ms a step) | 40,000 |",
        f"| energy a token, 370M, batch 1, NVML's counter over {one['seconds']:.0f} s "
        f"| {one['mj_per_token']:.1f} mJ | 71 |",
        f"| energy a token, 370M, batch 64, likewise | {batch['mj_per_token']:.1f} mJ | 10 |",
        f"| prefill of 2048 tokens, 2.7B | {prompt(records, '2.7B'):.1f} ms (13.3",
        f"| prefill of 2048 tokens, 370M and 1.3B | {prompt(records, '370M'):.1f} and "
        f"{prompt(records, '1.3B'):.1f} ms | - |",
    ]
    compare("docs/inference.md", lines)


def test_small_models_and_batches(records, compare):
    widths = {
        "rung-7M": "256 (8 layers, rung-7M)",
        "rung-18M": "384 (10 layers, rung-18M)",
        "rung-41M": "512 (12 layers, rung-41M)",
        "rung-61M": "640 (12 layers, rung-61M)",
    }
    lines = []
    for size, label in widths.items():
        cells = [times(decode(records, size, form, name=SMALL)) for form in FORMS]
        lines.append(f"| {label} | 1 | {' | '.join(cells)} |")
    for label, size, batch, measured in (
        ("512", "rung-41M", 8, FORMS),
        ("512", "rung-41M", 64, FORMS),
        ("1024 (370M)", "370M", 8, FORMS),
        ("1024", "370M", 64, FORMS[::2]),
        ("2048 (1.3B)", "1.3B", 8, FORMS[::2]),
        ("2048", "1.3B", 64, FORMS[::2]),
    ):
        cells = [
            times(decode(records, size, form, batch, BATCHES)) if form in measured else "-"
            for form in FORMS
        ]
        lines.append(f"| {label} | {batch} | {' | '.join(cells)} |")
    rung, small, large = (
        {form: prompt(records, size, form) for form in FORMS if (size, form) != ("2.7B", FORMS[1])}
        for size in ("rung-41M", "370M", "2.7B")
    )
    lines += [
        f"| prompt of 2048, 512 | 1 | {' | '.join(f'{rung[form]:.2f}' for form in FORMS)} |",
        f"| prompt of 2048, 1024 | 1 | {small['packed']:.1f} | {small['matmulfree-bf16']:.2f} | "
        f"{small['transformer-bf16']:.2f} |",
        f"| prompt of 2048, 2560 (2.7B) | 1 | {large['packed']:.1f} | - | "
        f"{large['transformer-bf16']:.1f} |",
        f"(370M: {decode(records, '370M', 'packed'):.3f} and "
        f"{decode(records, '370M', 'packed', 2, BATCHES):.3f} ms)",
    ]
    compare("docs/inference.md", lines)


def test_beside_other_hardware(records, compare):
    lines = []
    for batch in (1, 64):
        found = records.row(RECORD, size="370M", batch=batch)
        lines.append(
            f"370M on an H100, this repository, batch {batch}, head included | "
            f"{found['tokens_per_s']:,.0f} | {found['energy']['mj_per_token']:.1f} | "
        )
    compare("docs/hardware.md", lines)


def test_few_rows(records, compare):
    """The least of each cell is bold; rows in turn take a multiple of one row's time."""

    def cell(size, rows):
        one, layers, cores = (
            records.row("h100/few_rows.json", size=size, rows=count, form=form)["ms_per_token"]
            for count, form in (
                (1, "one kernel"), (rows, "four kernels a layer"), (rows, "tensor cores"),
            )
        )  # fmt: skip
        times = (rows * one, layers, cores)
        return " / ".join(f"**{x:.3f}**" if x == min(times) else f"{x:.3f}" for x in times)

    sizes = ("370M", "1.3B", "2.7B")
    lines = [f"| {n} | {' | '.join(cell(size, n) for size in sizes)} |" for n in (2, 3, 4)]
    compare("docs/inference.md", lines)


def test_before_and_after(records, compare):
    def medians(task):
        row = records.row("h100/before_after.json", task=task)
        return [f"{statistics.median(row[when]):.3f}" for when in ("before_ms", "after_ms")]

    again = [
        f"{statistics.median(row['ms_per_token']):.3f}"
        for row in records["h200/decode_before_after.json"]["rows"]
    ]
    lines = ["{} ms before the rooms moved, {} now".format(*again)]
    for rows, place in ((1, "370M"), (1, "1.3B"), (1, "2.7B")):
        before, after = medians(f"decode-{place}-{rows}")
        ms = " ms" if place == "370M" else ""
        lines.append(f"{before}{ms} became {after} at {place}")
    for task, text in (("370M-2", "two rows at 370M became"), ("1.3B-3", "three at 1.3B")):
        before, after = medians(f"decode-{task}")
        lines.append(f"{text} {after} from {before}")
    compare("docs/inference.md", lines)


def test_packed_forms(records, compare, fixed):
    def row(**wanted):
        return records.row("h100/packing.json", **wanted)

    def kept(form, program, dtypes="trained"):
        return row(work="form", dtypes=dtypes, program=program, form=form)["kept"]

    lines = []
    for form, name in (
        ("float32", "float32"),
        ("bfloat16", "bfloat16 (the default)"),
        ("int8", "int8"),
        ("bfloat16 norms", "bfloat16, norms too (earlier versions)"),
    ):
        size = error = ""
        if form != "bfloat16 norms":
            pack = row(work="pack", form=form)
            size = f" {pack['bytes'] / 1e6:.1f} "
            error = f" {pack['embedding_error']:.1e} ".replace("e-0", "e-").replace("0.0e+00", "0")
        time = row(work="time", dtypes="trained", form=form)["ms_per_token"]["median"]
        cells = [str(kept(form, "xla")), str(kept(form, "packed")), fixed(time, 3)]
        lines.append(f"| {name} |{size or ' '}|{error or ' '}| {' | '.join(cells)} |")
    programs = {
        dtypes: row(work="program", dtypes=dtypes, program="packed")["kept"]
        for dtypes in ("trained", "float32", "float32-between")
    }
    logits = row(work="logits", dtypes="trained", program="packed", form="trained")
    summary = records["h100/packing.json"]["training"]["summary"]
    assert summary["status"] == "complete"
    lines += [
        f"trained on {summary['tokens'] / 1e6:.1f}M tokens",
        f"held-out loss {summary['eval_loss']:.3f}",
        f"these keep {programs['trained']} of the 64 texts",
        f"KL divergence of {logits['kl_nats']:.1e} nats".replace("e-0", "e-"),
        f"({logits['loss']:.3f})",
        f"does not end this ({programs['float32']} of 64)",
        f"a bfloat16 stream ({programs['float32-between']} of 64)",
    ]
    compare("docs/inference.md", lines)
