"""Data sets prepared into buckets are those prepared on disks, and are gone on with from there."""

import json
import os
import signal
import subprocess
import sys
import tempfile

import pytest
from bucket_files import do_not_wait
from faulty_proxy import Fault
from prepared_data import TEXTS, run, shard_bytes, write_jsonl

from mmfree_jax import leases, storage
from mmfree_jax.cli.main import main
from mmfree_jax.data import dataset, sources
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.errors import DataError, StorageError
from mmfree_jax.leases import InUseElsewhereError
from mmfree_jax.prefixes import names_below
from mmfree_jax.storage import parse_url


@pytest.fixture
def source(tmp_path, monkeypatch):
    do_not_wait(monkeypatch)
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sources, "BATCH_BYTES", 2000)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    return write_jsonl(tmp_path / "texts.jsonl", TEXTS)


def _settings(source):
    return {"input": (source,), "heldout_fraction": 0.3, "shard_tokens": 9000, "workers": 1}


def _prepare(url, source, show=None, **others):
    config = PrepareConfig(out=url, **(_settings(source) | others))
    return prepare_dataset(config, show, commit_bytes=5000)


def _names(url):
    return sorted(names_below(parse_url(url)))


def _there(url):
    return {
        name: storage.read_bytes(parse_url(url) / name)
        for name in _names(url)
        if name.endswith((".tokens", ".documents"))
    }


class _StoppedError(BaseException):
    pass


def _stop_at(moment):
    calls = iter(range(1, 1000))

    def show(_):
        if next(calls) == moment:
            raise _StoppedError

    return show


def test_it_is_the_data_set_of_a_disk(source, bucket, tmp_path, capsys):
    whole = run(tmp_path / "whole", **_settings(source))
    url = f"{bucket.url}/data/a b"
    argv = ["data", "prepare", "--input", source, "--heldout-fraction", "0.3", "--workers", "1"]
    argv += ["--shard-tokens", "9000", "--out", url]
    assert main(argv) == 0
    assert f"data set   {url} (uint16 tokens)" in capsys.readouterr().out
    assert _there(url) == shard_bytes(tmp_path / "whole")
    others = ["index.json", "tokenizer/byte.json"]
    assert _names(url) == sorted([*shard_bytes(tmp_path / "whole"), *others])
    assert dataset.load_index(url).splits == whole.splits
    assert list((tmp_path / "temporary").iterdir()) == []
    assert main(argv) == 0
    assert f"{url} holds this data set already" in capsys.readouterr().out
    with pytest.raises(DataError, match=f"^{url} holds a data set made with seed 0, not 1: use"):
        _prepare(url, source, seed=1)


def test_stopped_and_gone_on_with(source, s3_bucket, tmp_path):
    run(tmp_path / "whole", **_settings(source))
    url = f"{s3_bucket.url}/data"
    for moment in (1, 4, 9, 13):
        with pytest.raises(_StoppedError):
            _prepare(url, source, _stop_at(moment))
        with pytest.raises(DataError, match=f"^data folder {url} has no index.json, so it is unf"):
            dataset.load_index(url)
        assert {".mmfree-uploading.json", "progress.json"} <= set(_names(url))
    journal = json.loads(storage.read_bytes(parse_url(url) / "progress.json"))
    assert len(journal["splits"]["train"]["shards"]) >= 2  # it did get on
    with pytest.raises(DataError, match="holds an unfinished data set made with seed 0, not 1"):
        _prepare(url, source, seed=1)
    s3_bucket.proxy.clear()
    _prepare(url, source)
    assert not s3_bucket.proxy.requests(r"^(PUT|GET) /\S*/train-00000")  # finished long ago
    assert _there(url) == shard_bytes(tmp_path / "whole")
    assert ".mmfree-uploading.json" not in _names(url)


_CHILD = """
import os, signal, sys
from mmfree_jax.data import sources
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
if __name__ == "__main__":
    sources.BATCH_BYTES = 2000
    calls = iter(range(1000))
    def show(progress):
        if next(calls) == 12:
            os.kill(os.getpid(), signal.SIGKILL)
    config = PrepareConfig(out=sys.argv[1], input=(sys.argv[2],), heldout_fraction=0.3,
                           shard_tokens=9000, workers=1)
    prepare_dataset(config, show, commit_bytes=5000)
"""


def test_a_killed_one_is_gone_on_with_when_its_lease_has_run_out(
    source, gcs_bucket, tmp_path, monkeypatch
):
    monkeypatch.setenv(leases.SECONDS, "0.5")
    url = f"{gcs_bucket.url}/data"
    command = [sys.executable, "-c", _CHILD, url, source]
    killed = subprocess.run(command, env=os.environ, capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert {".lease.json", "progress.json", "train-00000.tokens"} <= set(_names(url))
    _prepare(url, source)
    run(tmp_path / "whole", **_settings(source))
    assert _there(url) == shard_bytes(tmp_path / "whole")
    assert not {".lease.json", "progress.json"} & set(_names(url))


@pytest.mark.parametrize("name", ["train-00001.tokens", "tokenizer/byte.json", "index.json"])
def test_an_upload_that_fails_is_gone_on_with(source, s3_bucket, tmp_path, name):
    url = f"{s3_bucket.url}/data"
    s3_bucket.proxy.add(Fault(f"^PUT /[^?]*/data/{name}", status=503))
    with pytest.raises(StorageError, match=rf"^{url}/{name} cannot be written: try 3 of 3 failed"):
        _prepare(url, source)
    s3_bucket.proxy.clear()
    assert "index.json" not in _names(url)
    _prepare(url, source)
    run(tmp_path / "whole", **_settings(source))
    assert _there(url) == shard_bytes(tmp_path / "whole")


def test_a_tokenizer_of_before_anything_was_finished_goes(source, s3_bucket):
    url = f"{s3_bucket.url}/data"
    with pytest.raises(_StoppedError):
        _prepare(url, source, _stop_at(1))
    for name in ("tokenizer/tokenizer.json", "train-00099.tokens"):
        storage.write_bytes(parse_url(url) / name, b"old")
    _prepare(url, source, seed=7)
    assert not {"tokenizer/tokenizer.json", "train-00099.tokens"} & set(_names(url))


def test_what_is_not_prepared_into(source, s3_bucket, monkeypatch):
    url = f"{s3_bucket.url}/data"
    storage.write_bytes(parse_url(f"{s3_bucket.url}/theirs/sub/x"), b"")
    with pytest.raises(DataError, match=r"theirs is not empty \(it holds sub/x\) and not an unf"):
        _prepare(f"{s3_bucket.url}/theirs", source)
    with pytest.raises(StorageError, match="there is no bucket 'nobody-has-this'"):
        _prepare("s3://nobody-has-this/data", source)
    with pytest.raises(_StoppedError):
        _prepare(url, source, _stop_at(9))
    storage.write_bytes(parse_url(f"{url}/train-00000.tokens"), b"damaged")
    with pytest.raises(DataError, match=rf"^{url}/train-00000.tokens is missing or was changed "):
        _prepare(url, source)
    monkeypatch.setenv(leases.SECONDS, "1")

    def meanwhile(_):
        with pytest.raises(InUseElsewhereError, match=f"^data folder {url}/2 is in use by another"):
            _prepare(f"{url}/2", source)
        raise _StoppedError

    with pytest.raises(_StoppedError):
        _prepare(f"{url}/2", source, meanwhile)
