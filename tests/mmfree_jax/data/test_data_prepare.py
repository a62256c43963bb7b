"""From text files to a prepared data set: formats, resuming, limits and bad input."""

import dataclasses
import gzip
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_data import TEXTS, make_texts, run, shard_bytes, write_jsonl

from mmfree_jax.data import dataset as dataset_lib
from mmfree_jax.data import inputs, sources, text_split
from mmfree_jax.data.prepare import PrepareConfig, prepare_dataset
from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.errors import ConfigError, DataError


def read_back(folder, split):
    """The texts of a split, by the byte tokenizer, and whether each has its ends."""
    if split not in dataset_lib.load_index(folder).splits:
        return []
    data = dataset_lib.open_dataset(folder, split)
    documents = [data.document(i) for i in range(data.num_documents)]
    assert all(d[0] == 256 and d[-1] == 257 for d in documents)
    return [ByteTokenizer().decode(d) for d in documents]


def save_to_disk(folder, texts, field="text"):
    """What `datasets.Dataset.save_to_disk` leaves."""
    folder.mkdir(parents=True)
    names = []
    for k, part in enumerate((texts[:20], texts[20:])):
        names.append(f"data-{k:05d}-of-00002.arrow")
        table = pa.table({"id": list(range(len(part))), field: part})
        with pa.OSFile(str(folder / names[-1]), "wb") as sink:
            stream = pa.ipc.new_stream(sink, table.schema)
            stream.write_table(table, max_chunksize=7)
            stream.close()
    (folder / "state.json").write_text(
        json.dumps({"_data_files": [{"filename": n} for n in names]})
    )
    (folder / "dataset_info.json").write_text("{}")
    (folder / "cache-123.arrow").write_bytes(b"left over")


def make_input(kind, folder):
    """TEXTS in one of the layouts that are read."""
    lines = "".join(json.dumps({"text": t}) + "\n" for t in TEXTS).encode()
    if kind == "txt":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03d}.txt").write_bytes(text.encode())
    elif kind == "separator":
        (folder / "all.txt").write_bytes("<|end|>".join(TEXTS).encode())
    elif kind == "txt.gz":
        for i, text in enumerate(TEXTS):
            (folder / f"{i:03d}.txt.gz").write_bytes(gzip.compress(text.encode()))
    elif kind == "jsonl":
        (folder / "a.jsonl").write_bytes(lines.rstrip(b"\n"))  # no newline at the end
    elif kind == "crlf":
        (folder / "a.ndjson").write_bytes(b"\xef\xbb\xbf" + lines.replace(b"\n", b"\r\n\r\n"))
    elif kind == "jsonl.gz":
        (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    elif kind == "jsonl.zst":  # two frames, cut inside a line
        frames = (zstandard.compress(part) for part in (lines[:1234], lines[1234:]))
        (folder / "a.jsonl.zst").write_bytes(b"".join(frames))
    elif kind == "parquet":
        table = pa.table({"text": pa.array(TEXTS, pa.large_string()), "n": list(range(60))})
        pq.write_table(table, folder / "a.parquet", row_group_size=13)
    elif kind == "dictionary":
        table = pa.table({"text": pa.array(TEXTS).dictionary_encode()})
        pq.write_table(table, folder / "a.parquet")
    elif kind == "save_to_disk":
        save_to_disk(folder / "train", TEXTS)
    elif kind == "arrow_file":
        table = pa.table({"text": TEXTS})
        with pa.ipc.new_file(str(folder / "a.arrow"), table.schema) as file:
            file.write_table(table, max_chunksize=9)


KINDS = ["txt", "separator", "txt.gz", "jsonl", "crlf", "jsonl.gz", "jsonl.zst", "parquet"]
KINDS += ["dictionary", "save_to_disk", "arrow_file"]


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_the_same_documents(kind, tmp_path):
    (tmp_path / "in").mkdir()
    make_input(kind, tmp_path / "in")
    separator = "<|end|>" if kind == "separator" else None
    index = run(tmp_path / "out", input=(str(tmp_path / "in"),), txt_separator=separator)
    assert read_back(tmp_path / "out", "train") == TEXTS
    data = dataset_lib.open_dataset(tmp_path / "out")
    assert data.num_bytes == sum(len(t.encode()) for t in TEXTS)
    assert data.bytes_per_token == data.num_bytes / (data.num_bytes + len(TEXTS))
    assert index.source["counts"]["documents"] == len(TEXTS)
    assert not (tmp_path / "out" / "progress.json").exists()

    # Reading on from any record gives the rest.
    files = inputs.find_inputs([str(tmp_path / "in")]).files
    options = sources.ReadOptions(txt_separator=separator)
    whole = [r for b in sources.read_batches(files[-1], options) for r in b.records]
    for start in (1, len(whole) // 2, len(whole)):
        batches = list(sources.read_batches(files[-1], options, start))
        assert [r for b in batches for r in b.records] == whole[start:]
        assert all(b.first >= start for b in batches)


def test_inputs_are_found_once_and_in_order(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.parquet", ".hidden.txt", "sub/.git/x.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    found = inputs.find_inputs([f"{tmp_path}/*.txt", str(tmp_path), f"{tmp_path}/**/*.parquet"])
    assert [f.path.name for f in found.files] == ["b.txt", "a.jsonl", "c.parquet"]


def test_any_number_of_workers_gives_the_same_files(source, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "BATCH_BYTES", 3000)
    settings_ = {"input": (source,), "heldout_fraction": 0.3, "shard_tokens": 5000}
    one = run(tmp_path / "one", **settings_)
    monkeypatch.setattr(sources, "BATCH_BYTES", 500)
    three = run(tmp_path / "three", **settings_, workers=3)
    assert len(one.splits["train"]) > 2
    assert shard_bytes(tmp_path / "one") == shard_bytes(tmp_path / "three")
    assert one.splits == three.splits
    assert one.source == three.source


def test_held_out_documents_are_picked_by_hash(source, tmp_path):
    run(tmp_path / "a", input=(source,), heldout_fraction=0.3)
    heldout = read_back(tmp_path / "a", "heldout")
    assert 8 <= len(heldout) <= 28
    assert sorted(heldout + read_back(tmp_path / "a", "train")) == sorted(TEXTS)
    # The same documents, whatever is around them and in whatever order.
    other = write_jsonl(tmp_path / "more.jsonl", TEXTS[::-1] + make_texts(1, 20))
    run(tmp_path / "b", input=(other,), heldout_fraction=0.3)
    assert set(heldout) == set(read_back(tmp_path / "b", "heldout")) & set(TEXTS)
    run(tmp_path / "c", input=(source,), heldout_fraction=0.3, seed=1)
    assert set(read_back(tmp_path / "c", "heldout")) != set(heldout)


def test_empty_and_malformed_records_are_counted(tmp_path):
    lines = ["not json", "[1]", '{"id": 3}', '{"text": 4}', '{"text": "\\ud800"}']
    good = ['{"text": "one"}', '{"text": "  "}', '{"text": ""}', '{"text": null}', ""]
    path = tmp_path / "mixed.jsonl"
    path.write_bytes("\n".join([*good, *lines]).encode() + b'\n{"text": "\xff"}\n{"text": "two"}')
    index = run(tmp_path / "out", input=(str(path),), skip_bad_records=True)
    assert read_back(tmp_path / "out", "train") == ["one", "two"]
    counts = index.source["counts"]
    assert (counts["documents"], counts["empty"], counts["bad_records"]) == (2, 3, 6)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b"not json", "not JSON"),
        (b"[1]", "not a JSON object"),
        (b'{"id": 3}', r"no field 'text' \(it has: id; see --text-field\)"),
        (b'{"text": 4}', "field 'text' is int, not text"),
        (b'{"text": "\\ud800"}', "half of a surrogate"),
        (b'{"text": "\xff"}', "is not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(line, reason, tmp_path):
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 6 + line + b"\n" + b"worse\n")
    with pytest.raises(DataError, match=rf"bad\.jsonl, line 7: .*{reason}.*--skip-bad-records"):
        run(tmp_path / "out", input=(str(path),))
    assert not (tmp_path / "out" / "index.json").exists()


def test_a_malformed_line_is_named_through_processes(tmp_path, monkeypatch):
    """The first in order, although a later batch may fail sooner."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(b'{"text": "fine"}\n' * 6 + b"[1]\n" + b"worse\n" * 9)
    monkeypatch.setattr(sources, "BATCH_RECORDS", 2)
    with pytest.raises(DataError, match=r"bad\.jsonl, line 7: not a JSON object"):
        run(tmp_path / "out", input=(str(path),), workers=2)


def test_bad_inputs_are_named(tmp_path):
    def refused(match, **kwargs):
        with pytest.raises(DataError, match=match):
            run(tmp_path / "out", **kwargs)

    refused("does not exist: give a file", input=(str(tmp_path / "no.txt"),))
    refused("holds no readable file", input=(str(tmp_path / "*.txt"),))
    (tmp_path / "a.md").touch()
    refused(r"a\.md is of no known kind", input=(str(tmp_path / "a.md"),))
    (tmp_path / "empty.txt").touch()
    refused("the input holds no text", input=(str(tmp_path / "empty.txt"),))
    save_to_disk(tmp_path / "dict" / "train", TEXTS)
    (tmp_path / "dict" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    refused(r"holds the splits train: name one.*dict/train", input=(str(tmp_path / "dict"),))
    pq.write_table(pa.table({"body": TEXTS, "n": [1] * 60}), tmp_path / "t.parquet")
    refused(r"no column 'text' \(it has: body, n\)", input=(str(tmp_path / "t.parquet"),))
    refused("'n' holds int64, not text", input=(str(tmp_path / "t.parquet"),), text_field="n")
    (tmp_path / "latin.txt").write_bytes("né".encode("latin-1"))
    refused(r"latin\.txt, document 1: byte 1 is not UTF-8", input=(str(tmp_path / "latin.txt"),))
    whole = b"".join(json.dumps({"text": t}).encode() + b"\n" for t in TEXTS)
    damaged = {
        "cut.jsonl.zst": zstandard.compress(whole)[:-20],
        "cut.jsonl.gz": gzip.compress(whole)[:-20],
        "no.jsonl.zst": b"hello",
        "no.jsonl.gz": b"hello",
        "no.parquet": b"hello",
        "no.arrow": b"hello",
    }
    for name, contents in damaged.items():
        (tmp_path / name).write_bytes(contents)
        refused(rf"{name} is not (a )?whole", input=(str(tmp_path / name),))


def test_bad_settings_are_named(source):
    for change, match in [
        ({"heldout_fraction": 1.0}, "heldout_fraction is 1.0: set a value in"),
        ({"workers": 0}, "workers is 0"),
        ({"shard_tokens": 0}, "shard_tokens is 0"),
        ({"txt_separator": ""}, "txt_separator is ''"),
        ({"input": ()}, "give either --input"),
        ({"corpus": "sotu"}, "give either --input"),
    ]:
        with pytest.raises(ConfigError, match=match):
            PrepareConfig(**{"out": "x", "input": (source,), **change})


def test_a_failure_can_be_put_right_and_gone_on_from(tmp_path, monkeypatch):
    """The first try's settings do not stick, and --skip-bad-records may come later."""
    texts = [{"text": t} for t in TEXTS]
    path = tmp_path / "t.jsonl"
    path.write_text("".join(json.dumps(t) + "\n" for t in [*texts, 7, *texts]))
    out, source = tmp_path / "out", (str(path),)
    with pytest.raises(DataError, match="no field 'body'"):
        run(out, input=source, text_field="body", heldout_fraction=0.5)
    monkeypatch.setattr(sources, "BATCH_BYTES", 2000)
    config = PrepareConfig(out=str(out), input=source, heldout_fraction=0.0, workers=1)
    with pytest.raises(DataError, match="line 61: not a JSON object"):
        prepare_dataset(config, commit_bytes=5000)
    good = (out / "progress.json").read_text()
    assert json.loads(good)["record"] > 40
    for damage in (
        good.replace('"record": ', '"record": 1'),
        '{"file": 0, "record": 0}',
        "[]",
        "{",
    ):
        (out / "progress.json").write_text(damage)
        with pytest.raises(DataError, match=r"progress.json cannot be read .* start again"):
            prepare_dataset(dataclasses.replace(config, skip_bad_records=True))
    (out / "progress.json").write_text(good)
    index, _ = prepare_dataset(dataclasses.replace(config, skip_bad_records=True))
    assert read_back(out, "train") == TEXTS * 2
    assert index.source["counts"]["bad_records"] == 1
    assert not list(out.glob("heldout*"))
    with pytest.raises(DataError, match="made without 1 malformed records"):
        prepare_dataset(config)


def test_too_few_documents_to_hold_any_out(tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", ["only one"])
    with pytest.raises(
        DataError, match=r"heldout split is empty: 1 document is .* --heldout-fraction"
    ):
        run(tmp_path / "out", input=(path,), heldout_fraction=0.01)


def test_long_documents_are_cut_at_line_ends(tmp_path):
    text = "".join(f"line {i} " + "é" * 40 + "\n" for i in range(40_000))  # 3.7 MB
    (tmp_path / "long.txt").write_bytes(text.encode())
    path = write_jsonl(tmp_path / "long.jsonl", [text])
    a = run(tmp_path / "a", input=(str(tmp_path / "long.txt"),), max_document_mib=1)
    b = run(tmp_path / "b", input=(path,), max_document_mib=1)
    assert shard_bytes(tmp_path / "a") == shard_bytes(tmp_path / "b")
    pieces = read_back(tmp_path / "a", "train")
    assert "".join(pieces) == text
    assert all(p.endswith("\n") for p in pieces)
    assert len(pieces) == 4
    assert b.source["counts"]["cut"] == 3
    assert a.splits == b.splits


@settings(max_examples=100)
@given(
    text=st.text(alphabet="ab\né🙂", max_size=60), size=st.integers(4, 20), block=st.integers(1, 9)
)
def test_cuts_lose_nothing_and_keep_characters_whole(text, size, block):
    data = text.encode()
    pieces = list(text_split.cut_document(data, size))
    assert b"".join(pieces) == data
    assert all(len(p) <= size for p in pieces)
    for piece in pieces:
        piece.decode()
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    assert b"".join(p.text for p in text_split.split_text(iter(blocks), None, size)) == data
    split = [p.text for p in text_split.split_text(iter(blocks), "ab", 10**6)]
    assert [p for p in split if p] == [p for p in data.split(b"ab") if p]
