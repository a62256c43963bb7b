"""Delivering answers: whole or as server-sent events, and stopping when the client has gone."""

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncGenerator, Coroutine, Mapping, Sequence
from typing import Any, TypeVar

from starlette.responses import JSONResponse, Response
from starlette.types import Message, Receive, Scope, Send

from mmfree_jax.serve.answers import Answer, Piece
from mmfree_jax.serve.json_body import ClientGone
from mmfree_jax.serve.metrics import Metrics
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.requests import Usage
from mmfree_jax.serve.responses import Choice, Form

_WAITING = 64  # pieces of several answers on their way into one response
_MANY_SCORES = 500
"""Tokens with log-probabilities; more are written beside the loop, which serves others."""
_T = TypeVar("_T")


def error_response(error: RequestError) -> JSONResponse:
    """An error in OpenAI's form."""
    return JSONResponse(error.body(), error.status, headers=error.headers)


async def merged(answers: Sequence[Answer]) -> AsyncGenerator[tuple[int, Piece], None]:
    """Pieces of several answers as they come, each with the number of its answer.

    Raises:
      RequestError: the engine gave one up.
    """
    if len(answers) == 1:
        async for piece in answers[0].pieces():
            yield 0, piece
        return
    arrived: asyncio.Queue[tuple[int, Piece | Exception]] = asyncio.Queue(_WAITING)

    async def read(index: int) -> None:
        try:
            async for piece in answers[index].pieces():
                await arrived.put((index, piece))
        except Exception as e:  # raised again where the response is written
            await arrived.put((index, e))

    tasks = [asyncio.create_task(read(index)) for index in range(len(answers))]
    left = len(answers)
    try:
        while left:
            index, piece = await arrived.get()
            if isinstance(piece, Exception):
                raise piece
            left -= piece.finish is not None
            yield index, piece
    finally:
        for task in tasks:
            task.cancel()


async def while_connected(receive: Receive, work: Coroutine[Any, Any, _T]) -> _T:
    """What `work` gives; it is cancelled when the client goes away.

    Raises:
      ClientGone: it went.
    """

    async def gone() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    watching, working = asyncio.create_task(gone()), asyncio.create_task(work)
    try:
        await asyncio.wait((watching, working), return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientGone
        return working.result()
    finally:
        for task in (watching, working):
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await working


class Delivery(Response):
    """The response to a completion; when it ends, however it does, its requests end too."""

    def __init__(
        self,
        answers: Sequence[Answer],
        form: Form,
        metrics: Metrics,
        *,
        stream: bool,
        with_usage: bool,
    ) -> None:
        """Prepares it; it is delivered when Starlette calls it.

        Args:
          answers: submitted already.
          form: how they are written.
          metrics: what is counted.
          stream: as server-sent events.
          with_usage: end the stream with the usage.
        """
        super().__init__()
        self._answers, self._form, self._metrics = answers, form, metrics
        self._stream, self._with_usage = stream, with_usage
        self._first: dict[int, float] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Writes the response."""
        try:
            work = self._write_stream(send) if self._stream else self._write_whole(scope, send)
            await while_connected(receive, work)
        except ClientGone:
            pass
        except RequestError as e:
            await error_response(e)(scope, receive, send)
        finally:
            for index, answer in enumerate(self._answers):
                answer.handle.cancel()
                begun = answer.handle.submitted_s
                first = self._first.get(index)
                waited = None if first is None else first - begun
                self._metrics.observe_answer(waited, time.monotonic() - begun)

    async def _write_whole(self, scope: Scope, send: Send) -> None:
        choices = [Choice() for _ in self._answers]
        async with contextlib.aclosing(merged(self._answers)) as pieces:
            async for index, piece in pieces:
                self._first.setdefault(index, time.monotonic())
                choices[index].add(piece)
        if sum(len(choice.scored) for choice in choices) > _MANY_SCORES:
            response = await asyncio.to_thread(self._whole, choices)
        else:
            response = self._whole(choices)
        await response(scope, _nothing, send)

    def _whole(self, choices: Sequence[Choice]) -> JSONResponse:
        return JSONResponse(self._form.whole(choices))

    async def _write_stream(self, send: Send) -> None:
        """Server-sent events; an error before the first is an ordinary response."""
        usages: list[Usage | None] = [None] * len(self._answers)
        begun: set[int] = set()
        async with contextlib.aclosing(merged(self._answers)) as pieces:
            try:
                async for index, piece in pieces:
                    self._first.setdefault(index, time.monotonic())
                    if not begun:
                        await send(_HEAD)
                    chunks = [self._form.chunk(index, piece)]
                    if index not in begun and (first := self._form.first_chunk(index)) is not None:
                        chunks.insert(0, first)
                    begun.add(index)
                    usages[index] = piece.usage
                    if self._with_usage:
                        chunks = [chunk | {"usage": None} for chunk in chunks]
                    await send(_body(b"".join(map(_event, chunks))))
                end = _event(self._form.usage_chunk(usages)) if self._with_usage else b""
            except RequestError as e:
                if not begun:
                    raise
                end = _event(e.body())
        await send(_body(end + b"data: [DONE]\n\n", more=False))


async def _nothing() -> Message:
    """In place of `receive`, which another reads."""
    raise AssertionError("nothing is read here")


_HEAD: Message = {
    "type": "http.response.start",
    "status": 200,
    "headers": [
        (b"content-type", b"text/event-stream; charset=utf-8"),
        (b"cache-control", b"no-cache"),
        (b"x-accel-buffering", b"no"),  # a proxy must pass on each event
    ],
}


def _body(data: bytes, *, more: bool = True) -> Message:
    return {"type": "http.response.body", "body": data, "more_body": more}


def _event(value: Mapping[str, Any]) -> bytes:
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return b"data: " + text.encode() + b"\n\n"
