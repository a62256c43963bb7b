"""Prepared data sets and the batches made from them."""

import dataclasses
import itertools
import json
import os
import re
import tracemalloc

import grain
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfree_jax.config import DataConfig
from mmfree_jax.data import dataset as dataset_lib
from mmfree_jax.data import pipeline, writer
from mmfree_jax.data.verification import verify_checksums
from mmfree_jax.errors import ConfigError, DataError

IDENTITY = {"kind": "byte", "vocab_size": 258, "sha256": "x", "bos_id": 256, "eos_id": 257}
T = 16
GOLDEN = {
    (): [[122, 241, 214, 164], [13, 33, 69, 189]],
    (0.6, 0.3, 0.1): [[242, 91, 224, 33], [99, 227, 111, 47]],
}


def documents(seed, count=120, longest=60, vocab_size=258):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, vocab_size, rng.integers(1, longest)) for _ in range(count)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three data sets of different sizes, in shards of 300 tokens."""
    root = tmp_path_factory.mktemp("data")
    for i, count in enumerate((120, 40, 15)):
        train, heldout = documents(i, count), documents(100 + i, 12)
        writer.write_dataset(
            root / str(i), {"train": train, "heldout": heldout}, IDENTITY, shard_tokens=300
        )
    return root


@pytest.fixture
def config(folders):
    return DataConfig(paths=(str(folders / "0"),), seq_len=T, seed=3)


def take(config, n, **kwargs):
    iterator = pipeline.make_train_iterator(config, **kwargs)
    batches = list(itertools.islice(iterator, n))
    iterator.close()
    return batches


def assert_same(a, b):
    assert len(a) == len(b)
    for x, y in zip(a, b, strict=True):
        for name in ("tokens", "targets", "segment_ids"):
            np.testing.assert_array_equal(x[name], y[name])


def oracle_row(docs, r, seq_len):
    """Row `r`, token by token from the definition."""
    stream = [(token, i, j) for i, d in enumerate(docs) for j, token in enumerate(d)]
    cut = stream[r * seq_len : r * seq_len + seq_len + 1]
    tokens = np.zeros(seq_len, int)
    targets = np.full(seq_len, -1)
    segments = np.zeros(seq_len, int)
    for t in range(len(cut) - 1):
        tokens[t] = cut[t][0]
        segments[t] = cut[t][1] - cut[0][1] + 1
        if cut[t + 1][2] != 0:
            targets[t] = cut[t + 1][0]
    return tokens, targets, segments


@settings(max_examples=30)
@given(
    seed=st.integers(0, 10**6),
    seq_len=st.integers(1, 40),
    shard_tokens=st.integers(1, 200),
    longest=st.integers(2, 50),
)
def test_rows_are_what_the_definition_says(tmp_path_factory, seed, seq_len, shard_tokens, longest):
    docs = documents(seed, 12, longest)
    folder = tmp_path_factory.mktemp("rows")
    writer.write_dataset(folder, {"train": docs}, IDENTITY, shard_tokens=shard_tokens)
    data = dataset_lib.open_dataset(folder)
    assert data.num_tokens == sum(map(len, docs))
    assert data.num_documents == len(docs)
    total = 0
    for r in range(data.num_rows(seq_len, partial=True)):
        row = data.row(r, seq_len)
        for got, want in zip(row.values(), oracle_row(docs, r, seq_len), strict=True):
            np.testing.assert_array_equal(got, want)
            assert got.dtype == np.int32
        assert data.predicted_in_row(r, seq_len) == (row["targets"] >= 0).sum()
        total += int((row["targets"] >= 0).sum())
    assert total == data.num_predicted
    for i, ids in enumerate(docs):
        np.testing.assert_array_equal(data.document(i), ids)
    assert verify_checksums(dataset_lib.load_index(folder)) == []


def test_a_batch_is_its_rows_and_padding(tmp_path):
    sets, docs = [], []
    for k, longest in enumerate((3, 50, 200)):  # documents in a row: many, some, one
        docs.append(documents(k, 20, longest))
        folder = tmp_path / str(k)
        writer.write_dataset(folder, {"train": docs[k]}, IDENTITY, shard_tokens=90)
        sets.append(dataset_lib.open_dataset(folder))
    last = sets[1].num_rows(T, partial=True) - 1
    assert sets[1].num_rows(T) == last  # which is short
    numbers = [(2, 3), (0, 1), None, (1, last), (0, 0), (2, 3), None]
    batch = dataset_lib.read_rows([n and (sets[n[0]], n[1]) for n in numbers], T)
    padding = (np.zeros(T), np.full(T, -1), np.zeros(T))
    wanted = [padding if n is None else oracle_row(docs[n[0]], n[1], T) for n in numbers]
    for got, want in zip(batch.values(), zip(*wanted, strict=True), strict=True):
        np.testing.assert_array_equal(got, np.stack(want))
        assert got.dtype == np.int32
        assert got.flags.c_contiguous
    for r in (-1, last + 1):
        with pytest.raises(IndexError, match=f"row {r} of {last + 1}"):
            sets[1].row(r, T)


def test_a_row_costs_no_copy_of_its_shards_ends(tmp_path):
    writer.write_dataset(tmp_path / "d", {"train": [np.arange(2)] * 50_000}, IDENTITY)
    data = dataset_lib.open_dataset(tmp_path / "d")
    data.row(0, T)
    tracemalloc.start()
    data.row(1, T)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 50_000


@pytest.mark.parametrize(("count", "seed"), [(1, 0), (2, 5), (97, 3), (2**18 + 1, 2**32 - 1)])
def test_the_order_is_grains(count, seed):
    endless = grain.MapDataset.range(count).shuffle(seed=seed).repeat()
    places = [*range(200), *range(3 * count - 20, 3 * count + 20), 10**12 + 7]
    got = [pipeline._shuffled(i, count, seed) for i in places if i >= 0]
    assert got == [endless[i] for i in places if i >= 0]


def test_batches_stay_those_of_earlier_versions(folders):
    """First tokens of rows, as a run that began long ago would have read them."""
    paths = tuple(str(folders / str(i)) for i in range(3))
    config = DataConfig(paths=paths, seq_len=T, seed=11)
    for weights, want in GOLDEN.items():
        batches = take(dataclasses.replace(config, weights=weights), 2, batch_size=4, start_row=700)
        assert [b["tokens"][:, 0].tolist() for b in batches] == want


@pytest.mark.parametrize("weights", [None, (0.6, 0.3, 0.1)])
def test_processes_share_one_global_batch(folders, weights):
    paths = tuple(str(folders / str(i)) for i in range(3))
    config = DataConfig(paths=paths, weights=weights or (), seq_len=T, seed=1)
    whole = take(config, 30, batch_size=8)
    for count in (2, 4):
        parts = [
            take(config, 30, batch_size=8, rows=range(8 * i // count, 8 * (i + 1) // count))
            for i in range(count)
        ]
        joined = [
            {name: np.concatenate([p[name] for p in step]) for name in step[0]}
            for step in zip(*parts, strict=True)
        ]
        assert_same(whole, joined)


@pytest.mark.parametrize("prefetch", [0, 4])
def test_resuming_is_skipping(config, prefetch):
    config = dataclasses.replace(config, prefetch=prefetch)
    whole = take(config, 60, batch_size=8)  # about two epochs
    for start in (1, 17, 59):
        assert_same(whole[start:], take(config, 60 - start, batch_size=8, start_row=8 * start))


def row_keys(batches):
    return [row.tobytes() for b in batches for row in b["tokens"]]


def test_every_epoch_holds_each_row_once_in_another_order(folders):
    paths = tuple(str(folders / str(i)) for i in range(3))
    config = DataConfig(paths=paths, seq_len=T)
    rows = sum(dataset_lib.open_dataset(p).num_rows(T) for p in paths)
    keys = row_keys(take(config, 3 * rows, batch_size=1))
    epochs = [keys[i * rows : (i + 1) * rows] for i in range(3)]
    everything = {
        d.row(r, T)["tokens"].tobytes()
        for d in map(dataset_lib.open_dataset, paths)
        for r in range(d.num_rows(T))
    }
    for epoch in epochs:
        assert set(epoch) == everything
        assert len(set(epoch)) == rows
    assert epochs[0] != epochs[1] != epochs[2]


def test_seeds_differ(config):
    orders = [
        tuple(row_keys(take(dataclasses.replace(config, seed=s), 5, batch_size=4)))
        for s in (0, 1, 2, 2**32 - 1)
    ]
    assert len(set(orders)) == 4


def test_mixture_follows_weights(folders):
    paths = tuple(str(folders / str(i)) for i in range(3))
    config = DataConfig(paths=paths, weights=(2.0, 5.0, 3.0), seq_len=T)
    origin = {}
    for k, path in enumerate(paths):
        data = dataset_lib.open_dataset(path)
        origin |= {data.row(r, T)["tokens"].tobytes(): k for r in range(data.num_rows(T))}
    counts = np.bincount([origin[key] for key in row_keys(take(config, 250, batch_size=4))])
    np.testing.assert_allclose(counts / 1000, (0.2, 0.5, 0.3), atol=0.003)


def test_an_epoch_smaller_than_a_batch_works(tmp_path):
    writer.write_dataset(tmp_path / "d", {"train": [np.arange(2 * T + 1)]}, IDENTITY)
    config = DataConfig(paths=(str(tmp_path / "d"),), seq_len=T)
    batch = take(config, 1, batch_size=7)[0]
    assert batch["tokens"].shape == (7, T)
    assert set(batch["tokens"][:, 0]) == {0, T}


@pytest.mark.parametrize("batch_size", [1, 4, 64])
def test_eval_covers_every_token_once(folders, batch_size):
    path = str(folders / "0")
    config = DataConfig(paths=(path,), seq_len=T)
    batches = pipeline.make_eval_batches(config, batch_size=batch_size)
    data = dataset_lib.open_dataset(path, "heldout")
    got = list(batches)
    assert len(got) == len(batches)
    assert all(b["tokens"].shape == (batch_size, T) for b in got)
    tokens = np.concatenate([b["tokens"][b["segment_ids"] > 0] for b in got])
    np.testing.assert_array_equal(tokens, data.tokens(0, data.num_tokens - 1))
    targets = np.concatenate([b["targets"].ravel() for b in got])
    assert (targets >= 0).sum() == batches.num_predicted == data.num_predicted
    assert_same(got, list(batches))
    assert batches.bytes_per_token == pytest.approx(data.num_bytes / data.num_predicted)


def test_eval_slices_and_limits(folders):
    paths = tuple(str(folders / str(i)) for i in range(3))
    config = DataConfig(paths=paths, weights=(1.0, 1.0, 2.0), seq_len=T)
    whole = list(pipeline.make_eval_batches(config, batch_size=8, num_batches=2))
    assert len(whole) == 2
    parts = [
        pipeline.make_eval_batches(config, batch_size=8, num_batches=2, rows=(2 * i, 2 * i + 1))
        for i in range(4)
    ]
    joined = [
        {name: np.concatenate([p[name] for p in step]) for name in step[0]}
        for step in zip(*parts, strict=True)
    ]
    assert_same(whole, joined)
    shown = {
        (k, r)
        for k, path in enumerate(paths)
        for data in [dataset_lib.open_dataset(path, "heldout")]
        for r in range(data.num_rows(T, partial=True))
        for key in [data.row(r, T)["tokens"].tobytes()]
        if key in row_keys(whole)
    }
    assert [sum(k == j for k, _ in shown) for j in range(3)] == [4, 4, 8]


@given(
    limit=st.integers(0, 100),
    weights=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5),
    data=st.data(),
)
def test_shares_add_up(limit, weights, data):
    counts = [data.draw(st.integers(0, 40)) for _ in weights]
    shares = pipeline._shares(limit, weights, counts)
    assert sum(shares) == min(limit, sum(counts))
    assert all(0 <= s <= c for s, c in zip(shares, counts, strict=True))


def test_bytes_per_token_without_bos(tmp_path):
    identity = IDENTITY | {"bos_id": None}
    docs = [np.array([1, 2, 3, 4, 257])] * 3
    writer.write_dataset(tmp_path / "d", {"train": docs}, identity)
    data = dataset_lib.open_dataset(tmp_path / "d")
    # 15 bytes in 12 tokens of text; 3 of those are never predicted.
    assert data.bytes_per_token == pytest.approx(15 * 9 / 12 / 12)


def test_refusals(folders, tmp_path, config):
    long = dataclasses.replace(config, seq_len=10**6)
    with pytest.raises(DataError, match=r"set --data\.seq-len \d+ or less") as refused:
        pipeline.make_train_iterator(long, batch_size=1)
    longest = int(re.search(r"--data\.seq-len (\d+)", str(refused.value))[1])
    fits = dataclasses.replace(config, seq_len=longest)
    assert next(pipeline.make_train_iterator(fits, batch_size=1))["tokens"].shape == (1, longest)
    with pytest.raises(ConfigError, match="name some of 0 to 3"):
        pipeline.make_train_iterator(config, batch_size=4, rows=(3, 4))
    with pytest.raises(DataError, match=r"data\.paths is empty"):
        pipeline.make_train_iterator(DataConfig(), batch_size=1)
    with pytest.raises(DataError, match="does not exist"):
        pipeline.make_train_iterator(DataConfig(paths=(str(tmp_path / "no"),)), batch_size=1)
    writer.write_dataset(tmp_path / "train_only", {"train": documents(0)}, IDENTITY)
    only = DataConfig(paths=(str(tmp_path / "train_only"),))
    with pytest.raises(DataError, match=r"no heldout .* --heldout-fraction .* --eval\.batches 0"):
        pipeline.make_eval_batches(only, batch_size=1)
    other = IDENTITY | {"sha256": "y"}
    writer.write_dataset(tmp_path / "other", {"train": documents(0)}, other)
    mixed = DataConfig(paths=(config.paths[0], str(tmp_path / "other")), seq_len=T)
    with pytest.raises(DataError, match="same tokenizer"):
        pipeline.make_train_iterator(mixed, batch_size=1)
    data = dataset_lib.open_dataset(config.paths[0])
    with pytest.raises(DataError, match=r"--model\.vocab-size 258"):
        dataset_lib.check_compatible(data, 257)
    with pytest.raises(DataError, match="the checkpoint with"):
        dataset_lib.check_compatible(data, 258, other, owner="the checkpoint")
    dataset_lib.check_compatible(data, 300, IDENTITY)


def test_unfinished_and_damaged_folders(tmp_path):
    folder = tmp_path / "d"
    writer.write_dataset(folder, {"train": documents(0)}, IDENTITY, shard_tokens=300)
    tokens = folder / "train-00001.tokens"
    good = tokens.read_bytes()

    tokens.write_bytes(good[:-2])
    with pytest.raises(DataError, match=r"train-00001\.tokens has"):
        dataset_lib.open_dataset(folder)
    tokens.write_bytes(b"\xff\xff" + good[2:])  # id 65535
    index = dataset_lib.load_index(folder)
    assert verify_checksums(index) == [f"{tokens}: checksum differs from the index"]
    config = DataConfig(paths=(str(folder),), seq_len=T)
    with pytest.raises(DataError, match=r"token id 65535 .* beyond the vocabulary of 258"):
        take(config, 500, batch_size=1)
    tokens.unlink()
    os.mkfifo(tokens)  # which nobody writes to
    assert verify_checksums(index) == [f"{tokens}: checksum differs from the index"]
    tokens.unlink()
    with pytest.raises(DataError, match="restore it"):
        dataset_lib.open_dataset(folder)

    text = (folder / "index.json").read_text()
    values = json.loads(text)
    assert len(values.pop("sha256")) == 64
    old = json.dumps(values)  # as older versions wrote it
    for damage, reason in [
        (text[:100], "is damaged"),
        ("[]", "is not the index"),
        (text.replace('"version": 1', '"version": 9'), "format version 9"),
        (text.replace('"bytes": ', '"bytes": 9'), "does not match its own checksum"),
        (text.replace('"bos_id": 256', '"bos_id": 255'), "does not match its own checksum"),
        (text.replace('"token_dtype"', '"dtype"'), "does not match its own checksum"),
        (old.replace('"token_dtype"', '"dtype"'), "missing or malformed field"),
        (old.replace('"vocab_size": 258', '"vocab_size": 1e999'), "vocab_size is inf"),
        (old.replace('"documents": ', '"documents": -1'), "malformed field"),
        (old.replace('"tokens": ', '"tokens": 0.'), "tokens is 0."),
        (old.replace('"name": "', '"name": "../'), r"'\.\./train-00000' is not in the folder"),
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
    ]:
        (folder / "index.json").write_text(damage)
        with pytest.raises(DataError, match=reason):
            dataset_lib.load_index(folder)
    (folder / "index.json").write_text(old)
    assert dataset_lib.load_index(folder) == index
    (folder / "index.json").unlink()
    with pytest.raises(DataError, match="unfinished or not a prepared data set"):
        dataset_lib.load_index(folder)


def test_shards_close_at_their_size_however_documents_are_grouped(tmp_path):
    lengths = np.array([10, 20, 5, 40, 30, 1])
    tokens, sizes = np.arange(lengths.sum()) % 256, lengths
    shards = {}
    for group in (1, 2, 6):
        folder = tmp_path / str(group)
        folder.mkdir()
        split = writer.SplitWriter(folder, "train", "uint16", shard_tokens=30)
        for i in range(0, 6, group):
            before, after = lengths[:i].sum(), lengths[: i + group].sum()
            split.add(tokens[before:after], lengths[i : i + group], sizes[i : i + group])
        shards[group] = split.finish()
    assert [s.tokens for s in shards[1]] == [30, 45, 30, 1]
    assert shards[1] == shards[2] == shards[6]


def test_ids_outside_the_vocabulary_are_not_written(tmp_path):
    with pytest.raises(DataError, match="outside the vocabulary of 258"):
        writer.write_dataset(tmp_path / "d", {"train": [np.array([1, 258])]}, IDENTITY)
    with pytest.raises(DataError, match=r"does not exist|unfinished"):
        dataset_lib.load_index(tmp_path / "d")
