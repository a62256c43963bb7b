"""The object stores of the tests: what they honour, and the faults in front of them."""

import concurrent.futures
import http.client
import os
import urllib.error
import urllib.request

import fsspec
import pytest
from faulty_proxy import Fault

# moto asks for a signature and does not check it.
_SIGNED = {"Authorization": "AWS4-HMAC-SHA256 Credential=tests/20260101/us-east-1/s3/aws4_request"}


def _client(bucket):
    return fsspec.filesystem(bucket.server.scheme, use_listings_cache=False)


def _get(bucket, name):
    prefix = "/" if bucket.server.scheme == "s3" else "/download/storage/v1/b/"
    middle = "/" if bucket.server.scheme == "s3" else "/o/"
    address = f"{bucket.proxy.url}{prefix}{bucket.url[5:]}{middle}{name}"
    request = urllib.request.Request(address, headers=_SIGNED)
    with urllib.request.urlopen(request, timeout=20) as answer:
        return answer.read()


def test_objects_of_any_name_and_size_come_back_as_they_went(bucket):
    client, data = _client(bucket), os.urandom(6 << 20)
    for name in ("a b%20c/ü#?&.bin", "big"):
        client.pipe_file(f"{bucket.url}/{name}", data)
        assert client.cat_file(f"{bucket.url}/{name}") == data
        assert client.cat_file(f"{bucket.url}/{name}", start=70, end=7000) == data[70:7000]
    assert client.find(bucket.url) == [
        f"{bucket.url[5:]}/a b%20c/ü#?&.bin",
        f"{bucket.url[5:]}/big",
    ]


@pytest.mark.parametrize("end", [b"\r", b"\n", b"\r\n", b"\n--==0==--", b"\r\n\r\n"])
def test_what_ends_like_a_part_of_a_message_comes_back_as_it_went(bucket, end):
    client = _client(bucket)
    for data in (end, bytes(range(256)) + end, end + b"x" * (6 << 20) + end):
        client.pipe_file(f"{bucket.url}/x", data)
        assert client.cat_file(f"{bucket.url}/x") == data


@pytest.mark.parametrize("size", [10, 6 << 20])
def test_of_many_writers_that_create_an_object_one_succeeds(bucket, size, tmp_path):
    client = _client(bucket)

    def create(i):
        file = tmp_path / str(i)
        file.write_bytes(bytes([i]) * size)
        try:
            client.put_file(str(file), f"{bucket.url}/lock", mode="create")
        except FileExistsError:
            return None
        return i

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        created = [i for i in pool.map(create, range(4)) if i is not None]
    assert len(created) == 1
    assert set(client.cat_file(f"{bucket.url}/lock")) == {created[0]}


def test_gcs_generations_are_compared_where_an_object_is_written_read_copied_or_deleted(gcs_bucket):
    name, ask = gcs_bucket.url[5:], _ask(gcs_bucket)
    upload = f"/upload/storage/v1/b/{name}/o?uploadType=media&name=a"
    assert ask("POST", f"{upload}&ifGenerationMatch=5", b"1") == 412
    assert ask("POST", f"{upload}&ifGenerationMatch=0", b"1") == 200
    assert ask("POST", f"{upload}&ifGenerationMatch=0", b"2") == 412
    now = _client(gcs_bucket).info(f"{gcs_bucket.url}/a")["generation"]
    there, copy = f"/storage/v1/b/{name}/o/a", f"/rewriteTo/b/{name}/o/c%2Fd"
    assert ask("POST", f"{upload}&ifGenerationNotMatch={now}", b"2") == 412
    assert ask("GET", f"{there}?alt=media&ifGenerationNotMatch={now}") == 304
    assert ask("GET", f"{there}?alt=media&ifGenerationMatch={now}") == 200
    assert ask("GET", f"{there}?alt=media&ifGenerationMatch=7") == 412
    assert ask("POST", f"{there}{copy}?ifGenerationMatch=0") == 200
    assert ask("POST", f"{there}{copy}?ifGenerationMatch=0") == 412
    assert ask("DELETE", f"{there}?ifGenerationMatch=7") == 412
    assert ask("DELETE", f"{there}?ifGenerationMatch={now}") == 200
    assert _client(gcs_bucket).find(gcs_bucket.url) == [f"{name}/c/d"]


def test_s3_etags_are_compared_where_an_object_is_written_read_or_deleted(s3_bucket):
    path, ask = f"/{s3_bucket.url[5:]}/a", _ask(s3_bucket)
    assert ask("PUT", path, b"1", {"If-None-Match": "*"}) == 200
    assert ask("PUT", path, b"2", {"If-None-Match": "*"}) == 412
    now = _client(s3_bucket).info(f"{s3_bucket.url}/a")["ETag"]
    assert ask("PUT", path, b"2", {"If-Match": '"0"'}) == 412
    assert ask("GET", path, b"", {"If-None-Match": now}) == 304
    assert ask("GET", path, b"", {"If-Match": '"0"'}) == 412
    assert ask("DELETE", path, b"", {"If-Match": '"0"'}) == 412
    assert ask("PUT", path, b"2", {"If-Match": now}) == 200
    assert _client(s3_bucket).cat_file(f"{s3_bucket.url}/a") == b"2"


def _ask(bucket):
    def ask(method, target, body=b"", headers=None):
        connection = http.client.HTTPConnection(bucket.proxy.url[7:], timeout=20)
        connection.request(method, target, body, {**_SIGNED, **(headers or {})})
        status = connection.getresponse().status
        connection.close()
        return status

    return ask


def test_a_fault_meets_as_many_requests_as_it_says_and_those_that_it_names(bucket):
    _client(bucket).pipe_file(f"{bucket.url}/a", b"abc")
    _client(bucket).pipe_file(f"{bucket.url}/b", b"abc")
    bucket.proxy.clear()
    bucket.proxy.add(Fault("GET .*/a", times=2, after=1, status=503), Fault("/a", 1, status=500))
    statuses = []
    for name in ("a", "a", "b", "a", "a"):
        try:
            statuses.append(_get(bucket, name))
        except urllib.error.HTTPError as e:
            statuses.append(e.code)
    assert statuses == [b"abc", 503, b"abc", 503, 500]
    assert len(bucket.proxy.requests("GET .*/a$")) == 4
    assert len(bucket.proxy.requests()) == 5


def test_answers_are_cut_short_changed_late_lost_or_never_come(bucket):
    _client(bucket).pipe_file(f"{bucket.url}/a", b"abcdef")
    bucket.proxy.add(
        Fault("GET", 1, keep=2),
        Fault("GET", 1, flip=5),
        Fault("GET", 1, lost=True),
        Fault("GET", 1, delay_s=0.01),
    )
    with pytest.raises(http.client.IncompleteRead) as cut:
        _get(bucket, "a")
    assert (cut.value.partial, cut.value.expected) == (b"ab", 4)
    assert _get(bucket, "a") == b"abcdeg"
    with pytest.raises(http.client.RemoteDisconnected):
        _get(bucket, "a")
    assert _get(bucket, "a") == b"abcdef"
    bucket.proxy.add(Fault("GET", hang=True))
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(_get, bucket, "a")
        while len(bucket.proxy.requests("GET .*a")) < 5:
            assert not hanging.done()
        assert not hanging.done()
        bucket.proxy.clear()
        with pytest.raises(http.client.RemoteDisconnected):
            hanging.result()


@pytest.mark.parametrize(("status", "error"), [(403, OSError), (404, FileNotFoundError)])
def test_clients_understand_the_errors(bucket, status, error):
    _client(bucket).pipe_file(f"{bucket.url}/a", b"abc")
    bucket.proxy.add(Fault(status=status))
    with pytest.raises(error):
        _client(bucket).cat_file(f"{bucket.url}/a")
    bucket.proxy.clear()
    assert _client(bucket).cat_file(f"{bucket.url}/a") == b"abc"
