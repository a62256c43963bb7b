"""The body of a request, as bytes within bounds and as JSON. Nothing here imports JAX."""

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.text_files import parse_json

Receive = Callable[[], Awaitable[Mapping[str, Any]]]


class ClientGone(Exception):
    """Whoever asked has closed the connection; nobody reads an answer."""


def check_content_type(value: str | None) -> None:
    """Refuses what is not declared as JSON, which web pages could send without being asked.

    Raises:
      RequestError: 415.
    """
    kind, _, parameters = (value or "").partition(";")
    charset = parameters.replace(" ", "").replace('"', "").lower()
    if kind.strip().lower() != "application/json" or charset not in ("", "charset=utf-8"):
        raise RequestError(
            f"the content type is {value!r}: send JSON in UTF-8 as application/json",
            status=415,
            code="unsupported_media_type",
        )


def check_content_encoding(value: str | None) -> None:
    """Refuses compressed bodies, whose size is not known before they are unpacked.

    Raises:
      RequestError: 415.
    """
    if (value or "identity").strip().lower() != "identity":
        raise RequestError(
            f"the content encoding is {value!r}: send the body as it is",
            status=415,
            code="unsupported_media_type",
            headers={"Accept-Encoding": "identity"},
        )


async def read_body(
    receive: Receive, *, most_bytes: int, seconds: float, declared: str | None
) -> bytes:
    """The whole body.

    Args:
      receive: of ASGI.
      most_bytes: that it may have.
      seconds: that it may take.
      declared: Content-Length; None: not given.

    Raises:
      RequestError: 413 if it is larger, 408 if it takes longer.
      ClientGone: the client closed the connection first.
    """
    too_large = RequestError(
        f"the body is larger than the {most_bytes} bytes that this server reads: send less",
        status=413,
        code="request_too_large",
    )
    if declared is not None and declared.isdigit() and int(declared[:20]) > most_bytes:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise ClientGone
                part = message.get("body", b"")
                size += len(part)
                if size > most_bytes:
                    raise too_large
                parts.append(part)
                if not message.get("more_body"):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            f"the body did not come within {seconds:g} s: send it faster",
            status=408,
            code="request_timeout",
        ) from None


def parse_body(data: bytes) -> Any:
    """What a body holds.

    Raises:
      RequestError: it is not UTF-8, no JSON, or JSON with a key twice in one object, NaN, half of
        a surrogate pair, a number of very many digits or very deep nesting.
    """
    try:
        return parse_json(data.decode("utf-8"), finite=True)
    except UnicodeDecodeError as e:
        reason = f"byte {e.start} is not UTF-8"
    except ValueError as e:
        reason = str(e)
    raise RequestError(
        f"the body cannot be read as JSON ({reason}): send one JSON object", code="invalid_json"
    )
