"""Who may ask: keys, host names, and nobody while the server stops; and what becomes of faults."""

import hashlib
import hmac
import ipaddress
import json
import logging
import os
import re
import socket
import stat
import sys
import time
import traceback
from collections.abc import Collection, MutableMapping, Sequence
from pathlib import Path
from typing import Any

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mmfree_jax.errors import ConfigError
from mmfree_jax.serve.delivery import error_response
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.service import Service
from mmfree_jax.text_files import read_text

log = logging.getLogger("mmfree.serve")

GONE = 499
"""nginx's number for a client that has gone: nobody sees it but the log and the metrics."""
_LARGEST = 2**20  # bytes of a file of keys
_HOST = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*\.?")
_ORIGIN = re.compile(r"\*|null|[a-z][a-z0-9+.-]*://[^/?#@\sA-Z]+")
_OPEN = ("/", "/health")
"""Paths that need no key, and those below /page/."""


def read_keys(path: Path) -> tuple[str, ...]:
    """The keys of a file, one a line; empty lines and those that begin with # are passed over.

    A file that others may read gets a warning on standard error.

    Raises:
      ConfigError: it cannot be read, holds none, or one that no HTTP header can carry.
    """
    try:
        lines = [line.strip() for line in read_text(path, _LARGEST).splitlines()]
        mode = path.stat().st_mode
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else "it is not text in UTF-8"
        raise ConfigError(
            f"--api-key-file {path} cannot be read ({reason}): name a file of keys"
        ) from e
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:
        raise ConfigError(f"--api-key-file {path} holds no key: write one on a line")
    for number, key in enumerate(lines, 1):
        if key in keys and not (key.isascii() and key.isprintable() and " " not in key):
            raise ConfigError(
                f"--api-key-file {path}: line {number} is no key: use ASCII letters, digits and "
                "signs without spaces"
            )
    if mode & (stat.S_IRWXG | stat.S_IRWXO):
        print(
            f"mmfree: warning: --api-key-file {path} can be read by others: chmod 600 {path}",
            file=sys.stderr,
        )
    return keys


def check_allowed(hosts: Collection[str], origins: Collection[str]) -> None:
    """Refuses names that no request can bring, which would let nobody in without a word.

    Raises:
      ConfigError: a host with a scheme, port or path, or an origin that is none.
    """
    for host in hosts:
        if not (_HOST.fullmatch(host) or _is_address(host)):
            raise ConfigError(
                f"--allowed-hosts has {host!r}: give names alone, models.example say, without "
                "scheme, port and path"
            )
    for origin in origins:
        if not _ORIGIN.fullmatch(origin):
            raise ConfigError(
                f"--allowed-origins has {origin!r}: give each as browsers send it, "
                "https://models.example say, in small letters and without path; * is every one"
            )


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens at `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


class Gate:
    """Lets requests through to the application.

    Without keys a request must name this machine by an address, as localhost, by its own name or
    by an allowed one. A page of another site whose name was made to point here (DNS rebinding)
    names that site.
    """

    def __init__(
        self,
        app: ASGIApp,
        service: Service,
        *,
        keys: Sequence[str] = (),
        allowed_hosts: Collection[str] = (),
    ) -> None:
        self._app, self._service = app, service
        self._keys = [_digest(key) for key in keys]
        own = {"localhost", socket.gethostname().lower()}
        self._hosts = own | {host.lower() for host in allowed_hosts}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers what is refused and passes on the rest."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        service, begun = self._service, time.monotonic()
        status = 0

        async def counted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        service.active += 1
        try:
            self._check(scope)
            await self._app(scope, receive, counted)
        except RequestError as e:
            await error_response(e)(scope, receive, counted)
        except Exception as e:  # answered already, if it could be
            log.error("fault in %s: %s", _endpoint(scope), _where(e))
        finally:
            service.active -= 1
            service.metrics.count_response(_endpoint(scope), status or GONE)
            if service.log_requests:
                _log_request(scope, status or GONE, time.monotonic() - begun)

    def _check(self, scope: MutableMapping[str, Any]) -> None:
        """Refuses a request by its headers.

        Raises:
          RequestError: 401, 403 or 503.
        """
        headers, path = Headers(scope=scope), scope["path"]
        if not self._keys and not self._knows(headers.get("host", "")):
            raise RequestError(
                f"the host is {headers.get('host', '')[:200]!r}, which is no name of this server: "
                "start it with --allowed-hosts, or ask by its address",
                status=403,
                code="unknown_host",
            )
        if path in _OPEN or path.startswith("/page/"):
            return
        if self._keys and not self._is_known(headers.get("authorization", "")):
            raise RequestError(
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                status=401,
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if self._service.is_stopping and path != "/metrics":
            raise RequestError(
                "the server stops: try again when it is back",
                status=503,
                code="server_stopping",
                headers={"Retry-After": "5"},
            )

    def _is_known(self, authorization: str) -> bool:
        scheme, _, key = authorization.partition(" ")
        given = _digest(key.strip())
        # All are compared, so that the time tells nothing of which one it was.
        matches = [hmac.compare_digest(given, key) for key in self._keys]
        return scheme.lower() == "bearer" and any(matches)

    def _knows(self, host: str) -> bool:
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        name = name.strip("[]").lower()
        return _is_address(name) or name in self._hosts


def _endpoint(scope: MutableMapping[str, Any]) -> str:
    """The endpoint that a request went to, so that no text of a client becomes a label."""
    return getattr(scope.get("endpoint"), "__name__", "none")


def _where(error: BaseException) -> str:
    """A fault's kind and place, without its message, which may hold a part of a request."""
    frames = traceback.extract_tb(error.__traceback__)
    places = [f"{os.path.basename(f.filename)}:{f.lineno} {f.name}" for f in frames[-6:]]
    return f"{type(error).__name__} at {' < '.join(reversed(places))}"


def _log_request(scope: MutableMapping[str, Any], status: int, seconds: float) -> None:
    """One line of JSON on standard error, with the body where it could be read."""
    line = {
        "time": time.time(),
        "method": scope["method"],
        "path": scope["path"],
        "status": status,
        "seconds": round(seconds, 4),
        "body": scope.get("state", {}).get("body"),
    }
    print(json.dumps(line), file=sys.stderr, flush=True)
