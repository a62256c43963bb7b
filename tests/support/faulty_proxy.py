"""An HTTP proxy on loopback in front of a server: it counts, breaks on demand, and adds checks.

A test adds a `Fault`; the next requests that it matches meet it, as often as it says. Requests pass
otherwise as they are, many at once, over connections that are kept open. `check` is asked before
each write, one write at a time, so that what it reads still holds when the write is done.
"""

import dataclasses
import http.client
import re
import sys
import threading
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

_OF_A_CONNECTION = {"connection", "keep-alive", "transfer-encoding", "content-length", "date"}


@dataclass(frozen=True)
class Request:
    """A request as the client sent it."""

    method: str
    """GET, PUT, ..."""
    target: str
    """Path and query, decoded once."""
    raw: str
    """Path and query, as they were sent."""
    headers: http.client.HTTPMessage
    """As sent."""
    body: bytes
    """Without the chunks of its transfer."""


@dataclass(frozen=True)
class Answer:
    """What a client gets."""

    status: int
    """200, ..."""
    headers: tuple[tuple[str, str], ...] = ()
    """Without those of the connection."""
    body: bytes = b""
    """Empty for HEAD."""


@dataclass(frozen=True)
class Fault:
    """What becomes of requests; without a field set they pass."""

    match: str = ""
    """Regular expression, searched in "METHOD /path?query" (decoded)."""
    times: int | None = None
    """Requests that meet it; None: all, until `clear`."""
    after: int = 0
    """Requests that pass first."""
    status: int | None = None
    """Is answered instead of asking the server."""
    code: str = ""
    """Name of the error in that answer; "": that of the status."""
    keep: int | None = None
    """Bytes of the answer's body that arrive before the connection closes; its length is said
    in full."""
    flip: int | None = None
    """Byte of the answer's body in which a bit is turned."""
    hang: bool = False
    """No answer comes until `clear`, and then none but the end of the connection."""
    delay_s: float = 0.0
    """Time before the answer (seconds)."""
    lost: bool = False
    """The server does what was asked, and the connection ends instead of its answer."""


def passes(request: Request, ask: Callable[[str, str], Answer]) -> Answer | None:
    """A check that lets every request pass."""
    return None


def as_sent(request: Request) -> bytes:
    """The body, unchanged."""
    return request.body


class FaultyProxy:
    """The proxy; used as a context.

    Attributes:
      url: http://127.0.0.1:PORT, without a slash behind it.
    """

    def __init__(
        self,
        upstream: tuple[str, int],
        error: Callable[[int, str], Answer],
        check: Callable[[Request, Callable[[str, str], Answer]], Answer | None] = passes,
        body: Callable[[Request], bytes] = as_sent,
    ) -> None:
        """`upstream`: (host, port); `error`: (status, code or "") -> answer; `check`: (request,
        ask(method, target) of the server) -> answer that takes the request's place, or None;
        `body`: request -> body that the server gets."""
        self._upstream = upstream
        self._error = error
        self._check = check
        self._body = body
        self._lock = threading.Lock()
        self._writing = threading.Lock()
        self._released = threading.Event()
        self._faults: list[Fault] = []
        self._requests: list[str] = []
        proxy = self

        class Handler(_Handler):
            def answer(self, request: Request) -> None:
                proxy._serve(self, request)

        self._server = _Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "FaultyProxy":
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), daemon=True
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.clear()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def add(self, *faults: Fault) -> None:
        """Adds faults; a request meets the first that it matches and that is not used up."""
        with self._lock:
            self._faults += faults

    def clear(self) -> None:
        """Drops all faults, ends those that hang, and forgets the requests so far."""
        with self._lock:
            self._faults.clear()
            self._requests.clear()
            self._released.set()
            self._released = threading.Event()

    def requests(self, match: str = "") -> list[str]:
        """ "METHOD /path?query" (decoded) of the requests since `clear` in which `match` is."""
        with self._lock:
            return [said for said in self._requests if re.search(match, said)]

    def ask(
        self, method: str, target: str, headers: Sequence[tuple[str, str]] = (), body: bytes = b""
    ) -> Answer:
        """Asks the server, past all faults; `target` as in a request's line."""
        connection = http.client.HTTPConnection(*self._upstream, timeout=60)
        try:
            connection.putrequest(method, target, skip_host=True, skip_accept_encoding=True)
            sent = {name.lower() for name, _ in headers}
            for name, value in headers:
                connection.putheader(name, value)
            if "host" not in sent:
                connection.putheader("Host", self.url.removeprefix("http://"))
            if body or method in ("POST", "PUT", "PATCH"):
                connection.putheader("Content-Length", str(len(body)))
            connection.endheaders(body)
            got = connection.getresponse()
            kept = tuple((n, v) for n, v in got.getheaders() if n.lower() not in _OF_A_CONNECTION)
            content = got.read()
            if method == "HEAD" and (length := got.getheader("Content-Length")):
                kept += (("Content-Length", length),)
            return Answer(got.status, kept, content)
        finally:
            connection.close()

    def _meets(self, said: str) -> tuple[Fault, threading.Event]:
        with self._lock:
            self._requests.append(said)
            for i, fault in enumerate(self._faults):
                if not re.search(fault.match, said) or fault.times == 0:
                    continue
                if fault.after:
                    self._faults[i] = dataclasses.replace(fault, after=fault.after - 1)
                    break
                if fault.times is not None:
                    self._faults[i] = dataclasses.replace(fault, times=fault.times - 1)
                return fault, self._released
            return Fault(), self._released

    def _serve(self, handler: "_Handler", request: Request) -> None:
        fault, released = self._meets(f"{request.method} {request.target}")
        if fault.hang:
            released.wait()
            handler.close_connection = True
            return
        if fault.delay_s:
            released.wait(fault.delay_s)
        if fault.status is not None:
            answer = self._error(fault.status, fault.code)
        else:
            answer = self._pass_on(request)
        if fault.lost:
            handler.close_connection = True
            return
        if fault.flip is not None and fault.flip < len(answer.body):
            body = bytearray(answer.body)
            body[fault.flip] ^= 1
            answer = dataclasses.replace(answer, body=bytes(body))
        handler.send(answer, fault.keep)

    def _pass_on(self, request: Request) -> Answer:
        sent = [(n, v) for n, v in request.headers.items() if n.lower() not in _OF_A_CONNECTION]
        sent = [(n, v) for n, v in sent if n.lower() != "expect"]
        if request.method in ("GET", "HEAD"):
            refused = self._check(request, self.ask)
            return refused or self.ask(request.method, request.raw, sent, self._body(request))
        with self._writing:
            refused = self._check(request, self.ask)
            return refused or self.ask(request.method, request.raw, sent, self._body(request))


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Says nothing where a client went away, which is its own affair."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer(self, request: Request) -> None:
        raise NotImplementedError

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def _do(self) -> None:
        target = urllib.parse.unquote(self.path)
        self.answer(Request(self.command, target, self.path, self.headers, self._body()))

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = do_PATCH = _do

    def send(self, answer: Answer, keep: int | None = None) -> None:
        """Writes an answer; `keep`: bytes of its body after which the connection closes."""
        self.send_response(answer.status)
        for name, value in answer.headers:
            self.send_header(name, value)
        body = answer.body if self.command != "HEAD" else b""
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[:keep])
        if keep is not None:
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Says nothing."""
