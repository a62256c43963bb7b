"""Byte-order marks, line ends and repeated keys in files that people write; limits of all files."""

import gzip
import json
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from mmfree_jax.cli.prompts import read_prompts_file
from mmfree_jax.data.sources import InputFile, ReadOptions, read_batches
from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.experiments.accelerator.isa import assemble
from mmfree_jax.experiments.scaling.errors import ScalingError
from mmfree_jax.experiments.scaling.read import read_runs
from mmfree_jax.saved.huggingface import read_config
from mmfree_jax.text_files import decode_text, parse_json, read_bytes, read_json, read_text

ENCODINGS = ["utf-8", "utf-8-sig", "utf-16", "utf-32"]


@pytest.mark.parametrize("encoding", [*ENCODINGS, "utf-16-be", "utf-32-be"])
def test_the_mark_says_the_encoding(encoding):
    mark = "\ufeff" if encoding.endswith("be") else ""
    assert decode_text((mark + "naïve 日本 🙂").encode(encoding)) == "naïve 日本 🙂"


def test_only_the_first_mark_is_one():
    assert decode_text("\ufeff\ufeffa\ufeff".encode()) == "\ufeffa\ufeff"


def test_what_is_not_of_its_encoding_is_an_error():
    for data in (b"caf\xe9", b"\xff\xfea", b"\xef\xbb\xbf\xe9"):
        with pytest.raises(UnicodeDecodeError):
            decode_text(data)


def test_line_ends(tmp_path):
    (tmp_path / "a").write_bytes(b"\xef\xbb\xbfa\r\nb\rc\nd\xe2\x80\xa8e")
    assert read_text(tmp_path / "a") == "a\nb\nc\nd\u2028e"


def test_a_key_twice_in_json():
    assert parse_json('{"a": {"b": 1}, "b": [{"a": 2}]}') == {"a": {"b": 1}, "b": [{"a": 2}]}
    for text in ('{"a": 1, "b": 2, "a": 1}', '[{"x": {"a": 1, "a": 2}}]'):
        with pytest.raises(ValueError, match="key 'a' occurs twice in one object: keep one"):
            parse_json(text)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("[" * 100_000 + "]" * 100_000, "nested more than 100 deep"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, "nested more than 100 deep"),
        ("[" * 102 + "]" * 102, "nested more than 100 deep"),
        ('{"n": ' + "1" * 41 + "}", "a whole number has 41 digits"),
        ("1" * 5000, "a whole number has 5000 digits"),
        (r'{"a": ["x\ud800y"]}', r"'\\ud800' is half of a surrogate pair"),
        (r'{"\udc00": 1}', r"'\\udc00' is half of a surrogate pair"),
    ],
)
def test_what_no_field_holds_is_no_json(text, told):
    for given in (text, text.encode()):
        with pytest.raises(ValueError, match=told):
            parse_json(given)


def test_what_is_read_up_to_its_limits():
    value = parse_json("[" * 100 + "1" + "]" * 100)
    for _ in range(100):
        (value,) = value
    assert value == 1
    assert parse_json("9" * 40) == 10**40 - 1
    assert parse_json(r'["\ud83d\ude42", "\\ud800"]') == ["🙂", "\\ud800"]


def test_only_files_are_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opened for reading it would wait for a writer, for ever
    (tmp_path / "circle").symlink_to("circle")
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(2**40)
    for path, told in (
        (tmp_path / "pipe", "a named pipe, not a file"),
        ("/dev/null", "a device, not a file"),
        ("/dev/zero", "a device, not a file"),
        (tmp_path, "Is a directory"),
        (tmp_path / "circle", "Too many levels of symbolic links"),
        (tmp_path / "missing", "No such file"),
        (tmp_path / "sparse", "larger than the 512 MiB that are read of such a file"),
    ):
        for read in (read_bytes, read_text, read_json):
            with pytest.raises(OSError, match=told):
                read(path)
    (tmp_path / "sparse").write_bytes(b"x" * 2**20)
    assert len(read_bytes(tmp_path / "sparse", 2**20)) == 2**20
    with pytest.raises(OSError, match="larger than the 0 MiB"):
        read_bytes(tmp_path / "sparse", 2**20 - 1)


def test_a_pipe_that_is_open_already_is_read():
    """As a shell's <(...) gives it."""
    reader, writer = os.pipe()
    os.write(writer, b'{"a": 1}')
    os.close(writer)
    assert read_json(f"/dev/fd/{reader}") == {"a": 1}
    os.close(reader)


def test_config_json(tmp_path):
    text = '{"model_type": "llama", "hidden_size": 64, "hidden_size": 128}'
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ConfigError, match="key 'hidden_size' occurs twice"):
        read_config(tmp_path)
    (tmp_path / "config.json").write_text('\ufeff{"model_type": "other"}')
    with pytest.raises(ConfigError, match="model_type is 'other'"):
        read_config(tmp_path)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_prompts(encoding, tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("Once, ü\r\n\r\nTwice\r\n".encode(encoding))
    assert [p.text for p in read_prompts_file(file)] == ["Once, ü", "Twice"]
    file = tmp_path / "prompts.jsonl"
    file.write_bytes('{"prompt": "ü"}\r\n'.encode(encoding))
    assert [p.text for p in read_prompts_file(file)] == ["ü"]


@pytest.mark.parametrize(
    ("line", "told"),
    [
        (r'{"prompt": "a\ud800"}', r"line 2 is not JSON: '\\ud800' is half of a surrogate pair"),
        ('{"prompt": ' + "[" * 100_000, "line 2 is not JSON: nested more than 100 deep"),
        ('{"prompt_ids": [' + "1" * 41 + "]}", "line 2 is not JSON: a whole number has 41 digits"),
    ],
)
def test_prompts_that_are_none(line, told, tmp_path):
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(DataError, match=told):
        read_prompts_file(tmp_path / "prompts.jsonl")


def test_a_pipe_of_prompts_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "prompts.txt")
    with pytest.raises(DataError, match=r"prompts\.txt: a named pipe, not a file"):
        read_prompts_file(tmp_path / "prompts.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl", "a.jsonl.gz", "a.parquet", "a.arrow"])
def test_a_pipe_of_texts_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(DataError, match=f"{name}: a named pipe, not a file"):
        list(read_batches(InputFile(tmp_path / name), ReadOptions()))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_tables_of_runs(encoding, tmp_path):
    data = "params,tokens,loss\r\n1e6,2e7,3.5\r\n2e6,4e7,3.25\r\n".encode(encoding)
    (tmp_path / "a.csv").write_bytes(data)
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(data))
    for name in ("a.csv", "a.csv.gz"):
        assert list(read_runs([tmp_path / name]).loss) == [3.5, 3.25]


def test_a_column_twice_in_a_table_of_runs(tmp_path):
    table = pa.Table.from_arrays([pa.array([1.0])] * 3, ["params", "loss", "loss"])
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ScalingError, match="column 'loss' occurs twice"):
        read_runs([tmp_path / "a.parquet"])


def test_a_history_with_unusual_line_ends_is_whole(tmp_path):
    records = [
        {"kind": "sample", "step": 1, "tokens": 8, "text": "a\u2028b\x85c\x0cd"},
        {"kind": "train", "step": 2, "tokens": 16, "loss": 2.5},
    ]
    lines = [json.dumps(r, ensure_ascii=False) + "\n" for r in records]
    (tmp_path / "metrics.jsonl").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "summary.json").write_text('{"parameters": {"total": 100}}')
    frame = read_runs([tmp_path])
    assert (list(frame.loss), list(frame.tokens)) == ([2.5], [16.0])


def test_assembly_with_a_mark(tmp_path):
    (tmp_path / "a.asm").write_bytes(b"\xef\xbb\xbf; nothing\r\n")
    assert assemble(read_text(tmp_path / "a.asm")) == []
