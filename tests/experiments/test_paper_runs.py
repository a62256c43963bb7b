"""The configs of the paper's runs, the data for them, and the rates of the ladder."""

import csv
import json
import math
import re
import shlex
from pathlib import Path

import pytest
import zstandard

from mmfree_jax.cli.main import main
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.config import tokens_per_step
from mmfree_jax.model.parameters import param_shapes
from mmfree_jax.presets import preset

ROOT = Path(__file__).resolve().parents[2]

# tokens, parameters, rows a step, steps, warm-up, micro-batches, rate
PAPER = {
    "370M": (15e9, 374_108_160, 256, 28_611, 954, 4, 4e-3),
    "1.3B": (100e9, 1_364_779_008, 1024, 47_684, 477, 16, 2.5e-3),
    "2.7B": (100e9, 2_702_357_504, 1024, 47_684, 477, 16, 1.5e-3),
}


@pytest.mark.parametrize("size", PAPER)
def test_a_config_is_the_papers_run(size):
    tokens, parameters, rows, steps, warmup, pieces, rate = PAPER[size]
    path = ROOT / "experiments" / "configs" / f"paper-{size}.yaml"
    config = resolve_config(["--config", str(path), "--data.paths", "data"])
    assert sum(math.prod(x.shape) for x in param_shapes(config.model).values()) == parameters
    assert config.model.family == "matmulfree"
    assert config.model.vocab_size == 32_000
    assert (config.batch_size, config.steps, config.data.seq_len) == (rows, steps, 2048)
    assert 0 <= steps * tokens_per_step(config) - tokens < tokens_per_step(config)
    assert f"x {tokens_per_step(config):,} tokens" in path.read_text()
    assert config.batch_size / config.grad_accum / 8 == 8, "rows on each of 8 GPUs at once"
    assert config.grad_accum == pieces
    optimizer = config.optimizer
    assert (optimizer.learning_rate, optimizer.schedule) == (rate, "paper")
    assert (optimizer.warmup_steps, optimizer.weight_decay, optimizer.clip_norm) == (
        warmup,
        0.01,
        1.0,
    )
    row = f"{steps:,}"
    assert row in (ROOT / "docs" / "paper-runs.md").read_text()


def _commands() -> list[list[str]]:
    text = (ROOT / "docs" / "paper-runs.md").read_text().replace("\\\n", " ")
    return [shlex.split(line) for line in re.findall(r"^mmfree (data prepare .*)$", text, re.M)]


def test_slimpajama_is_prepared_as_documented(tmp_path, monkeypatch, mistral_model):
    files = {
        "train/chunk1": ("train_0", "train_1", "train_20", "train_300"),
        "train/chunk2": ("train_0", "train_1"),
        "train/chunk3": ("train_1",),
        "validation/chunk1": ("holdout_1",),
    }
    for folder, names in files.items():
        place = tmp_path / "SlimPajama-627B" / folder
        place.mkdir(parents=True)
        for name in names:
            records = [{"text": f"{folder} {name} {i}", "meta": {"set": "C4"}} for i in range(4)]
            lines = "".join(f"{json.dumps(record)}\n" for record in records)
            (place / f"example_{name}.jsonl.zst").write_bytes(zstandard.compress(lines.encode()))
    (tmp_path / "mistral").mkdir()
    (tmp_path / "mistral" / "tokenizer.model").symlink_to(mistral_model)
    monkeypatch.chdir(tmp_path)
    documents = []
    for command in _commands():
        at = command.index("--heldout-fraction") + 1
        command[at] = "0.5"  # a few documents have no thousandth
        assert main([*command, "--workers", "1"]) == 0
        index = json.loads(Path(command[-1], "index.json").read_text())
        documents.append(index["source"]["counts"]["documents"])
    assert documents == [4 * 2, 4 * 4 + 4 * 2], "files 1 and 20; chunks 1 and 2"


def test_the_ladder_has_the_studys_rates():
    path = ROOT / "experiments" / "results" / "study" / "rates.csv"
    suffix = {"matmulfree": "", "transformer": "-transformer"}
    for row in csv.DictReader(path.read_text().splitlines()):
        rate = preset(row["size"] + suffix[row["family"]]).optimizer.learning_rate
        assert rate == float(row["learning_rate"]), (row["family"], row["size"])
    # Not in the study: the power law through its sizes whose best rate was inside the list.
    assert preset("rung-41M").optimizer.learning_rate == 1.33e-3
    assert preset("rung-41M-transformer").optimizer.learning_rate == 1.46e-3


def test_the_study_of_gradients_keeps_its_rate():
    config = resolve_config(["--config", str(ROOT / "experiments" / "configs" / "backward8.yaml")])
    recorded = (ROOT / "experiments" / "results" / "backward8" / "bf16-0.yaml").read_text()
    assert f"learning_rate: {config.optimizer.learning_rate}" in recorded
