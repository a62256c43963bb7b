"""Texts in buckets are found and read as those in folders are."""

import gzip
import json

import pytest
from bucket_files import do_not_wait, put_folder
from faulty_proxy import Fault
from prepared_data import TEXTS, make_texts, run, shard_bytes, write_jsonl

from mmfree_jax import storage
from mmfree_jax.cli.main import main
from mmfree_jax.data.inputs import find_inputs
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.sources import ReadOptions, read_batches
from mmfree_jax.errors import DataError, StorageError
from mmfree_jax.storage import parse_url


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A clone of a data set, in a folder of this machine."""
    do_not_wait(monkeypatch)
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    (folder / "data").mkdir(parents=True)
    lines = "".join(json.dumps({"text": text}) + "\n" for text in TEXTS[:20])
    (folder / "data" / "train-0.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    write_jsonl(folder / "data" / "train-1.jsonl", TEXTS[20:40])
    write_jsonl(folder / "data" / "test-0.jsonl", ["another split"])
    write_jsonl(folder / "extra.jsonl", ["not named in README"])
    (folder / ".hidden.txt").write_text("hidden")
    (folder / "logo.png").write_bytes(b"picture")
    (folder / "README.md").write_text(
        "---\nconfigs:\n- config_name: default\n  data_files:\n  - split: train\n"
        "    path: data/train-*\n  - split: test\n    path: data/test-*\n---\n"
    )
    return folder


def _readings(found):
    return [reading.to_json() | {"input": ""} for reading in found.readings]


def test_they_are_found_as_in_a_folder_and_beside_local_ones(corpus, bucket, tmp_path):
    url = put_folder(corpus, f"{bucket.url}/a b/corpus")
    mine = write_jsonl(tmp_path / "mine.jsonl", make_texts(3, 5), field="body")
    both = [[str(corpus), f"{mine}:body"], [url, f"{mine}:body"]]
    here, there = (find_inputs(inputs) for inputs in both)
    assert [str(f.path) for f in there.files] == [
        f"{url}/data/train-0.jsonl.gz",
        f"{url}/data/train-1.jsonl",
        mine,
    ]
    assert _readings(here)[0]["files"] == 2
    assert [f.text_field for f in there.files] == ["text", "text", "body"]
    assert _readings(there) == _readings(here)
    index = run(tmp_path / "here", input=tuple(both[0]))
    run(tmp_path / "there", input=tuple(both[1]))
    assert shard_bytes(tmp_path / "there") == shard_bytes(tmp_path / "here")
    # What was begun with the files is gone on with, or known, with the objects.
    config = PrepareConfig(out=str(index.path), input=tuple(both[1]), heldout_fraction=0.0)
    assert prepare_dataset(config)[1] is False


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ("/data/*.jsonl", ["data/train-1.jsonl"]),
        ("/*/train*", ["data/train-0.jsonl.gz", "data/train-1.jsonl"]),
        ("/**/*0.jsonl", ["data/test-0.jsonl"]),
        ("/extra.jsonl:meta.text", ["extra.jsonl"]),
        ("/data/", ["data/train-0.jsonl.gz", "data/train-1.jsonl"]),
        ("/x:y.jsonl", ["x:y.jsonl"]),
    ],
)
def test_globs_objects_and_fields(corpus, s3_bucket, given, names):
    url = put_folder(corpus, f"{s3_bucket.url}/corpus")
    storage.write_bytes(parse_url(f"{url}/x:y.jsonl"), b'{"text": "z"}\n')
    files = find_inputs([url + given]).files
    assert [str(f.path) for f in files] == [f"{url}/{name}" for name in names]
    assert files[0].text_field == ("meta.text" if "meta" in given else "text")


def test_what_is_wrong_is_said_of_the_url(corpus, s3_bucket, capsys, tmp_path):
    url = put_folder(corpus, f"{s3_bucket.url}/corpus")
    put = {"half/a.txt": b"x", "half/.mmfree-uploading.json": b"{}", "pictures/a.png": b"x"}
    put |= {"bad/a.jsonl": b'{"text": 1}\n', "cut/a.jsonl.gz": gzip.compress(b"text")[:-4]}
    put |= {"twice/a.txt": b"x", "twice/a.txt/b.txt": b"x"}
    for name, data in put.items():
        storage.write_bytes(parse_url(f"{s3_bucket.url}/{name}"), data)
    for given, wanted in (
        (f"{s3_bucket.url}/none", "none does not exist: nothing in the bucket begins so"),
        ("s3://nobody-has-this/x", "there is no bucket 'nobody-has-this'"),
        (f"{s3_bucket.url}/half", f"input {s3_bucket.url}/half is half written: the command"),
        (f"{s3_bucket.url}/pictures", f"input {s3_bucket.url}/pictures holds no readable file"),
        (f"{s3_bucket.url}/bad", f"{s3_bucket.url}/bad/a.jsonl"),
        (f"{s3_bucket.url}/cut", f"{s3_bucket.url}/cut/a.jsonl.gz is not whole gzip data"),
        (f"{s3_bucket.url}/twice", "has objects of names that no files can have, such as"),
        (f"{url}/*.parquet", f"input {url}/*.parquet holds no readable file"),
        ("abfss://c/x", "input is 'abfss://c/x': URLs of abfss: are not supported"),
    ):
        assert main(["data", "prepare", "--out", str(tmp_path / "out"), "--input", given]) == 2
        error = capsys.readouterr().err
        assert wanted in error
        assert error.count("\n") == 1
        assert "/tmp" not in error


def test_a_read_that_fails_is_said_and_one_that_passes_is_not(corpus, s3_bucket):
    url = put_folder(corpus, f"{s3_bucket.url}/corpus")
    (file,) = find_inputs([f"{url}/data/train-1.jsonl"]).files
    read = r"^GET /\S*/train-1.jsonl"
    s3_bucket.proxy.add(Fault(read, times=1, status=503), Fault(read, times=1, keep=10))
    batches = list(read_batches(file, ReadOptions()))
    assert sum(len(batch.records) for batch in batches) == 20
    storage.write_bytes(parse_url(str(file.path)), b'{"text": "written anew"}\n')
    assert [batch.records for batch in read_batches(file, ReadOptions())] == [
        [b'{"text": "written anew"}']
    ]
    s3_bucket.proxy.add(Fault("^(GET|HEAD) ", status=403))
    with pytest.raises(StorageError, match=r"train-1.jsonl cannot be read: permission denied"):
        list(read_batches(file, ReadOptions()))
    s3_bucket.proxy.clear()
    storage.delete(parse_url(str(file.path)))
    with pytest.raises(DataError, match=r"train-1.jsonl was deleted meanwhile"):
        list(read_batches(file, ReadOptions()))


def test_a_tokenizer_is_trained_from_a_bucket_into_a_bucket(corpus, s3_bucket, capsys, tmp_path):
    url = put_folder(corpus, f"{s3_bucket.url}/corpus")
    out = f"{s3_bucket.url}/tokenizers/t"
    argv = ["tokenizer", "train", "--vocab-size", "300", "--input"]
    s3_bucket.proxy.add(Fault(r"^PUT /\S*/t/tokenizer.json", status=503))
    assert main([*argv, url, "--out", out]) == 2
    assert f"{out}/tokenizer.json cannot be written: try 3 of 3" in capsys.readouterr().err
    s3_bucket.proxy.clear()
    assert main([*argv, url, "--out", out]) == 0
    assert main([*argv, str(corpus), "--out", str(tmp_path / "t")]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (
            storage.read_bytes(parse_url(f"{out}/{name}")) == (tmp_path / "t" / name).read_bytes()
        )
    assert main([*argv, url, "--out", out]) == 0  # the same is there
    assert main([*argv, f"{url}/data/train-1.jsonl", "--out", out]) == 2
    assert f"{out} holds another tokenizer" in capsys.readouterr().err
    assert main([*argv, url, "--out", url]) == 2
    assert f"{url} is not replaced: it was not written by `mmfree t" in capsys.readouterr().err
