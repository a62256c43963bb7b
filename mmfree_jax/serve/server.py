"""Running the application: a socket, slow clients, and a clean stop."""

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Any

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from mmfree_jax import signals
from mmfree_jax.errors import ConfigError
from mmfree_jax.serve.service import Service

_BACKLOG = 512
_LAST_WORDS = 5  # seconds for answers on their way when the server ends


@dataclass(frozen=True)
class Patience:
    """How long a server waits for its clients.

    Attributes:
      write_seconds: for a client that reads nothing of what was sent to it.
      head_seconds: for a new connection's first request.
      drain_seconds: for answers to end after the signal to stop.
    """

    write_seconds: float = 20.0
    head_seconds: float = 20.0
    drain_seconds: float = 30.0


def bind(host: str, port: int) -> socket.socket:
    """A socket that holds an address and does not listen yet.

    Raises:
      ConfigError: the address is not this machine's, or in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except (OSError, UnicodeError) as e:  # a name with an empty or too long label is no text
        reason = e.strerror if isinstance(e, OSError) else "it is no host name"
        raise ConfigError(f"--host is {host!r}: {reason}; give an address of this machine") from e
    held = socket.socket(family, kind, protocol)
    try:
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except OSError as e:
        held.close()
        if e.errno == errno.EADDRINUSE:
            way_out = "another program listens there: choose another port"
        elif e.errno == errno.EACCES:
            way_out = "it takes rights that you do not have: choose a port from 1024 up"
        else:
            way_out = f"{os.strerror(e.errno or 0)}: give an address of this machine"
        raise ConfigError(f"--host {host} --port {port}: {way_out}") from e
    return held


def address_of(listening: socket.socket) -> str:
    """The URL of a socket's address."""
    host, port = listening.getsockname()[:2]
    with contextlib.suppress(ValueError):
        if ipaddress.ip_address(host).version == 6:
            host = f"[{host}]"
    return f"http://{host}:{port}"


def _protocol(patience: Patience) -> type[H11Protocol]:
    """uvicorn's protocol; by itself it waits for ever for a client that reads or sends nothing."""

    class Patient(H11Protocol):
        _stuck: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self.loop.call_later(patience.head_seconds, self._end_silent)

        def _end_silent(self) -> None:
            if self.cycle is None:
                self.transport.abort()

        def pause_writing(self) -> None:
            super().pause_writing()
            self._stuck = self.loop.call_later(patience.write_seconds, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            if self._stuck is not None:
                self._stuck.cancel()

        def timeout_keep_alive_handler(self) -> None:
            super().timeout_keep_alive_handler()
            self.loop.call_later(patience.write_seconds, self.transport.abort)

    return Patient


class _Server(uvicorn.Server):
    """uvicorn's server, whose signals are heard elsewhere."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class Running:
    """A server that runs until it is told to stop."""

    def __init__(self, app: ASGIApp, service: Service, patience: Patience) -> None:
        """Prepares it.

        Args:
          app: the application.
          service: that the application serves; its engine is closed at the end.
          patience: with clients.
        """
        self._service, self._patience = service, patience
        config = uvicorn.Config(
            app,
            http=_protocol(patience),
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_graceful_shutdown=_LAST_WORDS,
        )
        self._server = _Server(config)
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop = asyncio.Event()
        self._signals = 0

    def stop(self) -> None:
        """Ends it as a first signal does; from any thread."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)

    def run(self, listening: socket.socket, on_ready: Callable[[], object]) -> None:
        """Serves until `stop`, or a signal where this is the main thread.

        New requests are then refused and those that run may end, for `drain_seconds`; what runs
        longer ends with an error, and so does everything at a second signal. Sessions are kept.

        Args:
          listening: the socket, bound.
          on_ready: called when requests are taken.

        Raises:
          OutputError: a session cannot be written.
        """
        for name in ("uvicorn.error", "asyncio"):  # which warn of every client that goes
            logging.getLogger(name).setLevel(logging.ERROR)
        try:
            with signals.heard(self._hear):
                asyncio.run(self._run(listening, on_ready))
        finally:
            self._service.engine.close(drain=False)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        del number, frame
        self._signals += 1
        self.stop()

    async def _run(self, listening: socket.socket, on_ready: Callable[[], object]) -> None:
        self._loop = asyncio.get_running_loop()
        serving = asyncio.create_task(self._server.serve(sockets=[listening]))
        ready = asyncio.create_task(self._when_started(on_ready))
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((serving, stopping), return_when=asyncio.FIRST_COMPLETED)
        ready.cancel()
        await self._drain()
        self._server.should_exit = True
        await serving

    async def _when_started(self, on_ready: Callable[[], object]) -> None:
        while not self._server.started:
            await asyncio.sleep(0.01)
        on_ready()

    async def _drain(self) -> None:
        """Waits for what runs, and ends what runs too long."""
        service = self._service
        service.is_stopping = True
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._patience.drain_seconds):
                while service.active and self._signals < 2:
                    await asyncio.sleep(0.02)
        # Requests that still run end with an event that says so, which their clients get.
        await asyncio.to_thread(service.engine.close, drain=False)
