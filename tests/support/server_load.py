"""A server under load: a process of its own, many clients at once, and clients that misbehave.

Requests of a plan are sent, so many at once; some are cancelled, malformed, or read by nobody.
Every answer must be that of the same request alone. `make load` runs it, and in small the tests.
"""

import argparse
import asyncio
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import openai
from served import write_small_model

HOST = "127.0.0.1"
MODEL = "small"
MALFORMED = (
    b"", b"{", b'{"model": NaN}', b"[" * 50_000, b'{"model": "small", "model": "small"}',
    b'{"model": "small", "prompt": true}', b'{"model": "other", "prompt": "x"}', b"\xff\xfe",
    b'{"model": "small", "prompt": "x", "temperature": 1e999}', b'{"prompt": "\\ud800"}',
)  # fmt: skip


@dataclass
class Tally:
    """What became of the requests."""

    answered: int = 0
    cancelled: int = 0
    malformed: int = 0
    unread: int = 0
    faults: list[str] = field(default_factory=list)


class ServerProcess:
    """`mmfree serve` in a process of its own."""

    def __init__(self, model: Path, *options: str) -> None:
        command = [
            sys.executable,
            "-m",
            "mmfree_jax",
            "serve",
            "--model",
            str(model),
            "--port",
            "0",
        ]
        self.process = subprocess.Popen(
            [*command, "--name", MODEL, *options],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        found = re.search(r"at http://127\.0\.0\.1:(\d+)/v1", line)
        if found is None:
            raise RuntimeError(f"{line!r} {self.process.communicate()[1]}")
        self.port = int(found[1])

    @property
    def resident_mib(self) -> float:
        """Its memory (MiB)."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(re.search(r"VmRSS:\s+(\d+)", text)[1]) / 1024  # type: ignore[index]

    def end(self, number: int = signal.SIGTERM) -> tuple[int, str]:
        """Tells it to stop: exit code and what it wrote on standard error."""
        self.process.send_signal(number)
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


def plan(count: int, seed: int) -> list[tuple[str, dict[str, Any]]]:
    """(kind, request) of each client's turn; every seventh or so misbehaves."""
    draw = random.Random(seed)
    kinds = ["whole", "stream"] * 6 + ["cancelled", "malformed", "unread"]
    planned = []
    for number in range(count):
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": f"request {draw.randrange(40)} " + "x" * draw.randrange(60),
            "max_tokens": draw.randrange(1, 40),
            "seed": number,
            "temperature": draw.choice([0, 0.7, 1]),
            "top_p": draw.choice([1, 0.9]),
        }
        planned.append((draw.choice(kinds), body))
    return planned


async def _text(client: openai.AsyncOpenAI, body: dict[str, Any], *, stream: bool) -> str:
    if not stream:
        return (await client.completions.create(**body)).choices[0].text
    pieces = await client.completions.create(**body, stream=True)
    return "".join([piece.choices[0].text async for piece in pieces])


async def _raw(port: int, data: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    reader, writer = await asyncio.open_connection(HOST, port, limit=1024)
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}\r\nContent-Length: {len(data)}\r\n"
    writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    await writer.drain()
    return reader, writer


async def _one(
    client: openai.AsyncOpenAI,
    port: int,
    number: int,
    kind: str,
    body: dict[str, Any],
    tally: Tally,
) -> str | None:
    """Sends one request as its kind does; the text of an answer that was read."""
    if kind in ("whole", "stream"):
        text = await _text(client, body, stream=kind == "stream")
        tally.answered += 1
        return text
    data = MALFORMED[number % len(MALFORMED)]
    if kind != "malformed":
        data = json.dumps(body | {"max_tokens": 2000, "stream": True, "ignore_eos": True}).encode()
    reader, writer = await _raw(port, data)
    if kind == "malformed":
        status = int((await reader.readline()).split()[1])
        if not 400 <= status < 500:
            tally.faults.append(f"{data[:40]!r} was answered {status}")
        tally.malformed += 1
    elif kind == "cancelled":
        await reader.read(100 * (number % 3))
        tally.cancelled += 1
    else:  # reads nothing for a while, and then goes
        await asyncio.sleep(1)
        tally.unread += 1
    writer.close()
    return None


async def run_load(port: int, planned: list[tuple[str, dict[str, Any]]], at_once: int) -> Tally:
    """Sends all requests, so many at once, and then each that was answered alone."""
    tally, texts = Tally(), {}
    places = asyncio.Semaphore(at_once)
    client = openai.AsyncOpenAI(
        base_url=f"http://{HOST}:{port}/v1", api_key="none", timeout=300, max_retries=20
    )

    async def send(number: int, kind: str, body: dict[str, Any]) -> None:
        async with places:
            try:
                text = await _one(client, port, number, kind, body, tally)
            except Exception as e:
                tally.faults.append(f"request {number} ({kind}): {type(e).__name__}: {e}")
                return
            if text is not None:
                texts[number] = text

    async with client:
        await asyncio.gather(*(send(n, *request) for n, request in enumerate(planned)))
        for number, text in texts.items():
            if await _text(client, planned[number][1], stream=False) != text:
                tally.faults.append(f"request {number} is answered otherwise alone")
    return tally


def load(count: int, at_once: int, seed: int, folder: Path, *, rounds: int = 1) -> dict[str, Any]:
    """Serves a small model in `folder`, loads it and stops it; what was found."""
    write_small_model(folder / "model")
    server = ServerProcess(
        folder / "model", "--slots", "16", "--max-queue", "64", "--one-batch-size",
        "--write-seconds", "2", "--prefix-cache-mib", "1",
    )  # fmt: skip
    memory, tallies, begun = [], [], time.monotonic()
    try:
        for number in range(rounds):
            planned = plan(count, seed + number)
            tallies.append(asyncio.run(run_load(server.port, planned, at_once)))
            memory.append(round(server.resident_mib, 1))
    finally:
        code, errors = server.end()
    return {
        "requests": count * rounds,
        "answered": sum(t.answered for t in tallies),
        "cancelled": sum(t.cancelled for t in tallies),
        "malformed": sum(t.malformed for t in tallies),
        "unread": sum(t.unread for t in tallies),
        "faults": [fault for t in tallies for fault in t.faults],
        "memory_mib": memory,
        "seconds": round(time.monotonic() - begun, 1),
        "exit_code": code,
        "standard_error": errors,
    }


def main() -> int:
    """Loads a server and prints what was found; 1 where anything was wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--at-once", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        found = load(
            options.requests, options.at_once, options.seed, Path(folder), rounds=options.rounds
        )
    print(json.dumps(found, indent=1))
    flat = found["memory_mib"][-1] < 1.1 * found["memory_mib"][0] + 20
    return int(bool(found["faults"]) or found["exit_code"] != 0 or not flat)


if __name__ == "__main__":
    sys.exit(main())
