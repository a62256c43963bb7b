"""From files to documents: separators, line ends, marks, and what is left out."""

import gzip

import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from read_records import texts

from mmfree_jax.cli import data as data_cli
from mmfree_jax.data.prepare import PrepareConfig
from mmfree_jax.data.reading import Tally
from mmfree_jax.data.text_split import split_text
from mmfree_jax.errors import ConfigError, DataError


def test_sixteen_and_thirty_two_bits_without_a_mark_are_no_utf_8(tmp_path):
    """Their bytes are UTF-8 too, with a NUL behind or before each letter."""
    for name in ("a.txt", "a.jsonl"):
        for encoding in ("utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"):
            file = tmp_path / name
            file.write_bytes('{"text": "plain"}'.encode(encoding))
            with pytest.raises(
                DataError, match=f"a\\.[a-z]+ is {encoding.upper()} without a .*mark"
            ):
                texts(file)


# Separators.


@settings(max_examples=200)
@given(
    documents=st.lists(st.text("ab<|>\n", max_size=12), min_size=1, max_size=6),
    separator=st.sampled_from(["<|>", "aab", "\n\n", "|\n"]),
    windows=st.booleans(),
    block=st.integers(1, 7),
    size=st.integers(4, 9),
)
def test_blocks_and_cuts_leave_no_part_of_a_separator(documents, separator, windows, block, size):
    text = separator.join(documents)
    whole = [p for p in text.split(separator) if p]
    data = (text.replace("\n", "\r\n") if windows else text).encode()
    blocks = [data[i : i + block] for i in range(0, len(data), block)]
    pieces = list(split_text(iter(blocks), separator, size))
    # Put together again up to each separator, they are what splitting the whole text gives.
    found = [""]
    for piece in pieces:
        assert len(piece.text) <= size
        found[-1] += piece.text.decode()
        if piece.end == "separator":
            found.append("")
    assert [f.replace("\r\n", "\n") for f in found if f] == whole
    assert sum(p.end == "separator" for p in pieces) == text.count(separator)


@pytest.mark.parametrize("before", range(-14, 3))
def test_a_separator_across_a_block_and_the_longest_document(before, tmp_path):
    """A document just shorter than the limit, whose separator straddles a block of 1 MiB."""
    first = b"a" * (2**20 + before)
    data = first + b"<|endoftext|>" + b"b" * 1000
    found = [
        p.text for p in split_text(iter([data[: 2**20], data[2**20 :]]), "<|endoftext|>", 2**20)
    ]
    expected = [first, b"b" * 1000]
    if before > 0:
        expected[:1] = [first[: 2**20], first[2**20 :]]
    assert found == expected


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("separator", ["\n\n", "\r\n\r\n", "\n---\n"])
def test_windows_line_ends(end, separator, tmp_path):
    lines = separator.replace("\r\n", "\n").replace("\n", end)
    (tmp_path / "a.txt").write_bytes(lines.join(["one", f"two{end}more", "three"]).encode())
    tally = Tally()
    found = texts(tmp_path / "a.txt", txt_separator=separator, tally=tally)
    assert found == ["one", f"two{end}more", "three"]
    assert tally.separators == 2


def test_a_separator_that_never_occurs_is_said(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("one\n\ntwo")
    (tmp_path / "b.txt").write_text("three\\n\\nfour")
    arguments = ["--workers", "1", "--heldout-fraction", "0", "--txt-separator", "\\n\\n"]
    files = [str(tmp_path / name) for name in ("a.txt", "b.txt")]
    data_cli.prepare([*arguments, "--out", str(tmp_path / "out"), "--input", *files])
    note = f"note       {files[0]}: the separator '\\\\n\\\\n' occurs nowhere in 1 file of text"
    note += "; line ends are typed as $'\\n' in a shell"
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("note")] == [note]


def test_a_separator_that_no_file_can_take_is_said(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "one##two"}')
    arguments = ["--workers", "1", "--heldout-fraction", "0", "--txt-separator", "##"]
    data_cli.prepare([*arguments, "--out", f"{tmp_path}/out", "--input", f"{tmp_path}/a.jsonl"])
    note = "note       --txt-separator '##' cut nothing: no file is plain text"
    assert [x for x in capsys.readouterr().out.splitlines() if x.startswith("note")] == [note]


def test_cuts_of_long_texts_are_counted(tmp_path):
    (tmp_path / "a.txt").write_text("line\n" * 10)
    tally = Tally()
    assert texts(tmp_path / "a.txt", max_document_bytes=20, tally=tally) == [
        "line\n" * 4,
        "line\n" * 4,
        "line\n" * 2,
    ]
    assert tally.cut == 2


# Byte-order marks.


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("pack", [lambda b: b, gzip.compress, zstandard.compress])
def test_marks(encoding, pack, tmp_path):
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    suffix = {gzip.compress: ".gz", zstandard.compress: ".zst"}.get(pack, "")
    long = "日本🙂é" * 100_000  # blocks end inside characters
    text = tmp_path / f"a.txt{suffix}"
    text.write_bytes(pack(f"{mark}one<|>{long}".encode(encoding)))
    assert texts(text, txt_separator="<|>") == ["one", long]
    lines = tmp_path / f"a.jsonl{suffix}"
    lines.write_bytes(pack((mark + '{"text": "é"}\r\n{"text": "b"}').encode(encoding)))
    assert texts(lines) == ["é", "b"]


def test_short_files_and_marks(tmp_path):
    for data, expected in [
        (b"\xef\xbb\xbf", []),
        (b"\xef\xbb\xbfa", ["a"]),
        (b"", []),
        (b"x", ["x"]),
    ]:
        (tmp_path / "a.txt").write_bytes(data)
        assert texts(tmp_path / "a.txt") == expected
    (tmp_path / "a.txt").write_bytes(b"\xff\xfea\x00b")
    with pytest.raises(DataError, match=r"a\.txt begins with the mark of UTF-16-LE and is not"):
        texts(tmp_path / "a.txt")


# Zstandard.


def test_a_window_of_two_gibibytes(tmp_path):
    parameters = zstandard.ZstdCompressionParameters(
        compression_level=1, window_log=31, enable_ldm=True, hash_log=12, chain_log=12
    )
    compressor = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    data = compressor.compress(b'{"text": "one"}\n{"text": "two"}\n') + compressor.flush()
    assert zstandard.get_frame_parameters(data).window_size == 2**31
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    assert texts(tmp_path / "a.jsonl.zst") == ["one", "two"]


def test_a_window_that_is_too_large_is_said(tmp_path, monkeypatch):
    from mmfree_jax.data import sources

    monkeypatch.setattr(sources, "_ZSTD_WINDOW", 2**20)
    compressor = zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters(window_log=24)
    ).compressobj()
    data = compressor.compress(b'{"text": "one"}\n') + compressor.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    with pytest.raises(DataError, match="window of at most 1 MiB") as error:
        texts(tmp_path / "a.jsonl.zst")
    assert "not whole" not in str(error.value)


def test_a_dictionary_is_said(tmp_path):
    dictionary = zstandard.train_dictionary(2**10, [b"some text %d" % i for i in range(1000)])
    data = zstandard.ZstdCompressor(dict_data=dictionary).compress(b'{"text": "one"}')
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    with pytest.raises(DataError, match="was compressed with a dictionary"):
        texts(tmp_path / "a.jsonl.zst")


def test_bad_settings():
    for change, message in [
        ({"text_field": ""}, "text_field is ''"),
        ({"splits": ()}, "splits is"),
    ]:
        with pytest.raises(ConfigError, match=message):
            PrepareConfig(out="x", input=("a",), **change)
