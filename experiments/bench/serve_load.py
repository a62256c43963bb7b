"""Clients of a server under load: many streams at once, or arrivals at random times.

A stream is timed where its reader is: in a coroutine of one event loop, as the server's own
writers are.
"""

import asyncio
import json
import time
import urllib.parse
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass

import numpy as np

from mmfree_jax.errors import MMFreeError
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.requests import End, Request, Tokens

Ask = Callable[[Request], AsyncIterator[tuple[int, ...]]]
"""Sends a request; gives the tokens of its answer as they come, over HTTP their number alone."""


@dataclass(frozen=True)
class Timed:
    """One answer as its reader saw it.

    Attributes:
      sent_s: when it was asked for (`time.perf_counter`).
      came: when tokens came, and how many.
      tokens: ids; over HTTP zeros.
    """

    sent_s: float
    came: tuple[tuple[float, int], ...]
    tokens: tuple[int, ...]

    @property
    def first_s(self) -> float:
        """From sending to the first token (seconds)."""
        return self.came[0][0] - self.sent_s


def of_engine(engine: Engine) -> Ask:
    """Asks an engine of this process."""

    async def ask(request: Request) -> AsyncIterator[tuple[int, ...]]:
        async for event in engine.submit(request):
            if isinstance(event, Tokens):
                yield event.ids
            elif isinstance(event, End) and event.reason != "length":
                raise MMFreeError(f"an answer ended as {event.reason}: {event.message}")

    return ask


def of_url(url: str, model: str, key: str | None = None) -> Ask:
    """Asks a server that speaks OpenAI's completions, by token ids and as a stream.

    Args:
      url: of the server, for example http://127.0.0.1:8000.
      model: name that it has there.
      key: for its Authorization header.
    """
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80

    async def ask(request: Request) -> AsyncIterator[tuple[int, ...]]:
        body = json.dumps(
            {
                "model": model, "prompt": list(request.prompt), "max_tokens": request.max_tokens,
                "temperature": request.sampling.temperature, "seed": request.seed, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True,
            }
        ).encode()  # fmt: skip
        asked = [
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.0", f"Host: {host}",
            "Content-Type: application/json", f"Content-Length: {len(body)}",
            *([f"Authorization: Bearer {key}"] if key else []),
        ]  # fmt: skip
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write("\r\n".join([*asked, "", ""]).encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode(errors="replace")
            status = head.splitlines()[0]
            if " 200 " not in status:
                text = (await reader.read()).decode(errors="replace")
                raise MMFreeError(f"{url} answered {status}: {text[-300:]}")
            given = 0
            async for event in _server_sent(reader):
                if event.get("choices"):
                    given += 1
                    yield (0,)
                elif usage := event.get("usage"):
                    # A message may have held several tokens, or none whole enough to show.
                    rest = usage["completion_tokens"] - given
                    if rest > 0:
                        yield (0,) * rest
        finally:
            writer.close()

    return ask


async def _server_sent(reader: asyncio.StreamReader) -> AsyncIterator[dict]:
    """The JSON messages of a stream of server-sent events."""
    async for line in reader:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            yield json.loads(text.removeprefix("data: "))


async def timed(ask: Ask, request: Request) -> Timed:
    """One request and the times of its tokens."""
    sent_s, came, tokens = time.perf_counter(), [], []
    async for ids in ask(request):
        came.append((time.perf_counter(), len(ids)))
        tokens += ids
    return Timed(sent_s, tuple(came), tuple(tokens))


def at_once(ask: Ask, requests: Sequence[Request]) -> list[Timed]:
    """All requests at the same time."""

    async def run() -> list[Timed]:
        return await asyncio.gather(*(timed(ask, request) for request in requests))

    return asyncio.run(run())


def at_random(ask: Ask, requests: Sequence[Request], rate: float, seed: int = 0) -> list[Timed]:
    """Requests that arrive independently, `rate` a second (a Poisson process)."""
    gaps = np.random.default_rng(seed).exponential(1 / rate, len(requests))

    async def later(request: Request, start_s: float) -> Timed:
        await asyncio.sleep(start_s)
        return await timed(ask, request)

    async def run() -> list[Timed]:
        starts = np.cumsum(gaps).tolist()
        return await asyncio.gather(*map(later, requests, starts))

    return asyncio.run(run())


def tokens_per_s(answers: Sequence[Timed]) -> dict[str, float]:
    """Tokens a second of streams that were started at once.

    "whole": all tokens over all the time, prompts included. "steady": from when the last stream
    had its first tokens to when the first had its last.
    """
    first = min(a.sent_s for a in answers)
    last = max(a.came[-1][0] for a in answers)
    begun = max(a.came[0][0] for a in answers)
    ended = min(a.came[-1][0] for a in answers)
    steady = sum(n for a in answers for when, n in a.came if begun < when <= ended)
    rates = {"whole": sum(len(a.tokens) for a in answers) / (last - first)}
    if ended > begun:
        rates["steady"] = steady / (ended - begun)
    return {name: round(rate, 1) for name, rate in rates.items()}


def delays_ms(answers: Sequence[Timed]) -> dict[str, float]:
    """Milliseconds to the first token and between tokens: median and 99th percentile."""
    first = [1e3 * a.first_s for a in answers]
    gaps = [
        1e3 * (a.came[-1][0] - a.came[0][0]) / (len(a.tokens) - a.came[0][1])
        for a in answers
        if len(a.came) > 1
    ]
    out = {"first_token_p50": np.percentile(first, 50), "first_token_p99": np.percentile(first, 99)}
    if gaps:
        out |= {"a_token_p50": np.percentile(gaps, 50), "a_token_p99": np.percentile(gaps, 99)}
    return {name: round(float(value), 2) for name, value in out.items()}
