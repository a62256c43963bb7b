"""Objects in buckets, against an S3 and a GCS server on this machine."""

import threading
from pathlib import Path

import pytest
from bucket_servers import Bucket
from faulty_proxy import Fault

from mmfree_jax import storage
from mmfree_jax.errors import ConfigError, StorageError
from mmfree_jax.storage import ChangedError, MissingError, Patience, Url, file_systems, parse_url


class _Sleeps:
    """Takes the place of waiting."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def patience(self, tries: int = 4) -> Patience:
        return Patience(tries=tries, first=1.0, longest=3.0, sleep=self.seconds.append, draw=_half)


def _half() -> float:
    return 0.5


@pytest.mark.parametrize(
    ("text", "url"),
    [
        ("gs://bucket/a/b", Url("gs", "bucket", "a/b")),
        ("s3://bucket/a/b/", Url("s3", "bucket", "a/b")),
        ("S3://bucket", Url("s3", "bucket", "")),
        ("gs://bucket/", Url("gs", "bucket", "")),
        ("gs://bucket/a b/50%/%20/é", Url("gs", "bucket", "a b/50%/%20/é")),
        (Path("gs://bucket/a"), Url("gs", "bucket", "a")),
    ],
)
def test_what_a_url_names(text, url):
    assert storage.is_url(text)
    assert parse_url(text) == url


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("gs://", "'' is no name of a bucket"),
        ("gs://-b/x", "'-b' is no name of a bucket"),
        ("gs://me@b/x", "'me@b' is no name of a bucket"),
        ("gs://bucket/a/../b", "leave out empty parts"),
        ("gs://bucket/./b", "leave out empty parts"),
        ("s3://bucket//b", "leave out empty parts"),
        ("s3://bucket/a\nb", "printable characters"),
        ("s3://bucket/" + "é" * 513, "1024 bytes"),
        ("runs/a", "give gs://BUCKET/NAME or s3://BUCKET/NAME"),
    ],
)
def test_what_is_malformed(text, why):
    with pytest.raises(ConfigError, match=why) as caught:
        parse_url(text, "run_dir")
    assert str(caught.value).startswith("run_dir is ")


def test_a_urls_parts_are_put_together():
    url = parse_url("gs://bucket/runs")
    assert str(url / "a b" / "config.yaml") == "gs://bucket/runs/a b/config.yaml"
    assert (url / "a" / "b").name == "b"
    assert str(parse_url("s3://bucket") / "x") == "s3://bucket/x"


def test_an_object_is_written_read_and_found(bucket: Bucket, tmp_path):
    url = parse_url(f"{bucket.url}/a b/50%20#1?+é")
    assert storage.find_object(url) is None
    with pytest.raises(MissingError, match=r"50%20#1\?\+é does not exist$"):
        storage.read_bytes(url)
    storage.write_bytes(url, b"0123456789")
    assert storage.read_bytes(url) == b"0123456789"
    assert storage.read_bytes(url, 2, 5) == b"234"
    assert storage.read_bytes(url, 7) == b"789"
    found = storage.find_object(url)
    assert found is not None
    assert (found.url, found.size) == (url, 10)
    storage.write_bytes(url, b"other")
    assert storage.find_object(url) != found
    storage.download(url, tmp_path / "here")
    assert (tmp_path / "here").read_bytes() == b"other"
    storage.upload(tmp_path / "here", url / "below")
    assert storage.read_bytes(url / "below") == b"other"
    storage.delete(url)
    storage.delete(url)
    assert storage.find_object(url) is None


def test_a_disk_that_is_full_is_no_failure_of_the_bucket(bucket: Bucket, full_disk, tmp_path):
    url = parse_url(bucket.url) / "x"
    storage.write_bytes(url, bytes(2**20))
    with pytest.raises(OSError, match="No space left"):
        storage.download(url, full_disk / "here")
    with pytest.raises(FileNotFoundError, match="not-there"):
        storage.upload(tmp_path / "not-there", url)


@pytest.mark.parametrize(
    "data", [b"\r", b"ends\r", b"ends\n", b"ends\r\n", b"\n--==0==--\n", b"\r\n--==0==\r\n"]
)
def test_bytes_that_end_lines_come_as_they_were(bucket: Bucket, tmp_path, data):
    (tmp_path / "x").write_bytes(data)
    url = parse_url(bucket.url)
    storage.upload(tmp_path / "x", url / "uploaded")
    storage.write_bytes(url / "written", data)
    storage.create(url / "created", data)
    assert [storage.read_bytes(o.url) for o in storage.list_below(url)] == [data] * 3


def test_an_object_that_is_another_than_was_sent_is_sent_again(gcs_bucket: Bucket, tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    url = parse_url(gcs_bucket.url) / "x"
    storage.upload(tmp_path / "x", url)
    said = gcs_bucket.proxy.ask("GET", f"/storage/v1/b/{url.bucket}/o/x").body
    md5 = said.index(b"kAFQmDzST7DWlj99KOF/cg==")  # of abc
    gcs_bucket.proxy.add(Fault("^POST /upload/", times=1, flip=md5))
    waits = _Sleeps()
    storage.upload(tmp_path / "x", url, patience=waits.patience())
    assert len(waits.seconds) == 1


def test_what_lies_below_is_listed_and_deleted(bucket: Bucket):
    top = parse_url(bucket.url)
    for name in ("run/a", "run/c/1", "run/c/2", "run-2/a", "run"):
        storage.write_bytes(top / name, name.encode())
    assert [(o.url.key, o.size) for o in storage.list_below(top / "run")] == [
        ("run/a", 5),
        ("run/c/1", 7),
        ("run/c/2", 7),
    ]
    assert storage.list_names(top / "run") == ["a", "c"]
    assert storage.list_names(top) == ["run", "run-2"]
    assert storage.list_names(top / "none") == storage.list_below(top / "none") == []
    storage.delete_below(top / "run")
    assert [o.url.key for o in storage.list_below(top)] == ["run", "run-2/a"]


def test_a_conditional_write_does_nothing_where_another_was_first(bucket: Bucket):
    url = parse_url(bucket.url) / "table"
    first = storage.create(url, b"one")
    with pytest.raises(ChangedError, match="table was written by another job"):
        storage.create(url, b"two")
    second = storage.replace(url, b"three", first)
    with pytest.raises(ChangedError):
        storage.replace(url, b"four", first)
    found = storage.find_object(url)
    assert found is not None
    assert found.version == second
    assert storage.read_bytes(url) == b"three"
    storage.delete(url)
    with pytest.raises(ChangedError):
        storage.replace(url, b"five", second)


def test_one_of_many_writers_at_once_makes_the_object(bucket: Bucket):
    url, made = parse_url(bucket.url) / "one", []

    def write(number: int) -> None:
        try:
            storage.create(url, b"%d" % number)
        except ChangedError:
            return
        made.append(number)

    threads = [threading.Thread(target=write, args=(n,)) for n in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1
    assert storage.read_bytes(url) == b"%d" % made[0]


@pytest.mark.parametrize(
    "fault",
    [Fault(status=500), Fault(status=503), Fault(status=429), Fault(keep=3), Fault(keep=0)],
    ids=["500", "503", "429", "short read", "no bytes"],
)
def test_what_may_pass_is_tried_again_after_longer_and_longer_waits(bucket: Bucket, fault):
    url, sleeps = parse_url(bucket.url) / "x", _Sleeps()
    storage.write_bytes(url, b"0123456789")
    bucket.proxy.add(Fault(**{**vars(fault), "match": "GET", "times": 3}))
    assert storage.read_bytes(url, patience=sleeps.patience()) == b"0123456789"
    assert sleeps.seconds == [0.75, 1.5, 2.25]  # of 1, 2 and at most 3 s, three quarters


def test_a_read_that_keeps_failing_names_the_object_and_the_try(bucket: Bucket):
    url = parse_url(bucket.url) / "x"
    storage.write_bytes(url, b"0123456789")
    bucket.proxy.add(Fault(match="GET", status=503))
    with pytest.raises(StorageError, match=rf"^{url} cannot be read: try 4 of 4 failed \(.*\): "):
        storage.read_bytes(url, patience=_Sleeps().patience())
    assert len(bucket.proxy.requests("GET")) == 4


def test_a_conditional_write_whose_answer_is_lost_is_known_as_ones_own(bucket: Bucket):
    url = parse_url(bucket.url) / "x"
    bucket.proxy.add(Fault(match="POST|PUT", lost=True, times=1))
    version = storage.create(url, b"mine", patience=_Sleeps().patience())
    assert storage.replace(url, b"next", version)


def test_a_server_that_is_silent_counts_as_a_failed_try(bucket: Bucket, monkeypatch):
    monkeypatch.setenv("MMFREE_STORAGE_SECONDS", "0.3")
    url = parse_url(bucket.url) / "x"
    storage.write_bytes(url, b"here")
    bucket.proxy.add(Fault(match="GET", hang=True, times=1))
    assert storage.read_bytes(url, patience=_Sleeps().patience()) == b"here"


@pytest.mark.parametrize("status", [401, 403])
def test_what_is_refused_is_said_after_reading_the_credentials_anew(bucket: Bucket, status):
    url, sleeps = parse_url(bucket.url) / "x", _Sleeps()
    bucket.proxy.add(Fault(status=status))
    with pytest.raises(StorageError, match=f"{url} cannot be written: permission denied or cred"):
        storage.write_bytes(url, b"", patience=sleeps.patience())
    assert len(bucket.proxy.requests()) == 2
    bucket.proxy.clear()
    bucket.proxy.add(Fault(status=status, times=1))
    storage.write_bytes(url, b"", patience=sleeps.patience())


def test_a_bucket_that_is_not_there_is_named(bucket: Bucket):
    url = parse_url(bucket.url.replace("://", "://no-")) / "x"
    for act in (
        lambda: storage.check_bucket(url),
        lambda: storage.write_bytes(url, b""),
        lambda: storage.create(url, b"x"),
        lambda: storage.list_below(url),
    ):
        with pytest.raises(StorageError, match=f"{url} cannot be used: there is no bucket 'no-"):
            act()
    storage.check_bucket(parse_url(bucket.url) / "x")


def test_a_missing_extra_is_one_line(monkeypatch):
    monkeypatch.setitem(file_systems._MODULES, "gs", "no_such_package")
    with pytest.raises(ConfigError) as caught:
        storage.check_bucket(parse_url("gs://bucket/x"))
    assert str(caught.value).startswith("gs://bucket/x (extra gcs) needs no_such_package, ")
    assert "pip install" in str(caught.value)
    assert "[gcs]" in str(caught.value)
