"""What Compute Engine announces of this machine: that it is about to be taken away.

The metadata server of the machine holds a value for each kind of end, and answers a request with
`wait_for_change` as soon as that value is another. A preempted machine has 30 seconds from then
on, one under maintenance an hour or less (cloud.google.com/compute/docs/metadata).
"""

import contextlib
import http.client
import os
import socket
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

Kind = Literal["auto", "gce", "none"]

ANNOUNCED = {
    "preempted": "Compute Engine takes this machine back",
    "maintenance": "Compute Engine ends this machine for maintenance of its host",
}
"""The notices, as a run's summary names them, and what each means."""

# A live migration, MIGRATE_ON_HOST_MAINTENANCE, ends nothing.
_VALUES = {
    "preempted": ("preempted", "TRUE"),
    "maintenance": ("maintenance-event", "TERMINATE_ON_HOST_MAINTENANCE"),
}
_PRODUCT = Path("/sys/class/dmi/id/product_name")
_WAIT_SECONDS = 60


def metadata_host(kind: Kind, environ: Mapping[str, str] = os.environ) -> str | None:
    """HOST or HOST:PORT of the metadata server to ask, by no look at the network; None: none.

    Args:
      kind: auto asks on a machine of Compute Engine, or where $GCE_METADATA_HOST is set.
      environ: the environment.
    """
    if kind == "none":
        return None
    host = environ.get("GCE_METADATA_HOST")
    if host or kind == "gce":
        return host or "metadata.google.internal"
    product = ""
    with contextlib.suppress(OSError):
        product = _PRODUCT.read_text(encoding="utf-8", errors="replace").strip()
    return "metadata.google.internal" if product in ("Google", "Google Compute Engine") else None


class Notices:
    """Waits for notices in threads of its own, until it is closed. Nothing here is waited for."""

    def __init__(self, host: str, announce: Callable[[str], None]) -> None:
        """`announce` is called from a thread, with a name of `ANNOUNCED`, once for each."""
        self._host, self._announce = host, announce
        self._closed = threading.Event()
        self._connections: set[http.client.HTTPConnection] = set()
        for name in ANNOUNCED:
            threading.Thread(
                target=self._watch, args=(name,), name=f"notices-{name}", daemon=True
            ).start()

    def _watch(self, name: str) -> None:
        key, wanted = _VALUES[name]
        etag, failures = "", 0
        while not self._closed.wait(2 ** min(failures, 6) - 1):
            try:
                answer = self._ask(key, etag)
            except (OSError, http.client.HTTPException):
                etag, failures = "", failures + 1
                continue
            if answer is None:
                return
            value, found = answer
            if value == wanted:
                self._announce(name)
                return
            # A server that does not wait is not asked without pause.
            failures = 1 if found in (etag, "") else 0
            etag = found

    def _ask(self, key: str, etag: str) -> tuple[str, str] | None:
        """The value and its etag, as soon as that is not `etag`; None: there is no such value.

        Raises:
          OSError, HTTPException: the server does not answer, or not now.
        """
        wait = f"?wait_for_change=true&timeout_sec={_WAIT_SECONDS}&last_etag={etag}" if etag else ""
        connection = http.client.HTTPConnection(self._host, timeout=_WAIT_SECONDS + 10)
        self._connections.add(connection)
        try:
            connection.request(
                "GET",
                f"/computeMetadata/v1/instance/{key}{wait}",
                headers={"Metadata-Flavor": "Google"},
            )
            response = connection.getresponse()
            text = response.read(1000).decode(errors="replace").strip()
            if response.getheader("Metadata-Flavor") != "Google" or response.status in (403, 404):
                return None
            if response.status != 200:
                raise OSError(f"status {response.status}")
            return text, response.getheader("ETag", "")
        finally:
            self._connections.discard(connection)
            connection.close()

    def close(self) -> None:
        """Lets the requests under way end; announces nothing from then on."""
        self._closed.set()
        for connection in list(self._connections):
            if connection.sock is not None:
                with contextlib.suppress(OSError):
                    connection.sock.shutdown(socket.SHUT_RDWR)
