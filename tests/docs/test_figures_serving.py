"""Documented figures of serving are those of serve.json and llama_cpp.json."""


def test_serving(records, compare):
    def row(**wanted):
        return records.row("h100/serve.json", **wanted)

    lines = []
    for streams in (64, 128):
        bare, served = row(work="bare loop", batch=streams), row(work="streams", streams=streams)
        first = f"{served['first_token_p50']:.0f}, {served['first_token_p99']:.0f}"
        each = f"{served['a_token_p50']:.2f}, {served['a_token_p99']:.2f}"
        lines += [
            f"| {streams} | {bare['tokens_per_s']:,.0f} | {served['tokens_per_s']:,.0f} "
            f"| {served['share_of_bare_loop']:.1%} | {first} | {each} |",
            f"{served['whole_tokens_per_s']:,.0f}",
        ]
    half, most = row(work="arrivals", load=0.5), row(work="arrivals", load=0.8)
    lines += [
        f"({half['requests_per_s']:.0f} requests/s) the first token comes after "
        f"{half['first_token_p50']:.0f} ms (p50) and {half['first_token_p99']:.0f} ms (p99)",
        f"({most['requests_per_s']:.0f} requests/s) after {most['first_token_p50']:.0f} and "
        f"{most['first_token_p99']:.0f} ms",
    ]
    cold, warm = (row(work="prefix cache", cache=cache) for cache in (False, True))
    lines.append(f"from {cold['first_token_p50']:.1f} to {warm['first_token_p50']:.1f} ms")
    company = row(work="company")
    lines.append(f"Of {company['streams']} greedy answers of {company['tokens']} tokens, "
                 f"{company['equal']} are the same")  # fmt: skip
    compare("docs/serving.md", lines)


def test_serving_beside_llama_cpp(records, compare):
    def row(model, prompt, streams):
        found = {"model": model, "prompt_tokens": prompt, "streams": streams}
        return records.row("serve/llama_cpp.json", **found)

    lines = []
    for model in ("MatMul-free, packed", "Transformer++, Q4_0", "Transformer++, Q8_0"):
        cells = [
            f"{found['tokens_per_s']:.1f}, {found['first_token_p50'] / 1e3:.2f}"
            for found in (row(model, *of) for of in ((128, 1), (128, 4), (128, 16), (1024, 1)))
        ]
        last = row(model, 1024, 1)
        memory, disk = last["peak_bytes"] / 1e9, last["disk_bytes"] / 1e6
        lines.append(f"| {model} | {' | '.join(cells)} | {memory:.2f} | {disk:.0f} |")
    compare("docs/serving.md", lines)
