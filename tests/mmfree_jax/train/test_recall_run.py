"""A run on recall: resumed to the bit, and scored by the commands; its answers alone count."""

import dataclasses
import json

import numpy as np
import pytest
from prepared_data import run as prepare
from prepared_data import write_jsonl
from tokenizers import Tokenizer
from tokenizers.models import BPE

from mmfree_jax.cli.main import main
from mmfree_jax.config import CheckpointConfig, DataConfig, EvalConfig
from mmfree_jax.saved.history import read_history
from mmfree_jax.train.training import train

PAIRS = 4


@pytest.fixture(scope="module")
def runs(small_run, tmp_path_factory, keep_compiled, share_traces):
    """One run in one session, and one that is stopped and goes on."""
    root = tmp_path_factory.mktemp("recall")
    config = dataclasses.replace(
        small_run,
        steps=6,
        data=DataConfig(paths=(f"mqar:pairs={PAIRS},vocab=256",), seq_len=16),
        checkpoint=CheckpointConfig(every_steps=3),
        eval=EvalConfig(every_steps=0, batches=2, sample_tokens=4),
    )
    whole, parts = (dataclasses.replace(config, run_dir=str(root / n)) for n in ("whole", "parts"))
    with keep_compiled(), pytest.MonkeyPatch.context() as patch:
        share_traces(patch)
        summary = train(whole)
        train(dataclasses.replace(parts, stop_at=3))
        train(parts)
    return summary, root


def test_a_run_on_recall_goes_on_to_the_bit_and_has_no_samples(runs):
    summary, root = runs
    whole, parts = (read_history(root / name / "metrics.jsonl") for name in ("whole", "parts"))
    losses = [[r["loss"] for r in x if r["kind"] == "train"] for x in (whole, parts)]
    assert len(losses[0]) == 6
    assert losses[0] == losses[1]
    assert summary["data"]["paths"] == ["mqar:pairs=4,vocab=256,power=0.01"]
    assert {x["kind"] for x in whole} == {"train", "eval", "goodput"}
    last = [r for r in whole if r["kind"] == "eval"][-1]
    assert last["eval_tokens"] == 2 * 8 * PAIRS
    assert last["bits_per_byte"] is None
    assert np.isclose(last["loss"], np.log(256), atol=1.0)
    assert summary["eval_accuracy"] == last["accuracy"]


def test_other_pairs_are_other_data(runs, capsys):
    _, root = runs
    argv = ["train", "--config", str(root / "whole" / "config.yaml")]
    assert main([*argv, "--data.paths", "mqar:pairs=3,vocab=256"]) == 2
    assert "was trained on other data (['mqar:pairs=4" in capsys.readouterr().err


def test_the_commands_score_a_saved_model(runs, tmp_path, capsys):
    _, root = runs
    run, out = root / "parts", tmp_path / "eval"
    argv = ["--model", str(run), "--output", str(out), "--no-progress"]
    assert main(["eval", "mqar", *argv, "--pairs", "2,4,8", "--rows", "8"]) == 0
    record = json.loads((out / "parts" / "mqar.json").read_text())
    assert [(x["pairs"], x["length"]) for x in record["cells"]] == [(2, 16), (4, 16)]
    assert [x["accuracy"]["asked"] for x in record["cells"]] == [16, 32]
    assert (record["task"], record["model"], record["step"]) == ("mqar", str(run), 6)
    assert (record["vocab"], record["rows"]) == (256, 8)

    text = tmp_path / "text.txt"
    text.write_text("Nothing of note is said here. " * 20)
    needle = ["eval", "needle", *argv, "--text", str(text), "--lengths", "150", "--trials", "2"]
    needle += ["--depths", "0,1", "--candidates", "2"]
    assert main(needle) == 2
    assert "has no tokenizer" in capsys.readouterr().err
    letters = {chr(32 + i): i for i in range(95)}
    (run / "tokenizer").mkdir()
    Tokenizer(BPE(letters, [])).save(str(run / "tokenizer" / "tokenizer.json"))
    assert main(needle) == 0
    record = json.loads((out / "parts" / "needle.json").read_text())
    assert [x["depth"] for x in record["cells"]] == [0.0, 1.0, None]
    assert all(x["chosen"]["asked"] == 2 for x in record["cells"])
    assert (out / "parts" / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert "no fact" in capsys.readouterr().out

    texts = [f"Nothing of note is said in text {i}. " * 20 for i in range(20)]
    source = write_jsonl(tmp_path / "texts.jsonl", texts)
    prepare(tmp_path / "data", input=(source,), heldout_fraction=0.5)
    at = needle.index("--text")
    assert main([*needle[:at], "--data", str(tmp_path / "data"), *needle[at + 2 :]]) == 0
    again = json.loads((out / "parts" / "needle.json").read_text())
    assert again["text"] == str(tmp_path / "data")
    assert again["text_sha256"] != record["text_sha256"]
    assert json.loads((out / "parts" / "needle_1.json").read_text()) == record
    assert (out / "parts" / "needle_1.png").is_file()
    assert (out / "parts" / "needle.png").is_file()

    (out / "parts" / "mqar.json").write_text("mine")
    assert main(["eval", "mqar", *argv]) == 2
    assert (out / "parts" / "mqar.json").read_text() == "mine"
