"""Data sets in buckets: what is read of them is what is read of their folders."""

import itertools
import re
import shutil
import threading

import numpy as np
import pytest
from bucket_files import do_not_wait, put_folder, wait_for
from faulty_proxy import Fault

from mmfree_jax.cli.main import main
from mmfree_jax.config import DataConfig
from mmfree_jax.data import fetch_ahead, pipeline, writer
from mmfree_jax.data.dataset import HELDOUT, open_dataset
from mmfree_jax.data.dataset_index import load_index
from mmfree_jax.data.tokenizer import ByteTokenizer, identity
from mmfree_jax.data.verification import Verification
from mmfree_jax.errors import DataError, OutputError, StorageError

READ = r"^GET /(download/\S*/)?bucket-\d+/.*"
"""Reading an object's bytes, as either store is asked for them."""
READS = rf"{READ}\.tokens"
SHARD = 4096
"""Tokens of a shard."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three shards of training data and one held out, with a tokenizer."""
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 256, rng.integers(5, 300)) for _ in range(72)]
    splits = {"train": documents, "heldout": documents[:8]}
    tokenizer = ByteTokenizer()
    path = tmp_path_factory.mktemp("data") / "bytes"
    index = writer.write_dataset(
        path, splits, identity(tokenizer), shard_tokens=SHARD, save_tokenizer=tokenizer.save
    )
    assert len(index.splits["train"]) == 3
    return path


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where copies are kept."""
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    do_not_wait(monkeypatch)
    yield tmp_path / "cache"
    for thread in threading.enumerate():
        if thread.name == "fetch ahead":
            thread.join(60)  # while the server is still to be found


@pytest.fixture
def url(folder, bucket, cache):
    """The data set in a bucket, below a name that needs care."""
    where = put_folder(folder, f"{bucket.url}/a b/100%20 é")
    bucket.proxy.clear()
    return where


def _batches(config, count=12):
    batches = pipeline.make_train_iterator(config, batch_size=4)
    try:
        return [next(batches) for _ in range(count)]
    finally:
        batches.close()


def _reads(bucket):
    """Requests for the bytes of shards of this bucket."""
    return bucket.proxy.requests(rf"^GET /(download/\S*/)?{bucket.url[5:]}/.*\.tokens")


def _all_tokens(dataset):
    return dataset.tokens(0, dataset.num_tokens)


def _same(one, other):
    for a, b in zip(one, other, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def _gib(size):
    return size / 2**30


def _shard_size(folder):
    return max(
        (folder / f"train-0000{i}.tokens").stat().st_size
        + (folder / f"train-0000{i}.documents").stat().st_size
        for i in range(3)
    )


@pytest.mark.parametrize("shards", [1.2, 2.5, 100])
def test_rows_are_those_of_the_folder_whatever_the_cache_holds(folder, url, bucket, cache, shards):
    config = DataConfig(paths=(str(folder),), seq_len=64)
    limit = shards * _shard_size(folder)
    remote = DataConfig(paths=(url,), seq_len=64, cache_gib=_gib(limit))
    _same(_batches(remote), _batches(config))
    kept = sum(file.stat().st_size for file in cache.glob("*/*"))
    assert kept <= limit
    if shards == 100:
        assert len(_reads(bucket)) == 3
        _same(_batches(remote), _batches(config))
        assert len(_reads(bucket)) == 3


def test_a_bucket_and_a_folder_may_be_mixed(folder, url):
    apart = DataConfig(paths=(str(folder), str(folder)), weights=(1.0, 3.0), seq_len=64)
    mixed = DataConfig(paths=(url, str(folder)), weights=(1.0, 3.0), seq_len=64)
    _same(_batches(mixed, 3), _batches(apart, 3))
    one, other = (pipeline.make_eval_batches(c, batch_size=2) for c in (apart, mixed))
    _same(list(one), list(other))
    assert other.bytes_per_token == one.bytes_per_token


def test_documents_and_fingerprints_are_those_of_the_folder(folder, url):
    here, there = open_dataset(folder, HELDOUT), open_dataset(url, HELDOUT)
    assert there.fingerprint == here.fingerprint
    assert str(there.path) == url
    for i in range(here.num_documents):
        np.testing.assert_array_equal(there.document(i), here.document(i))
    Verification([there]).start()  # has nothing to do, and no folder to do it in


@pytest.mark.parametrize(
    "fault",
    [
        Fault(rf"{READ}train-00001\.tokens", 1, status=503),
        Fault(rf"{READ}train-00001\.tokens", 1, keep=100),
        Fault(rf"{READ}train-00001\.tokens", 1, lost=True),
        Fault(rf"{READ}train-00001\.tokens", 1, flip=17),
        Fault(rf"{READ}train-00001\.documents", 1, flip=2),
    ],
    ids=["503", "short", "lost", "changed", "changed ends"],
)
def test_what_arrives_otherwise_is_fetched_again(folder, url, bucket, fault):
    bucket.proxy.add(fault)
    there, here = open_dataset(url), open_dataset(folder)
    np.testing.assert_array_equal(_all_tokens(there), _all_tokens(here))
    assert len(bucket.proxy.requests(fault.match)) == 2


def test_a_shard_that_is_damaged_where_it_lies_is_never_used(url, bucket, cache):
    bucket.proxy.add(Fault(rf"{READ}train-00001\.tokens", flip=9))
    # The client of S3 compares with what the store keeps; of GCS's, we compare with the index.
    wanted = r"train-00001\.tokens (is damaged: its checksum|cannot be read.*Expected checksum)"
    with pytest.raises((DataError, StorageError), match=wanted):
        _all_tokens(open_dataset(url))
    assert len([p for p in cache.iterdir() if p.is_dir()]) == 1


def test_a_read_that_keeps_failing_names_object_and_try(url, bucket):
    bucket.proxy.add(Fault(rf"{READ}train-00002\.tokens", status=500))
    wanted = r"100%20 é/train-00002\.tokens cannot be read: try 3 of 3 failed"
    config = DataConfig(paths=(url,), seq_len=64, prefetch=0)
    with pytest.raises(StorageError, match=wanted):
        _batches(config)


@pytest.mark.parametrize("status", [403, 404])
def test_a_bucket_that_vanishes_or_refuses_while_it_is_read(url, bucket, status, folder):
    there = open_dataset(url)
    bucket.proxy.add(Fault("", status=status))
    wanted = "permission denied" if status == 403 else "does not exist"
    with pytest.raises(StorageError, match=rf"train-00000\.tokens.*{wanted}"):
        there.tokens(0, 10)
    bucket.proxy.clear()
    np.testing.assert_array_equal(there.tokens(0, 10), open_dataset(folder).tokens(0, 10))


def test_a_cache_that_holds_no_shard_is_refused_before_anything_is_read(url):
    config = DataConfig(paths=(url,), seq_len=64, cache_gib=_gib(1000))
    with pytest.raises(OutputError, match=r"train-00000 takes .*: set data\.cache_gib to more"):
        pipeline.open_mixture(config)


def test_readers_at_once_share_one_copy(folder, url, bucket):
    there, here = open_dataset(url), open_dataset(folder)
    wanted, found = _all_tokens(here), []
    readers = [threading.Thread(target=lambda: found.append(_all_tokens(there))) for _ in range(6)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join()
    assert len(found) == 6
    for tokens in found:
        np.testing.assert_array_equal(tokens, wanted)
    assert len(_reads(bucket)) == 3


def test_shards_are_fetched_ahead_in_the_order_of_training(folder, url, bucket, monkeypatch):
    monkeypatch.setattr(fetch_ahead, "AT_ONCE", 1)
    config = DataConfig(paths=(url,), seq_len=64, prefetch=1)
    local = pipeline.make_train_iterator(DataConfig(paths=(str(folder),), seq_len=64), batch_size=1)
    tokens = _all_tokens(open_dataset(folder))
    first = next(local)["tokens"][0]
    local.close()
    at = next(r for r in itertools.count() if (tokens[64 * r : 64 * r + 64] == first).all())
    bucket.proxy.add(Fault(READS, times=1), Fault(READS, hang=True))
    batches = pipeline.make_train_iterator(config, batch_size=1)
    try:
        wait_for(lambda: len(_reads(bucket)) == 2)  # though no batch was asked for
        asked = _reads(bucket)
        assert f"train-0000{64 * at // SHARD}.tokens" in asked[0]
    finally:
        bucket.proxy.clear()
        batches.close()


def test_a_prefix_without_an_index_or_with_nothing_is_one_line(url, bucket, folder, tmp_path):
    half = tmp_path / "half"
    shutil.copytree(folder, half)
    (half / "index.json").unlink()
    put_folder(half, f"{bucket.url}/half")
    for place, wanted in (
        (f"{bucket.url}/half", r"has no index\.json, so it is unfinished or not a prepared"),
        (f"{bucket.url}/none", "does not exist: nothing in the bucket begins so"),
        (f"{url}/train-00000.tokens", "is an object, not a folder"),
        (bucket.url + "0", "there is no bucket"),
    ):
        with pytest.raises((DataError, StorageError), match=wanted):
            load_index(place)


def test_a_data_set_in_a_bucket_is_shown_and_verified(url, bucket, capsys):
    assert main(["data", "inspect", url, "--verify"]) == 0
    said = capsys.readouterr().out
    assert url in said
    assert "checksums: all shards are as they were written" in said
    bucket.proxy.add(Fault(rf"{READ}train-00001\.documents", flip=3))
    assert main(["data", "inspect", url, "--verify", "--samples", "0"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert re.search(r"train-00001\.documents(: checksum differs|.*Expected checksum)", error)
