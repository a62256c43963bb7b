"""Clients that leave, read nothing or are too many; and how a server ends."""

import contextlib
import dataclasses
import json
import socket
import time
from http.client import HTTPConnection

import openai
import pytest
from passing_time import an_hour_passes_once
from served import NAME, served, start_engine

from mmfree_jax.serve.requests import Limits
from mmfree_jax.serve.server import Patience

LONG = {"model": NAME, "prompt": "x", "max_tokens": 4000, "ignore_eos": True}


def until(condition, seconds=30):
    """Waits for what must become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.01)


def begin(port, body):
    """Sends a request and gives its socket; nothing is read."""
    data = json.dumps(body).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n"
    connection = socket.create_connection(("127.0.0.1", port), timeout=60)
    connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + data)
    return connection


@pytest.fixture(scope="module")
def crowded():
    """A server with room for one request that waits."""
    engine = start_engine(Limits(slots=4, queue=1, batch_sizes=(4,)))
    with served(engine, patience=Patience(write_seconds=0.5, drain_seconds=5)) as server:
        yield server


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_away_frees_its_slot(crowded, stream):
    engine = crowded.service.engine
    ended = engine.statistics().ended.get("cancelled", 0)
    connection = begin(crowded.port, LONG | {"stream": stream})
    until(lambda: engine.statistics().running == 1)
    if stream:
        assert connection.recv(10) == b"HTTP/1.1 2"
    connection.close()
    until(lambda: engine.statistics().running == 0)
    assert engine.statistics().ended["cancelled"] == ended + 1
    until(lambda: crowded.service.active == 0)


def test_a_full_queue_says_when_to_come_again(crowded):
    engine = crowded.service.engine
    with contextlib.closing(begin(crowded.port, LONG | {"n": 4})):
        until(lambda: engine.statistics().running == 4)
        with contextlib.closing(begin(crowded.port, LONG)):
            until(lambda: engine.statistics().waiting == 1)
            status, error, headers = crowded.ask("POST", "/v1/completions", LONG)
            assert (status, error["error"]["code"]) == (429, "queue_full")
            assert error["error"]["type"] == "rate_limit_error"
            assert int(headers["retry-after"]) >= 1
            client = openai.OpenAI(base_url=f"{crowded.url}/v1", api_key="x", max_retries=0)
            with client, pytest.raises(openai.RateLimitError):
                client.completions.create(model=NAME, prompt="x")
        until(lambda: engine.statistics().waiting == 0)
        # Of several prompts none is kept when one finds no place.
        cancelled = engine.statistics().ended["cancelled"]
        status, _, _ = crowded.ask("POST", "/v1/completions", LONG | {"prompt": ["a", "b", "c"]})
        assert status == 429
        until(lambda: engine.statistics().ended["cancelled"] == cancelled + 1)
    until(lambda: engine.statistics().running == 0)


def test_who_reads_nothing_is_let_go_and_holds_nobody(crowded):
    """The answers fill the connection's buffers; its requests end and its slot is free."""
    engine = crowded.service.engine
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 2048)
        slow.connect(("127.0.0.1", crowded.port))
        data = json.dumps(LONG | {"stream": True, "logprobs": 20}).encode()
        head = f"Host: localhost\r\nContent-Length: {len(data)}\r\nContent-Type: application/json"
        slow.sendall(f"POST /v1/completions HTTP/1.1\r\n{head}\r\n\r\n".encode() + data)
        until(lambda: engine.statistics().running == 1)
        status, answer, _ = crowded.ask(
            "POST", "/v1/completions", {"model": NAME, "prompt": "y", "max_tokens": 3}
        )
        assert status == 200
        assert answer["usage"]["completion_tokens"] == 3
        until(lambda: crowded.service.active == 0)


def test_a_server_that_stops_refuses_and_lets_streams_end():
    engine = start_engine(Limits(slots=4, queue=4, batch_sizes=(4,)))
    with served(engine, patience=Patience(drain_seconds=20)) as server:
        kept = HTTPConnection("127.0.0.1", server.port, timeout=60)
        kept.request("GET", "/v1/models", headers={"Host": "localhost"})
        assert kept.getresponse().read()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(
            model=NAME, prompt="x", max_tokens=2000, stream=True, extra_body={"ignore_eos": True}
        )
        first = next(stream)
        server.running.stop()
        until(lambda: server.service.is_stopping)
        kept.request("GET", "/v1/models", headers={"Host": "localhost"})
        response = kept.getresponse()
        assert response.status == 503
        assert response.getheader("retry-after") == "5"
        assert json.loads(response.read())["error"]["code"] == "server_stopping"
        assert server.ask("GET", "/health")[0] == 503
        chunks = [first, *stream]
        assert chunks[-1].choices[0].finish_reason == "length"
        kept.close()
        client.close()


def test_a_stream_that_runs_too_long_ends_with_an_error():
    engine = start_engine(Limits(slots=4, queue=4, batch_sizes=(4,)))
    with served(engine, patience=Patience(drain_seconds=0.2)) as server:
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0)
        stream = client.completions.create(**_long_stream())
        assert next(stream).choices
        server.running.stop()
        with client, pytest.raises(openai.APIError, match="the server stops"):
            list(stream)


def _long_stream():
    fields = {key: value for key, value in LONG.items() if key != "ignore_eos"}
    return {**fields, "stream": True, "extra_body": {"ignore_eos": True}}


def test_time_that_passes_ends_an_answer_as_it_is():
    engine = start_engine(Limits(slots=4, queue=4, batch_sizes=(4,), time_limit_s=100))
    with served(engine) as server:
        # Some of all four: they are read one after another, and answered together.
        with an_hour_passes_once(lambda: engine.statistics().completion_tokens >= 400):
            status, answer, _ = server.ask("POST", "/v1/completions", LONG | {"n": 4})
        assert status == 200
        assert [choice["finish_reason"] for choice in answer["choices"]] == ["length"] * 4
        assert 4 <= answer["usage"]["completion_tokens"] < 4 * 4000
        with contextlib.closing(begin(server.port, LONG | {"n": 4})):
            until(lambda: engine.statistics().running == 4)
            engine._limits = dataclasses.replace(engine._limits, time_limit_s=0.001)
            status, answer, headers = server.ask("POST", "/v1/completions", LONG)
    assert (status, answer["error"]["code"]) == (503, "timeout")
    assert int(headers["retry-after"]) >= 1
