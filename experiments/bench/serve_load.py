"""Clients of a server under load: many streams at once, or arrivals at random times.

A stream is timed where its reader is: in a coroutine of one event loop, in this process or, over
HTTP, in one of its own, which shares no interpreter with the server.
"""

import asyncio
import dataclasses
import json
import sys
import time
import urllib.parse
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfree_jax.errors import MMFreeError
from mmfree_jax.experiments.bench.records import measure_alone
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.requests import End, Request, RowSampling, Tokens


@dataclass(frozen=True)
class Timed:
    """One answer as its reader saw it.

    Attributes:
      sent_s: when it was asked for (`time.perf_counter`).
      came: when tokens came, and how many; over HTTP the mean of all messages.
      count: tokens of the answer.
      tokens: their ids; empty over HTTP.
    """

    sent_s: float
    came: tuple[tuple[float, float], ...]
    count: int
    tokens: tuple[int, ...] = ()

    @property
    def first_s(self) -> float:
        """From sending to the first token (seconds)."""
        return self.came[0][0] - self.sent_s


Ask = Callable[[Request], Awaitable[Timed]]


@dataclass(frozen=True)
class Load:
    """Requests, and how they arrive.

    Attributes:
      requests: greedy or at a temperature, with prompts of their own.
      rate: how many arrive a second, independently (a Poisson process); None: all at once.
    """

    requests: tuple[Request, ...]
    rate: float | None = None


Drive = Callable[[Sequence[Load]], list[list[Timed]]]
"""Sends loads, one behind the end of the other."""


def through_engine(engine: Engine) -> Drive:
    """Sends to an engine of this process."""

    async def ask(request: Request) -> Timed:
        sent_s, came, tokens = time.perf_counter(), [], []
        async for event in engine.submit(request):
            if isinstance(event, Tokens):
                came.append((time.perf_counter(), len(event.ids)))
                tokens += event.ids
            elif isinstance(event, End) and event.reason != "length":
                raise MMFreeError(f"an answer ended as {event.reason}: {event.message}")
        return Timed(sent_s, tuple(came), len(tokens), tuple(tokens))

    return lambda loads: [_send(ask, load) for load in loads]


def through_http(url: str, model: str) -> Drive:
    """Sends to a server that speaks OpenAI's completions, by token ids and as streams.

    Args:
      url: of the server, for example http://127.0.0.1:8000.
      model: name that it has there.

    Returns:
      A function that starts a client process for each call.
    """

    def drive(loads: Sequence[Load]) -> list[list[Timed]]:
        task = {"url": url, "model": model, "loads": [dataclasses.asdict(load) for load in loads]}
        found = measure_alone([sys.executable, "-m", __name__], task)
        if "failed" in found:
            raise MMFreeError(f"{url}: {found['failed']}")
        return [
            [Timed(one["sent_s"], tuple(map(tuple, one["came"])), one["count"]) for one in answers]
            for answers in found["answers"]
        ]

    return drive


def answer_task(task: dict[str, Any]) -> dict[str, Any]:
    """What the client process makes of a line of `through_http`."""
    ask = _ask_url(task["url"], task["model"])
    answers = []
    for load in task["loads"]:
        requests = tuple(
            Request(
                tuple(one["prompt"]),
                one["max_tokens"],
                RowSampling(one["sampling"]["temperature"]),
                one["seed"],
            )
            for one in load["requests"]
        )
        found = _send(ask, Load(requests, load["rate"]))
        answers.append([dataclasses.asdict(one) for one in found])
    return {"answers": answers}


def _ask_url(url: str, model: str) -> Ask:
    parts = urllib.parse.urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80

    async def ask(request: Request) -> Timed:
        body = json.dumps(
            {
                "model": model, "prompt": list(request.prompt), "max_tokens": request.max_tokens,
                "temperature": request.sampling.temperature, "seed": request.seed, "stream": True,
                "stream_options": {"include_usage": True}, "ignore_eos": True,
            }
        ).encode()  # fmt: skip
        asked = [
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.0", f"Host: {host}:{port}",
            "Content-Type: application/json", f"Content-Length: {len(body)}", "", "",
        ]  # fmt: skip
        sent_s = time.perf_counter()
        reader, writer = await asyncio.open_connection(host, port)
        try:
            writer.write("\r\n".join(asked).encode() + body)
            head = (await reader.readuntil(b"\r\n\r\n")).decode(errors="replace")
            status = head.splitlines()[0]
            if " 200 " not in status:
                text = (await reader.read()).decode(errors="replace")
                raise MMFreeError(f"{url} answered {status}: {text[-300:]}")
            times, count = [], 0
            async for message in _messages(reader):
                if message.get("error"):
                    raise MMFreeError(f"{url}: {message['error']}")
                if any(choice.get("text") for choice in message.get("choices", ())):
                    times.append(time.perf_counter())
                count = (message.get("usage") or {}).get("completion_tokens", count)
        finally:
            writer.close()
        return Timed(sent_s, tuple((when, count / len(times)) for when in times), count)

    return ask


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """The JSON messages of a stream of server-sent events."""
    async for line in reader:
        text = line.decode().strip()
        if text == "data: [DONE]":
            return
        if text.startswith("data: "):
            yield json.loads(text.removeprefix("data: "))


def _send(ask: Ask, load: Load) -> list[Timed]:
    starts = np.zeros(len(load.requests))
    if load.rate is not None:
        starts = np.cumsum(np.random.default_rng(0).exponential(1 / load.rate, len(starts)))

    async def later(request: Request, start_s: float) -> Timed:
        await asyncio.sleep(start_s)
        return await ask(request)

    async def run() -> list[Timed]:
        return await asyncio.gather(*map(later, load.requests, starts.tolist()))

    return asyncio.run(run())


def tokens_per_s(answers: Sequence[Timed]) -> dict[str, float]:
    """Tokens a second of streams that were started at once.

    "whole": all tokens over all the time, prompts included. "steady": from when the last stream
    had its first tokens to when the first had its last; tokens that come together count as spread
    over the time since those before.
    """
    first = min(a.sent_s for a in answers)
    last = max(a.came[-1][0] for a in answers)
    begun = max(a.came[0][0] for a in answers)
    ended = min(a.came[-1][0] for a in answers)

    def between(answer: Timed) -> float:
        times, counts = zip(*answer.came, strict=True)
        at_begin, at_end = np.interp((begun, ended), times, np.cumsum(counts))
        return float(at_end - at_begin)

    rates = {"whole": sum(a.count for a in answers) / (last - first)}
    if ended > begun:
        rates["steady"] = sum(map(between, answers)) / (ended - begun)
    return {name: round(rate, 1) for name, rate in rates.items()}


def delays_ms(answers: Sequence[Timed]) -> dict[str, float]:
    """Milliseconds to the first token and between tokens: median and 99th percentile."""
    first = [1e3 * a.first_s for a in answers]
    gaps = [
        1e3 * (a.came[-1][0] - a.came[0][0]) / (a.count - a.came[0][1])
        for a in answers
        if len(a.came) > 1
    ]
    out = {"first_token_p50": np.percentile(first, 50), "first_token_p99": np.percentile(first, 99)}
    if gaps:
        out |= {"a_token_p50": np.percentile(gaps, 50), "a_token_p99": np.percentile(gaps, 99)}
    return {name: round(float(value), 2) for name, value in out.items()}


if __name__ == "__main__":
    print(json.dumps(answer_task(json.loads(sys.stdin.readline()))), flush=True)
