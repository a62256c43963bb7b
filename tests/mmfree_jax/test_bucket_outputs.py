"""Folders of commands in buckets: whole or marked, and nothing is replaced that is others'."""

import json
import re
import tempfile

import pytest
from bucket_files import do_not_wait
from faulty_proxy import Fault

from mmfree_jax import files, leases, outputs, storage
from mmfree_jax.errors import ConfigError, OutputError, StorageError
from mmfree_jax.fetched import local_copy
from mmfree_jax.leases import InUseElsewhereError
from mmfree_jax.prefixes import names_below
from mmfree_jax.storage import parse_url, read_bytes, write_bytes


@pytest.fixture(autouse=True)
def _quick(monkeypatch, tmp_path):
    do_not_wait(monkeypatch)
    monkeypatch.setenv("MMFREE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))


def _make(url, names=("a", "sub/b"), *, command="export x", **options):
    with outputs.new_folder(url, command=command, **options) as folder:
        for name in names:
            (folder / name).parent.mkdir(exist_ok=True)
            (folder / name).write_text(f"{name} of {command}")


def _names(url):
    return sorted(names_below(parse_url(url)))


def _text(url):
    return read_bytes(parse_url(url)).decode()


def test_a_folder_is_uploaded_between_its_marks(bucket, tmp_path):
    url = f"{bucket.url}/models/a b"
    _make(url, ["a", "done", "sub/z"], last="done")
    assert _names(url) == [".mmfree-output.json", "a", "done", "sub/z"]
    marker = json.loads(_text(f"{url}/.mmfree-output.json"))
    assert marker == {"command": "export x", "files": ["a", "done", "sub/z"]}
    assert _text(f"{url}/sub/z") == "sub/z of export x"
    assert (local_copy(url, "model") / "done").read_text() == "done of export x"
    assert list((tmp_path / "temporary").iterdir()) == []


def test_marks_come_first_and_go_last(s3_bucket):
    _make(f"{s3_bucket.url}/m", ["a", "done", "sub/z"], last="done")
    _make(f"{s3_bucket.url}/m", ["a", "done"], last="done", overwrite=True)
    asked = s3_bucket.proxy.requests(r"^(PUT|DELETE) ")
    assert [re.sub(r"/bucket-\d+/m/|\?.*", "", line) for line in asked] == [
        "PUT .lease.json",
        "PUT .mmfree-uploading.json",
        "PUT a",
        "PUT sub/z",
        "PUT done",
        "PUT .mmfree-output.json",
        "DELETE .mmfree-uploading.json",
        "DELETE .lease.json",
        "PUT .lease.json",
        "PUT .mmfree-uploading.json",
        "DELETE done",
        "DELETE .mmfree-output.json",
        "PUT a",
        "PUT done",
        "PUT .mmfree-output.json",
        "DELETE sub/z",
        "DELETE .mmfree-uploading.json",
        "DELETE .lease.json",
    ]


def test_an_earlier_output_is_replaced_only_when_asked(bucket):
    url = f"{bucket.url}/m"
    _make(url, ["a", "old", "done"], last="done")
    with pytest.raises(OutputError, match=f"^{url} exists already: .* or pass --overwrite$"):
        _make(url, ["a", "new"], overwrite=False)
    assert _names(url) == [".mmfree-output.json", "a", "done", "old"]
    _make(url, ["a", "new", "done"], overwrite=True, last="done")
    assert _names(url) == [".mmfree-output.json", "a", "done", "new"]


def test_what_others_wrote_stays(gcs_bucket):
    url = f"{gcs_bucket.url}/m"
    _make(url)
    for other in (url, f"{gcs_bucket.url}/theirs"):
        write_bytes(parse_url(f"{other}/sub/notes"), b"mine")
    write_bytes(parse_url(f"{gcs_bucket.url}/one"), b"mine")
    before = _names(gcs_bucket.url)
    for target, command, wanted in (
        (url, "export x", "also holds sub/notes, which `mmfree export x` did not write"),
        (url, "export y", "`mmfree export x` wrote it, not `mmfree export y`"),
        (f"{gcs_bucket.url}/theirs", "export x", "was not written by `mmfree export x`"),
        (f"{gcs_bucket.url}/one", "export x", "one is an object: choose another folder"),
        (gcs_bucket.url, "export x", "is a whole bucket: name a new folder inside it"),
    ):
        with pytest.raises(OutputError, match=wanted):
            _make(target, command=command, overwrite=True)
    for source in (f"{url}/sub", url, f"{gcs_bucket.url}/"):
        with pytest.raises(OutputError, match=r"is, holds or lies in .*, which is read"):
            _make(url, sources=["/tmp", source], overwrite=True)
    assert _names(gcs_bucket.url) == before


def _upload(name):
    """What proxies see of the upload of an object whose name ends so."""
    return rf"^(PUT /\S*/m/{name}$|POST /upload/)"


def test_an_upload_that_fails_is_known_to_readers_and_written_again(bucket):
    url = f"{bucket.url}/m"
    after = 0 if bucket.server.scheme == "s3" else 3  # the lease, the mark, a
    bucket.proxy.add(Fault(_upload("done"), after=after, status=503))
    with pytest.raises(StorageError, match=rf"{url}/done cannot be written: try 3 of 3 failed"):
        _make(url, ["a", "done"], last="done")
    bucket.proxy.clear()
    assert _names(url) == [".mmfree-uploading.json", "a"]
    with pytest.raises(StorageError, match=f"^model {url} is half written: .* run that again$"):
        local_copy(url, "model")
    with pytest.raises(OutputError, match="`mmfree export x` wrote it, not `mmfree export y`"):
        _make(url, command="export y", overwrite=True)
    write_bytes(parse_url(f"{url}/mine"), b"mine")
    with pytest.raises(OutputError, match="also holds mine, which"):
        _make(url, ["b", "done"], last="done")
    storage.delete(parse_url(f"{url}/mine"))
    _make(url, ["b", "done"], last="done")
    assert _names(url) == [".mmfree-output.json", "b", "done"]


def test_an_earlier_output_is_unknown_from_the_first_byte_that_replaces_it(s3_bucket):
    url = f"{s3_bucket.url}/m"
    _make(url, ["a", "done"], last="done")
    s3_bucket.proxy.add(Fault(_upload("a"), status=403))
    with pytest.raises(StorageError, match="a cannot be written: permission denied"):
        _make(url, ["a", "done"], last="done", overwrite=True)
    s3_bucket.proxy.clear()
    assert _names(url) == [".mmfree-uploading.json", "a"]
    _make(url, ["a", "done"], last="done")
    assert _names(url) == [".mmfree-output.json", "a", "done"]


def test_an_error_in_the_block_changes_nothing(s3_bucket, tmp_path):
    url = f"{s3_bucket.url}/m"
    _make(url, ["old"])
    with pytest.raises(TypeError):
        _make(url, ["new", 1], overwrite=True)

    def write_over_a_folder():
        with outputs.new_folder(url, command="export x", overwrite=True) as folder:
            (folder / "sub").mkdir()
            files.write_text(folder / "sub", "x")

    with pytest.raises(OutputError, match=f"^{url}/sub is a folder"):
        write_over_a_folder()
    assert _names(url) == [".mmfree-output.json", "old"]
    assert list((tmp_path / "temporary").iterdir()) == []


def test_two_writers_do_not_mix(bucket, monkeypatch):
    monkeypatch.setenv(leases.SECONDS, "1")
    url = f"{bucket.url}/m"
    with outputs.new_folder(url, command="export x") as folder:
        (folder / "a").write_text("of the first")
        with pytest.raises(InUseElsewhereError, match=f"^output {url} is in use by another job"):
            _make(url)
    assert _names(url) == [".mmfree-output.json", "a"]
    assert _text(f"{url}/a") == "of the first"


def test_a_writer_that_died_is_waited_out(s3_bucket, monkeypatch):
    monkeypatch.setenv(leases.SECONDS, "0.4")
    url = f"{s3_bucket.url}/m"
    leases.take_lease(parse_url(url) / leases.LEASE, "output", "process 1 on a")  # never renewed
    _make(url)
    assert _names(url) == [".mmfree-output.json", "a", "sub/b"]


def test_where_nothing_can_be_written_is_one_line(bucket):
    bucket.proxy.add(Fault(r"^(PUT|POST) ", status=403))
    with pytest.raises(StorageError, match=r"m/.lease.json cannot be written: permission denied"):
        _make(f"{bucket.url}/m")
    bucket.proxy.clear()
    with pytest.raises(StorageError, match="there is no bucket 'nobody-has-this'"):
        _make(f"{bucket.server.scheme}://nobody-has-this/m")
    with pytest.raises(ConfigError, match=r"output is 'abfss://c/m': URLs of abfss: are not"):
        _make("abfss://c/m")
