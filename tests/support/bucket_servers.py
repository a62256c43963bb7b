"""Object stores on loopback for the tests: moto for S3, gcp-storage-emulator for GCS.

Both are the packages from PyPI, each behind a `FaultyProxy`. What they honour of themselves, tried
with moto 5.2.5 and gcp-storage-emulator 2026.7.19:

  S3   `If-Match` and `If-None-Match: *` of PUT, of the end of a multipart upload and (`If-Match`)
       of DELETE, but not atomically: two PUTs at once may both find nothing. The proxy lets one
       write through at a time, which is all it adds.
  GCS  no precondition at all. The proxy adds `ifGenerationMatch` and `ifGenerationNotMatch` (0 is
       "no such object") to uploads of every kind, copies, rewrites, composed objects, deletions and
       reads (a resumable upload is asked when it begins and with each part, the last one too), and
       lets an upload be given up. The emulator reads a multipart upload as an e-mail and loses a
       carriage return at its end to the line break behind; the proxy sends it base64.

What is left unlike the real ones: lists come in one page (GCS), signatures and tokens are not
checked (a `Fault` stands for those that expired: status 401 of GCS, 400 of S3, 403 where they may
not), GCS's emulator answers one request at a time and takes no empty upload of type media.
"""

import base64
import contextlib
import itertools
import json
import logging
import re
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
from faulty_proxy import Answer, FaultyProxy, Request

_NUMBERS = itertools.count()
_REASONS = {
    400: "The provided token has expired.",
    401: "Invalid Credentials",
    403: "does not have storage.objects.get access",
    404: "The specified bucket does not exist.",
    412: "At least one of the pre-conditions you specified did not hold.",
    429: "rate limit exceeded",
    500: "We encountered an internal error. Please try again.",
    503: "Service Unavailable",
}
_S3_CODES = {
    400: "ExpiredToken", 403: "AccessDenied", 404: "NoSuchBucket", 412: "PreconditionFailed",
    429: "SlowDown", 500: "InternalError", 503: "SlowDown",
}  # fmt: skip


@dataclass(frozen=True)
class BucketServer:
    """An object store that tests use."""

    scheme: str
    """gs or s3."""
    proxy: FaultyProxy
    """In front of it: its URL, its requests, its faults."""
    environment: dict[str, str]
    """Variables by which clients find it and may use it."""

    def make_bucket(self) -> str:
        """Makes an empty bucket of a name that none had; its URL, without a slash behind it."""
        name = f"bucket-{next(_NUMBERS)}"
        if self.scheme == "s3":
            answer = self.proxy.ask("PUT", f"/{name}")
        else:
            body = json.dumps({"name": name}).encode()
            headers = [("Content-Type", "application/json")]
            answer = self.proxy.ask("POST", "/storage/v1/b?project=tests", headers, body)
        assert answer.status == 200, answer
        return f"{self.scheme}://{name}"


@dataclass(frozen=True)
class Bucket:
    """An empty bucket that a test may fill."""

    url: str
    """gs://NAME or s3://NAME."""
    server: BucketServer
    """Where it is."""

    @property
    def proxy(self) -> FaultyProxy:
        """Adds faults, counts requests."""
        return self.server.proxy


def _gcs_error(status: int, code: str) -> Answer:
    reason = code or _REASONS.get(status, "error")
    body = {"error": {"code": status, "message": reason, "errors": [{"reason": reason}]}}
    return Answer(status, (("Content-Type", "application/json"),), json.dumps(body).encode())


def _s3_error(status: int, code: str) -> Answer:
    code = code or _S3_CODES.get(status, "Error")
    reason = _REASONS.get(status, "error")
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>{reason}</Message></Error>"
    return Answer(status, (("Content-Type", "application/xml"),), body.encode())


def _check_generation(request: Request, ask: Callable[[str, str], Answer]) -> Answer | None:
    """The answer where a precondition of GCS does not hold, or the emulator has none."""
    address = urllib.parse.urlsplit(request.raw)
    query = dict(urllib.parse.parse_qsl(address.query))
    if request.method == "DELETE" and "upload_id" in query:
        return Answer(499)  # the upload is given up
    wanted, unwanted = query.get("ifGenerationMatch"), query.get("ifGenerationNotMatch")
    if wanted is None and unwanted is None:
        return None
    bucket, name = _object(request.body, address.path, query)
    found = ask("GET", f"/storage/v1/b/{bucket}/o/{urllib.parse.quote(name, safe='')}")
    now = json.loads(found.body)["generation"] if found.status == 200 else "0"
    if wanted not in (None, now):
        return _gcs_error(412, "conditionNotMet")
    if unwanted == now:
        return Answer(304) if request.method == "GET" else _gcs_error(412, "conditionNotMet")
    return None


def _object(body: bytes, path: str, query: dict[str, str]) -> tuple[str, str]:
    """(bucket, name) of the object that a request reads or makes."""
    copied = re.search(r"/(?:copyTo|rewriteTo)(/b/.*)", path)
    path = (copied[1] if copied else path).removesuffix("/compose")
    if found := re.search(r"/b/([^/]+)/o/(.+)", path):
        return found[1], urllib.parse.unquote(found[2])
    uploaded = re.search(r"/b/([^/]+)/o$", path)
    assert uploaded is not None, path
    if "name" in query:
        return uploaded[1], query["name"]
    metadata = re.search(rb"\r?\n\r?\n(\{.*?\})\r?\n--", body, re.DOTALL)  # of a multipart body
    return uploaded[1], json.loads(metadata[1] if metadata else body)["name"]


def _multipart_as_base64(request: Request) -> bytes:
    """A multipart upload's body with the object's data as base64; another's as it is."""
    kind = request.headers.get("Content-Type", "")
    if not kind.startswith("multipart/related"):
        return request.body
    boundary = re.escape(kind.partition("boundary=")[2].strip("\"'").encode())
    parts = re.fullmatch(
        rb"(--%b(\r?\n).*?\2--%b\2.*?\2)\2(.*)(\2--%b--\s*)" % ((boundary,) * 3),
        request.body,
        re.DOTALL,
    )
    assert parts is not None, request.body[:1000]
    head, newline, data, end = parts.groups()
    encoding = b"Content-Transfer-Encoding: base64"
    return head + encoding + 2 * newline + base64.b64encode(data) + end


@contextlib.contextmanager
def serve_gcs() -> Iterator[BucketServer]:
    """A GCS emulator in memory, until the block ends."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True)
    server.start()
    try:
        while server._api._httpd is None:  # `is_running` is set just after
            time.sleep(0.01)
        address = server._api._httpd.server_address
        with FaultyProxy(address, _gcs_error, _check_generation, _multipart_as_base64) as proxy:
            environment = {
                "STORAGE_EMULATOR_HOST": proxy.url,
                "TENSORSTORE_GCS_HTTP_URL": proxy.url,
                "GOOGLE_AUTH_TOKEN_FOR_TESTING": "tests",
                "GOOGLE_CLOUD_PROJECT": "tests",
                # Else gcsfs asks Google what kind of bucket each is.
                "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
            }
            yield BucketServer("gs", proxy, environment)
    finally:
        server.stop()


@contextlib.contextmanager
def serve_s3() -> Iterator[BucketServer]:
    """An S3 server in memory, until the block ends."""
    from moto.server import ThreadedMotoServer

    logging.getLogger("werkzeug").setLevel(logging.ERROR)  # not a line for each request
    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        with FaultyProxy(server.get_host_and_port(), _s3_error) as proxy:
            environment = {
                "AWS_ENDPOINT_URL": proxy.url,
                "AWS_ACCESS_KEY_ID": "tests",
                "AWS_SECRET_ACCESS_KEY": "tests",
                "AWS_DEFAULT_REGION": "us-east-1",
                "AWS_REGION": "us-east-1",
                "AWS_EC2_METADATA_DISABLED": "true",
                "AWS_CONFIG_FILE": "/dev/null",
                "AWS_SHARED_CREDENTIALS_FILE": "/dev/null",
            }
            yield BucketServer("s3", proxy, environment)
    finally:
        server.stop()


@contextlib.contextmanager
def new_bucket(server: BucketServer) -> Iterator[Bucket]:
    """A bucket of `server`, which clients of this process and its children find in the block."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        server.proxy.clear()
        try:
            yield Bucket(server.make_bucket(), server)
        finally:
            server.proxy.clear()
            for module, client in (("gcsfs", "GCSFileSystem"), ("s3fs", "S3FileSystem")):
                if module in sys.modules:
                    getattr(sys.modules[module], client).clear_instance_cache()
