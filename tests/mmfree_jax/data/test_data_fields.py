"""Fields of records, columns of tables, and several inputs with a field each."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from read_records import texts, write_lines

from mmfree_jax.cli import data as data_cli
from mmfree_jax.cli import tokenizer as tokenizer_cli
from mmfree_jax.data import prepare as prepare_lib
from mmfree_jax.data.dataset import open_dataset
from mmfree_jax.data.dataset_index import load_index
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.reading import InputReading, Tally
from mmfree_jax.data.tokenizer import load_tokenizer
from mmfree_jax.errors import DataError

NESTED = [
    ({"text": "a"}, "text", "a"),
    ({"meta": {"text": "a"}}, "meta.text", "a"),
    ({"meta.text": "a", "meta": {"text": "b"}}, "meta.text", "a"),
    ({"meta": {"text": "b"}, "meta.text": "a"}, "meta.text", "a"),
    ({"a": {"b": {"c": "x"}}}, "a.b.c", "x"),
    ({"a.b": {"c": "x"}, "a": {"b": {"c": "y"}}}, "a.b.c", "x"),
    ({"a": {"b.c": "x", "b": {"c": "y"}}}, "a.b.c", "x"),
]


@pytest.mark.parametrize(("record", "field", "expected"), NESTED)
@pytest.mark.parametrize("kind", ["jsonl", "parquet", "arrow"])
def test_nested_fields(record, field, expected, kind, tmp_path):
    file = tmp_path / f"a.{kind}"
    table = pa.Table.from_pylist([{"id": 1, **record}] * 3)
    if kind == "jsonl":
        write_lines(file, [{"id": 1, **record}] * 3)
    elif kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_file(str(file), table.schema) as sink:
            sink.write_table(table)
    assert texts(file, field) == [expected] * 3


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_a_null_on_the_way_is_an_empty_document(kind, tmp_path):
    records = [{"meta": {"text": "a"}}, {"meta": None}, {"meta": {"text": None}}]
    file = tmp_path / f"a.{kind}"
    write_lines(file, records) if kind == "jsonl" else pq.write_table(
        pa.Table.from_pylist(records), file
    )
    tally = Tally()
    assert texts(file, "meta.text", tally=tally) == ["a"]
    assert tally.empty == 2


@pytest.mark.parametrize(
    ("names", "field", "message"),
    [
        (["text", "text"], "text", "column 'text' occurs 2 times"),
        (["text", "n", "n"], "text", None),
        (["x", "y", "y"], "text", r"no column 'text' \(it has: x, y, y\)"),
    ],
)
@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_columns_that_occur_twice(names, field, message, kind, tmp_path):
    table = pa.Table.from_arrays([pa.array(["a", "b"])] * len(names), names)
    file = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(table, file)
    else:
        with pa.ipc.new_stream(str(file), table.schema) as sink:
            sink.write_table(table)
    if message is None:
        assert texts(file, field) == ["a", "b"]
    else:
        with pytest.raises(DataError, match=message):
            texts(file, field)


def test_a_column_twice_inside_a_structure(tmp_path):
    inner = pa.StructArray.from_arrays([pa.array(["a"])] * 2, ["text", "text"])
    table = pa.table({"meta": inner})
    with pa.ipc.new_stream(str(tmp_path / "a.arrow"), table.schema) as sink:
        sink.write_table(table)
    with pytest.raises(DataError, match="column 'text' occurs 2 times"):
        texts(tmp_path / "a.arrow", "meta.text")


@pytest.mark.parametrize(
    ("line", "field", "message"),
    [
        ('{"text": "a", "text": "b"}', "text", "field 'text' occurs twice"),
        ('{"meta": {"text": "a"}, "meta": {}}', "meta.text", "field 'meta' occurs twice"),
        ('{"meta": {"text": "a", "text": "a"}}', "meta.text", "field 'text' occurs twice"),
        ('{"n": 1, "n": 2, "text": "a"}', "text", None),
        ('{"meta": "x"}', "meta.text", "no field 'meta.text'"),
    ],
)
def test_fields_that_occur_twice(line, field, message, tmp_path):
    (tmp_path / "a.jsonl").write_text(line + "\n")
    if message is None:
        assert texts(tmp_path / "a.jsonl", field) == ["a"]
        return
    with pytest.raises(DataError, match=f"line 1: {message}"):
        texts(tmp_path / "a.jsonl", field)
    tally = Tally()
    assert texts(tmp_path / "a.jsonl", field, skip_bad=True, tally=tally) == []
    assert tally.reasons == {message: 1}


@pytest.fixture
def two(tmp_path):
    """Two files whose texts have other fields."""
    a = write_lines(tmp_path / "a.jsonl", [{"text": f"first {i}"} for i in range(9)])
    b = write_lines(tmp_path / "b.jsonl", [{"meta": {"body": f"second {i}"}} for i in range(7)])
    return a, b


@pytest.mark.parametrize("workers", [1, 2])
def test_each_input_has_a_field_of_its_own(two, workers, tmp_path):
    a, b = two
    odd = write_lines(tmp_path / "c:body", [])  # a path that exists is a path
    (tmp_path / "c:body").rename(tmp_path / "c:body.jsonl")
    write_lines(tmp_path / "c:body.jsonl", [{"text": "third"}])
    given = (a, f"{b}:meta.body", f"{odd}.jsonl", f"{tmp_path}/d*.jsonl:x")
    write_lines(tmp_path / "d1.jsonl", [{"x": "fourth"}])
    config = PrepareConfig(
        out=str(tmp_path / "out"), input=given, workers=workers, heldout_fraction=0
    )
    index, _ = prepare_dataset(config)
    data = open_dataset(tmp_path / "out")
    byte = load_tokenizer("byte")
    found = [byte.decode(data.document(i)) for i in range(data.num_documents)]
    expected = [*(f"first {i}" for i in range(9)), *(f"second {i}" for i in range(7))]
    assert found == [*expected, "third", "fourth"]
    readings = [InputReading.from_json(r) for r in index.source["readings"]]
    assert [(r.input, r.files, r.tally.documents) for r in readings] == [
        (given[0], 1, 9), (given[1], 1, 7), (given[2], 1, 1), (given[3], 1, 1)]  # fmt: skip
    assert not prepare_dataset(config)[1]
    other = PrepareConfig(
        out=config.out, input=(a, f"{b}:meta", *given[2:]), heldout_fraction=0, workers=workers
    )
    with pytest.raises(DataError, match=r"other inputs \(b\.jsonl differs\)"):
        prepare_dataset(other)


def test_an_input_of_which_nothing_is_left_is_an_error(two, tmp_path):
    a, b = two
    for files in ((a, b), (b, a)):
        config = PrepareConfig(
            out=str(tmp_path / "out"), input=files, workers=1, skip_bad_records=True
        )
        with pytest.raises(DataError, match=r"nothing is left of input .*b\.jsonl: 7 malformed "
                           r"records \(7 no field 'text'\).*PATH:FIELD"):  # fmt: skip
            prepare_dataset(config)
        assert not (tmp_path / "out" / "index.json").exists()
    alone = PrepareConfig(out=str(tmp_path / "alone"), input=(b,), workers=1, skip_bad_records=True)
    with pytest.raises(DataError, match=r"no text \(7 malformed records \(7 no field 'text'\)\)"):
        prepare_dataset(alone)
    arguments = ["--input", a, b, "--skip-bad-records", "--out", str(tmp_path / "t")]
    with pytest.raises(DataError, match=r"nothing is left of input .*b\.jsonl: 7 malformed"):
        tokenizer_cli.train([*arguments, "--vocab-size", "258"])
    assert not (tmp_path / "t").exists()


def test_what_was_left_out_is_said_for_each_input(two, tmp_path, capsys):
    a, b = two
    with open(b, "a") as file:
        file.write('[1]\n{"meta": {"body": ""}}\n{"text": "x"}\n{"text": "y"}\n')
    arguments = ["--input", a, f"{b}:meta.body", "--skip-bad-records", "--heldout-fraction", "0"]
    said = [
        f"read       {a}: 9 documents in 1 file",
        f"read       {b}:meta.body: 7 documents in 1 file",
        f"left out   {b}:meta.body: 3 malformed records (2 no field 'meta.body', 1 not a JSON "
        "object) and 1 empty document",
    ]
    tokenizer_cli.train([*arguments, "--vocab-size", "258", "--out", str(tmp_path / "t")])
    assert capsys.readouterr().out.splitlines()[:3] == said
    data_cli.prepare([*arguments, "--workers", "1", "--out", str(tmp_path / "out")])
    lines = capsys.readouterr().out.splitlines()
    assert [x for x in lines if x.startswith(("read ", "left out "))] == said


def test_a_tokenizer_learns_from_the_training_split(two, tmp_path, capsys):
    (tmp_path / "repo").mkdir()
    write_lines(tmp_path / "repo" / "train.jsonl", [{"a": {"b": "xyxyxy " * 9}}] * 3)
    write_lines(tmp_path / "repo" / "test.jsonl", [{"a": {"b": "zuzuzu " * 9}}] * 3)
    arguments = ["--input", str(tmp_path / "repo"), "--text-field", "a.b", "--out"]
    arguments += [str(tmp_path / "t"), "--vocab-size", "260", "--heldout-fraction", "0"]
    tokenizer_cli.train(arguments)
    assert "1 file (test.jsonl): split test" in capsys.readouterr().out
    tokenizer = load_tokenizer(tmp_path / "t")
    assert len(tokenizer.encode("xyxy")) < 4
    assert len(tokenizer.encode("zuzu")) == 4


def test_a_journal_of_an_earlier_version_is_gone_on_with(two, tmp_path, monkeypatch):
    a, _ = two
    config = PrepareConfig(out=str(tmp_path / "out"), input=(a,), workers=1, heldout_fraction=0)

    def stop(self):
        raise KeyboardInterrupt

    from mmfree_jax.data import sources

    monkeypatch.setattr(sources, "BATCH_RECORDS", 2)
    with monkeypatch.context() as patch:
        patch.setattr(prepare_lib._Preparation, "_finish", stop)
        with pytest.raises(KeyboardInterrupt):
            prepare_dataset(config, commit_bytes=1)
    journal = json.loads((tmp_path / "out" / "progress.json").read_text())
    assert journal.pop("readings")[0]["tally"]["documents"] == 9
    assert len(journal.pop("sha256")) == 64  # which older versions did not write either
    assert journal["counts"]["documents"] == 9
    (tmp_path / "out" / "progress.json").write_text(json.dumps(journal))
    assert prepare_dataset(config)[1]
    assert load_index(tmp_path / "out").source["counts"]["documents"] == 9


def _write_strings(path, offsets, data, kind=None):
    """An Arrow file of one column of text with these bytes and offsets, whatever they mean."""
    kind = kind or pa.string()
    width = np.int64 if kind == pa.large_string() else np.int32
    buffers = [None, pa.py_buffer(np.array(offsets, width)), pa.py_buffer(data)]
    array = pa.Array.from_buffers(kind, len(offsets) - 1, buffers)
    table = pa.record_batch([array], ["text"])
    with pa.ipc.new_stream(str(path), table.schema) as stream:
        stream.write_batch(table)


def _read(path, **options):
    config = PrepareConfig(out=str(path) + ".out", input=(str(path),), workers=1,
                           heldout_fraction=0, **options)  # fmt: skip
    return prepare_dataset(config)[0]


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
def test_a_text_in_a_table_that_is_not_utf8_is_a_bad_record(tmp_path, kind):
    _write_strings(tmp_path / "a.arrow", [0, 3, 6, 9], b"abcd\xffefgh", kind)
    with pytest.raises(DataError, match=r"a\.arrow, row 2: byte 1 is not UTF-8"):
        _read(tmp_path / "a.arrow")
    index = _read(tmp_path / "a.arrow", skip_bad_records=True)
    assert index.splits["train"][0].documents == 2


def test_a_text_in_a_parquet_that_is_not_utf8_is_a_bad_record(tmp_path):
    raw = pa.array([b"abc", b"d\xffe"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": raw}), tmp_path / "a.parquet")
    with pytest.raises(DataError, match=r"a\.parquet, row 2: byte 1 is not UTF-8"):
        _read(tmp_path / "a.parquet")


@pytest.mark.parametrize("kind", [pa.string(), pa.large_string()])
@pytest.mark.parametrize("offsets", [[0, 2**31 - 1, 9], [0, -5, 9], [3, 1, 9]])
def test_texts_outside_of_their_file_are_refused(tmp_path, kind, offsets):
    """The library would end the process over them, or give what lies in memory there."""
    _write_strings(tmp_path / "a.arrow", offsets, b"abcdefghi", kind)
    with pytest.raises(DataError, match=r"a\.arrow is not a whole Arrow file"):
        _read(tmp_path / "a.arrow")


@pytest.mark.parametrize("name", ["a.arrow", "a.parquet"])
def test_a_table_that_was_cut_short_is_told_as_that(tmp_path, name):
    """The library says so by an OSError, as of a disk that fails."""
    table = pa.table({"text": [f"text {i}" for i in range(1000)]})
    if name == "a.parquet":
        pq.write_table(table, tmp_path / name)
    else:
        with pa.OSFile(str(tmp_path / name), "wb") as sink:
            stream = pa.ipc.new_stream(sink, table.schema)
            stream.write_table(table)
            stream.close()
    whole = (tmp_path / name).read_bytes()
    for share in (0.3, 0.6, 0.9):
        (tmp_path / name).write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(DataError, match=r"is not a whole \w+ file \(.*\): fetch it again"):
            _read(tmp_path / name)
