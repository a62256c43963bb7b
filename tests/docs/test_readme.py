"""The README says nothing that is not held: figures by records, other numbers by the code.

Its links, paths and commands are tried with those of the other documents (test_references.py,
test_commands.py); what an index shows of it, by tests/test_wheel.py.
"""

import csv
import json
import re
import tomllib
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax import LanguageModel, TrainConfig, preset, save_pretrained
from mmfree_jax.cli.pack import PackConfig
from mmfree_jax.config_io import from_dict, read_yaml
from mmfree_jax.experiments.scaling import read_runs
from mmfree_jax.experiments.scaling.gap import pair, trend
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
from mmfree_jax.train.flops import count_parameters

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("matmulfree", "transformer")


@pytest.fixture(scope="module")
def readme():
    return (ROOT / "README.md").read_text(encoding="utf-8")


def decoding(records):
    """Rows of a token at batch 1."""
    for size, start in (
        ("370M", "370M, a token at batch 1, NVIDIA H200"),
        ("13B", "13B, likewise"),
    ):
        ours, plus = (
            records.row("h200/infer.json", work="decode", size=size, form=form, batch=1)
            for form in ("packed", "transformer-bf16")
        )
        notes = (" (packed, 2 bits)", " (bfloat16)") if size == "370M" else ("", "")
        cells = [
            f"{row['ms_per_token']['median']:.{digits}f} ms, {row['peak_gb']:.2f} GB{note}"
            for row, digits, note in zip((ours, plus), (3, 2), notes, strict=True)
        ]
        command = next(c for c in records["h200/infer.json"]["commands"] if size in c)
        assert all(form in command for form in ("packed", "transformer-bf16"))  # one run
        yield f"| {start} | {' | '.join(cells)} |"


def exports(records):
    """Rows of a token on a CPU."""
    command = records["edge/edge.json"]["command"]
    assert "onnx-fast,llama-q4_0" in command  # one run
    for context, start in (
        (32, "370M, two CPU cores, 32 tokens of context"),
        (16384, "the same, 16,384 tokens of context"),
    ):
        cells = []
        for form, note in (("onnx-fast", "ONNX"), ("llama-q4_0", "llama.cpp, Q4_0")):
            row = records.row(
                "edge/edge.json", work="decode", size="370M", form=form, context=context
            )
            note = f" ({note})" if context == 32 else ""
            rate, memory = row["tokens_per_s"]["median"], row["peak_mb"] / 1e3
            cells.append(f"{rate:.0f} tokens/s, {memory:.2f} GB{note}")
        yield f"| {start} | {' | '.join(cells)} |"


def serving(records):
    record, cells = records["serve/llama_cpp.json"], []
    assert record["threads"] == record["cores"] == 2
    for model, note in (
        ("MatMul-free, packed", ""), ("Transformer++, Q4_0", " (llama.cpp, Q4_0)"),
    ):  # fmt: skip
        rows = [row for row in record["rows"] if row["model"] == model]
        rate = next(
            r["tokens_per_s"] for r in rows if (r["prompt_tokens"], r["streams"]) == (128, 16)
        )
        memory = next(r["peak_bytes"] for r in rows if r["prompt_tokens"] == 1024)
        cells.append(f"{rate:.1f} tokens/s, {memory / 1e9:.2f} GB{note}")
    yield f"| 370M, served to 16 clients, two CPU cores | {' | '.join(cells)} |"


def study(records):
    """Rows of losses, and what was found of their difference."""
    table = records.folder / "study" / "best.csv"
    with open(table, newline="", encoding="utf-8") as stream:
        runs = list(csv.DictReader(stream))
    ratio: dict[str, float] = {}
    for size in ("61M", "1M"):
        cells = []
        for family in FAMILIES:
            (run,) = (
                run
                for run in runs
                if (run["family"], run["size"]) == (family, f"rung-{size}")
                and round(float(run["tokens"]) / 1e6) == 24
            )
            cells.append(f"{float(run['loss']):.3f} nats")
            ratio[size] = float(run["tokens"]) / float(run["params_non_embedding"])
        yield f"| held-out loss, {size} parameters, 24M tokens | {' | '.join(cells)} |"
    longer = records["h200/trained_61M.json"]["runs"]
    assert {run["summary"]["tokens"] for run in longer} == {704_512_000}
    best = [
        min(run["summary"]["eval_loss"] for run in longer if run["run"] == name)
        for name in ("61M", "61M-transformer")
    ]
    cells = " | ".join(f"{loss:.3f} nats" for loss in best)
    yield f"| held-out loss, 61M parameters, 705M tokens of other text | {cells} |"
    late = [read_runs([table], where=[f"family = {family}"]) for family in FAMILIES]
    both = trend(pair(*(frame.take(frame.tokens >= 1e7) for frame in late))).per_both
    assert both > 0
    yield f"{ratio['61M']:.1f} tokens a parameter at 61M and {ratio['1M']:.0f} at 1M"
    yield f"the Transformer++ gains: by {both:.2f} nats a decade of both"


def training(records):
    steps = re.findall(
        r"^matmulfree \S+, 8 x 2048 tokens on 1 x NVIDIA H100 .*, ([\d,]+) tokens/s, "
        r".* peak ([\d.]+) GiB",
        records.text("h100/train.txt"),
        re.M,
    )
    (small, small_gib), (large, large_gib) = (
        (float(rate.replace(",", "")) / 1e3, gib) for rate, gib in steps
    )
    yield (
        f"One H100 trains 370M at {small:.1f}k tokens/s in {small_gib} GiB and 1.3B at "
        f"{large:.1f}k in {large_gib} GiB"
    )


def laptop(records, fixed):
    config = from_dict(TrainConfig, read_yaml(records.folder / "laptop" / "config.yaml"))
    history = [json.loads(line) for line in records.text("laptop/metrics.jsonl").splitlines()]
    held_out = [record for record in history if record["kind"] == "eval"][-1]
    sample = [record for record in history if record["kind"] == "sample"][-1]["text"]
    yield f"{count_parameters(config.model).total / 1e6:.1f}M parameters on two CPU cores"
    yield (
        f"held-out loss {fixed(held_out['loss'], 2)} nats a token, "
        f"{fixed(held_out['bits_per_byte'], 2)} bits a byte"
    )
    yield f"> {sample.partition(chr(10))[0]}"
    yield f"the run was allowed {config.max_minutes:.0f} minutes"


def facts(records):
    """What has numbers and no measurement."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    yield f"Python {project['requires-python'].removeprefix('>=')} or newer"
    yield from (f"`{text}`" for text in ("pip install -e '.[cuda12]'", "cuda13", "tpu"))
    assert {"cuda12", "cuda13", "tpu"} <= set(extras)
    values = np.unique(ternarize(jax.random.normal(jax.random.key(0), (8, 64)))[0])
    assert values.tolist() == [-1, 0, 1]
    yield "ternary weights {-1, 0, +1} on int8 activations"
    assert PackConfig.__dataclass_fields__["bits"].type.__args__ == ("2", "1.6")
    yield "packed models of 2 and 1.6 bits a weight"
    sizes = [count_parameters(preset(f"rung-{size}").model).non_embedding for size in ("1M", "61M")]
    with open(records.folder / "study" / "best.csv", newline="", encoding="utf-8") as stream:
        trained = [float(run["params_non_embedding"]) for run in csv.DictReader(stream)]
    assert [round(size / 1e6) for size in sizes] == [1, 61]
    assert [round(size / 1e6) for size in (min(trained), max(trained))] == [1, 61]
    yield "a study at 1M to 61M parameters"
    yield "The largest model trained here has 61M parameters without embedding and head"
    counts = {
        row["devices"]
        for name in ("scaling", "exchange")
        for row in records[f"h100/{name}.json"]["records"]
    }
    assert counts == {1, 2, 4}
    yield "measured on one, two and four GPUs"
    yield "[arXiv 2406.02528](https://arxiv.org/abs/2406.02528)"
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")
    yield "Apache-2.0"


def held(records, fixed):
    sources = (decoding, exports, serving, study, training, facts)
    return [line for source in sources for line in source(records)] + [*laptop(records, fixed)]


def test_every_number_is_held(records, fixed, compare, readme):
    lines = held(records, fixed)
    compare("README.md", lines)
    text = re.sub(r"^```.*?^```", "", readme, flags=re.M | re.S)
    for line in sorted(lines, key=len, reverse=True):
        text = text.replace(line, "")
    text = re.sub(r"\]\([^)]*\)", "", text)  # where links lead
    text = text.replace("bfloat16 side", "")
    assert re.findall(r".{0,30}\d.*", text) == []


def test_the_comment_on_make_train_is_its_configuration(readme):
    assert "for ten minutes at most on two CPU cores" in readme
    assert read_yaml(ROOT / "experiments" / "configs" / "laptop.yaml")["max_minutes"] == 10


def test_it_stays_short(readme):
    assert len(readme.splitlines()) <= 70
    assert len(re.findall(r"^\|---", readme, re.M)) == 1  # a table


def test_the_library_as_shown_writes(readme, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = LanguageModel(preset("tiny").model)
    params = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "byte.json").write_text("{}")
    save_pretrained("runs/laptop", model, params, tokenizer="words")
    (code,) = re.findall(r"^```python\n(.*?)^```", readme, re.M | re.S)
    assert "max_new_tokens=40" in code
    exec(compile(code.replace("=40", "=4"), "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()
