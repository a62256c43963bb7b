"""Rungs and bare shapes take the vocabulary of their data; what names one keeps it."""

import json

import numpy as np
import pytest

from mmfree_jax.cli.info import info
from mmfree_jax.cli.train import resolve_config
from mmfree_jax.config_io import dump_yaml
from mmfree_jax.data import writer
from mmfree_jax.data.vocabulary import data_vocabulary
from mmfree_jax.errors import DataError


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data") / "bytes"
    identity = {"kind": "byte", "vocab_size": 258, "sha256": "0", "bos_id": 256, "eos_id": 257}
    splits = {s: [np.zeros(100, np.uint16)] for s in ("train", "heldout")}
    writer.write_dataset(folder, splits, identity)
    return str(folder)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("--preset rung-1M", 258),
        ("--preset rung-7M-transformer", 258),
        ("--model.num-layers 2 --model.hidden-size 64", 258),  # a bare shape
        ("--preset rung-1M --model.vocab-size 512", 512),
        ("--preset rung-1M --model.vocab_size=512", 512),
        ("--preset tiny", 264),
        ("--preset small", 4096),
        ("--preset 370M", 32_000),
    ],
)
def test_a_model_without_a_vocabulary_takes_the_datas(flags, expected, data, tmp_path):
    argv = [*flags.split(), "--data.paths", data, "--run-dir", str(tmp_path / "none")]
    assert resolve_config(argv).model.vocab_size == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("preset: rung-1M", 258),
        ("preset: 370M", 32_000),
        ("model: {num_layers: 2}", 258),
        ("model: {vocab-size: 300}", 300),
        ("preset: rung-3M\nmodel: {vocab_size: 300}", 300),
    ],
)
def test_a_config_file_may_name_it(text, expected, data, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text(f"{text}\ndata: {{paths: [{data}]}}\nrun_dir: {tmp_path / 'none'}\n")
    assert resolve_config(["--config", str(path)]).model.vocab_size == expected


def test_a_run_that_has_begun_keeps_its_vocabulary(data, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    argv = ["--preset", "rung-1M", "--data.paths", data, "--run-dir", str(run)]
    old = resolve_config([*argv, "--model.vocab-size", "32000"])
    (run / "config.yaml").write_text(dump_yaml(old))
    assert resolve_config(argv) == old


def test_without_data_nothing_changes(tmp_path):
    argv = ["--preset", "rung-1M", "--run-dir", str(tmp_path / "none")]
    assert resolve_config(argv).model.vocab_size == 32_000
    argv += ["--data.paths", str(tmp_path / "none")]
    assert resolve_config(argv).model.vocab_size == 32_000
    assert data_vocabulary(()) is None


def test_info_counts_the_model_that_train_would_make(data, capsys):
    assert info(["--preset", "rung-1M", "--data.paths", data, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["model"]["vocab_size"] == 258
    assert report["parameters"]["embedding"] == 258 * 128


def test_damaged_data_are_named(data, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    (folder / "index.json").write_text("{")
    with pytest.raises(DataError, match=r"broken/index\.json is damaged"):
        resolve_config(["--preset", "rung-1M", "--data.paths", str(folder)])
