"""Documented figures of the published model are those of its results.json."""

FOLDER = "models/61M"


def number(records, name, of="61M"):
    found = [n for n in records[f"{FOLDER}/results.json"]["numbers"] if n["name"] == name]
    (wanted,) = (n for n in found if n["of"] == of)
    return wanted


def agreement(records, form):
    """Cells of a form's row: texts kept, KL, likeliest tokens, perplexities."""

    def value(key):
        return number(records, f"agreement/{form}/{key}")["value"]

    prompts = number(records, f"agreement/{form}/streams of float32/kept")["rests"]["prompts"]
    return [
        *(f"{value(f'streams of {of}/kept'):.0f} of {prompts}" for of in ("float32", "trained")),
        f"{value('kl_nats'):.1e}".replace("e-0", "e-"),
        f"{value('same_top_1'):.2%}",
        f"{value('perplexity_of_float32'):.3f} -> {value('perplexity'):.3f}",
    ]


def test_programs_of_decoding(records, compare):
    rows = {
        "trained": "packed when it is opened, training's dtypes",
        "packed": "the packed file, training's dtypes",
        "packed-float32": "the packed file in float32 by XLA",
    }
    lines = [
        f"| {label} | {' | '.join(agreement(records, form))} |" for form, label in rows.items()
    ]
    tokens = number(records, "agreement/packed/kl_nats")["rests"]["tokens"]
    lines.append(f"the predictions of {tokens:,} tokens")
    compare("docs/inference.md", lines)


def test_programs_of_exports(records, compare):
    (exact, _, *exact_logits), (fast, _, *fast_logits) = (
        agreement(records, f"onnx-{grade}") for grade in ("exact", "fast")
    )
    labels = ("KL from the model in float32, nats", "same likeliest token", "perplexity")
    lines = [
        f"{label} | {' | '.join(cells)} |"  # the other rows are no figures
        for label, *cells in zip(labels, exact_logits, fast_logits, strict=True)
    ]
    kept = f"| {exact} | {fast} |"
    lines.append(f"texts of 200 greedy tokens that are those of float32 {kept}")
    largest = number(records, "agreement/onnx-exact/largest_difference")["value"]
    lines.append(f"logits move by up to {largest:.1f}")
    compare("docs/edge.md", lines)
    kept, _, kl, same, perplexity = agreement(records, "transformers")
    lines = [f"is the same in {same} of places"]
    lines.append(
        f"divergence {kl} nats, the perplexity {perplexity}, and {kept} greedy texts of 200"
    )
    compare("docs/interop.md", lines)


def test_tasks(records, compare):
    tasks = ("arc_easy", "arc_challenge", "hellaswag", "openbookqa", "piqa", "winogrande")
    lines = ["| chance | 25 | 25 | 25 | 25 | 50 | 50 |"]
    for of, label in (("61M", "MatMul-free"), ("61M-transformer", "Transformer++")):
        for metric in ("acc", "acc_norm"):
            scored = tasks if metric == "acc" else tasks[:-1]
            found = [number(records, f"tasks/{task}/{metric}", of) for task in scored]
            cells = [f"{n['value']:.1f} ± {n['high'] - n['value']:.1f}" for n in found]
            cells += [""] * (len(tasks) - len(found))
            lines.append(f"| {label}, {metric} | {' | '.join(cells)} |")
    loss = number(records, "held-out loss/classic_books")
    documents, low, high = loss["rests"]["documents"], loss["low"], loss["high"]
    lines += [
        f"{loss['value']:.3f} nats a token (95% over {documents} documents: "
        f"{low:.3f} to {high:.3f})",
        f"{number(records, 'bits a byte/classic_books')['value']:.3f} bits a byte.",
    ]
    compare("docs/evaluation.md", lines)


def test_a_fact_in_a_text(records, compare):
    for depth in ("0", "0.25", "0.5", "0.75", "1"):
        name = f"needle/256 tokens/depth {depth}/chosen"
        ours, twin = number(records, name), number(records, name, "61M-transformer")
        assert ours["low"] < 0.1 < ours["high"]  # one of ten
        assert (twin["value"], twin["rests"]["asked"]) == (1.0, 20)
    late, early = (
        run["summary"]["eval_loss"]
        for wanted in (0.2, 0.6)
        for run in records["h200/trained_61M.json"]["runs"]
        if (run["run"], run["decay_fraction"]) == ("61M-transformer", wanted)
    )
    lines = [f"reached {late:.3f} nats in place of {early:.3f}"]
    compare("docs/published-models.md", ["in each of twenty texts of 256 tokens", *lines])
