"""Keys, host names and origins; what is refused for its size; what is logged; what cannot start."""

import contextlib
import json
import re
import socket
from http.client import HTTPConnection

import pytest
from served import NAME, served

from mmfree_jax.cli.main import main
from mmfree_jax.errors import ConfigError
from mmfree_jax.serve.gate import is_loopback, read_keys
from mmfree_jax.serve.server import Patience
from mmfree_jax.serve.service import ServiceLimits

BODY = {"model": NAME, "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded(engine):
    limits = ServiceLimits(body_bytes=2000, prompt_tokens=50, max_tokens=30, choices=5)
    keys = ("first-key", "second-key")
    with served(engine, limits, lent=True, keys=keys, allowed_origins=["https://a.example"]) as s:
        yield s


def test_a_request_must_bring_a_key(guarded):
    for header in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "first-key"},
                   {"Authorization": "Basic first-key"}, {"Authorization": "Bearer "},
                   {"Authorization": "Bearer first-key second-key"}):  # fmt: skip
        for line in ("POST /v1/completions", "GET /v1/models", "GET /metrics", "GET /nothing"):
            method, path = line.split()
            status, error, headers = guarded.ask(method, path, BODY, header)
            assert (status, error["error"]["code"]) == (401, "invalid_api_key")
            assert headers["www-authenticate"] == "Bearer"
    for key in ("first-key", "second-key"):
        header = {"Authorization": f"Bearer {key}"}
        assert guarded.ask("POST", "/v1/completions", BODY, header)[0] == 200
    assert guarded.ask("GET", "/health")[0] == 200
    assert guarded.ask("GET", "/")[0] == 200


def ask(server, body, **headers):
    status, error, _ = server.ask(
        "POST", "/v1/completions", body, {"Authorization": "Bearer first-key", **headers}
    )
    return status, error["error"]["param"], error["error"]["code"]


def test_what_is_too_much_is_refused(guarded):
    assert ask(guarded, BODY | {"prompt": "x" * 3000}) == (413, None, "request_too_large")
    assert ask(guarded, BODY | {"prompt": "x" * 60}) == (400, "prompt", "context_length_exceeded")
    assert ask(guarded, BODY | {"max_tokens": 31}) == (400, "max_tokens", "invalid_value")
    assert ask(guarded, BODY | {"n": 6}) == (400, "n", "invalid_value")
    assert ask(guarded, BODY | {"prompt": [258]}) == (400, "prompt", None)
    assert ask(guarded, BODY | {"stop_token_ids": [300]}) == (400, "stop_token_ids", None)
    assert ask(guarded, BODY | {"session": "../x"}) == (400, "session", None)
    assert ask(guarded, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert ask(guarded, b'{"model": "\xff"}') == (400, None, "invalid_json")


def test_a_body_without_a_length_is_bounded_and_one_that_is_late_too(guarded, engine):
    connection = HTTPConnection("127.0.0.1", guarded.port, timeout=30)
    headers = {"Authorization": "Bearer first-key", "Content-Type": "application/json"}
    pieces = (b" " * 500 for _ in range(10))
    connection.request("POST", "/v1/completions", pieces, headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()
    with (
        served(engine, ServiceLimits(body_seconds=0.3), lent=True) as hasty,
        socket.create_connection(("127.0.0.1", hasty.port), timeout=30) as late,
    ):
        head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n{head}"
        late.sendall(f"{head}\r\n".encode())
        assert b" 408 " in late.recv(100)


def test_other_sites_may_not_read_unless_they_are_named(guarded, small):
    preflight = {"Access-Control-Request-Method": "POST",
                 "Access-Control-Request-Headers": "content-type"}  # fmt: skip
    allowed = {"Origin": "https://a.example", **preflight}
    assert (
        guarded.ask("OPTIONS", "/v1/completions", None, allowed)[2]["access-control-allow-origin"]
        == "https://a.example"
    )
    other = guarded.ask("OPTIONS", "/v1/completions", None, allowed | {"Origin": "https://b.c"})
    assert "access-control-allow-origin" not in other[2]
    for method, headers in (("OPTIONS", allowed), ("GET", {"Origin": "https://a.example"})):
        found = small.ask(method, "/v1/models", None, headers)[2]
        assert not [name for name in found if name.startswith("access-control")]


def test_a_name_that_was_made_to_point_here_is_refused(small, engine):
    for host in ("localhost", f"localhost:{small.port}", "127.0.0.1", "[::1]:80", "10.1.2.3:1",
                 socket.gethostname()):  # fmt: skip
        assert small.ask("GET", "/v1/models", None, {"Host": host})[0] == 200
    for host in ("evil.example", "evil.example:8000", "localhost.evil.example", "127.0.0.1.nip.io",
                 "", "[::1", "127.0.0.1@evil.example"):  # fmt: skip
        for path in ("/v1/models", "/", "/health"):
            status, error, _ = small.ask("GET", path, None, {"Host": host})
            assert (status, error["error"]["code"]) == (403, "unknown_host")
    with served(engine, lent=True, allowed_hosts=["models.example"]) as named:
        assert named.ask("GET", "/health", None, {"Host": "Models.example:80"})[0] == 200


def test_paths_and_methods_that_are_none(small):
    for method, path, wanted in (("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405),
                                 ("POST", "/v2/completions", 404), ("GET", "/page/../app.py", 404),
                                 ("GET", "/page/%2e%2e%2fapp.py", 404), ("GET", "/v1/", 404),
                                 ("GET", "/page/index.html", 404)):  # fmt: skip
        status, error, _ = small.ask(method, path)
        assert status == wanted
        assert set(error["error"]) == {"message", "type", "param", "code"}


def test_a_compressed_body_is_refused_by_its_encoding(small):
    for encoding in ("gzip", "br"):
        headers = {"Content-Encoding": encoding}
        status, error, _ = small.ask("POST", "/tokenize", {"prompt": "a"}, headers)
        assert (status, error["error"]["code"]) == (415, "unsupported_media_type")
        assert f"the content encoding is '{encoding}'" in error["error"]["message"]
    assert (
        small.ask("POST", "/tokenize", {"prompt": "a"}, {"Content-Encoding": "identity"})[0] == 200
    )


def test_the_name_of_a_new_session_is_named(small):
    status, error, _ = small.ask("POST", "/v1/sessions", {"name": "../a", "prompt": "x"})
    assert (status, error["error"]["param"]) == (400, "name")


def test_keys_are_read_from_a_file(tmp_path, capsys):
    file = tmp_path / "keys"
    file.write_text("# of the team\nabc\n\n  def  \n")
    file.chmod(0o600)
    assert read_keys(file) == ("abc", "def")
    assert capsys.readouterr().err == ""
    file.chmod(0o644)
    read_keys(file)
    assert "can be read by others: chmod 600" in capsys.readouterr().err
    faults = {"": "holds no key", "#a\n": "holds no key", "abc\na b\n": "line 2", "ü": "line 1"}
    for text, message in faults.items():
        file.write_text(text)
        with pytest.raises(ConfigError, match=message):
            read_keys(file)
    file.write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_keys(file)


def test_which_addresses_are_this_machines_alone():
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.com", "")))


def test_what_cannot_be_served_is_told_in_one_line(tmp_path, capsys):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        for options, message in (
            (["--host", "0.0.0.0"], r"--host is '0\.0\.0\.0', which others reach, .*--allow-open"),
            (["--port", port], "another program listens there: choose another port"),
            (["--host", "203.0.113.9", "--allow-open"], "give an address of this machine"),
            (["--host", "a..b", "--allow-open"], "--host is 'a..b': it is no host name"),
            (["--host", "a" * 300, "--allow-open"], "it is no host name"),
            (["--api-key-file", str(tmp_path / "none")], "cannot be read"),
            (["--allowed-hosts", "a.example:80"], "--allowed-hosts has 'a.example:80': give names"),
            (["--allowed-hosts", "https://a.example"], "--allowed-hosts has 'https://a.example'"),
            (["--allowed-origins", "x y"], "--allowed-origins has 'x y': give each as browsers"),
            (["--allowed-origins", "a.example"], "--allowed-origins has 'a.example'"),
            (["--allowed-origins", "https://a.example/"], "has 'https://a.example/'"),
            (["--allowed-origins", "https://A.example"], "has 'https://A.example'"),
            (["--port", "0"], "is not a folder"),
            (
                [
                    "--port",
                    "0",
                    "--allowed-hosts",
                    "a.b,::1",
                    "--allowed-origins",
                    "*,http://[::1]:80,app://-",
                ],
                "is not a folder",
            ),
            (["--slots", "0"], "--slots is 0"),
            (["--drain-seconds", "nan"], "--drain-seconds is nan"),
        ):
            assert main(["serve", "--model", str(tmp_path / "nothing"), *options]) == 2
            err = capsys.readouterr().err
            assert re.search(message, err), err
            assert err.count("\n") == 1


def test_a_silent_connection_is_closed(engine):
    with (
        served(engine, patience=Patience(head_seconds=0.2), lent=True) as s,
        socket.create_connection(("127.0.0.1", s.port), timeout=30) as silent,
        contextlib.suppress(ConnectionResetError),
    ):
        assert silent.recv(10) == b""  # a timeout of the socket fails here


def test_requests_are_logged_if_asked_for(engine, capsys):
    with served(engine, lent=True) as server:
        server.service.log_requests = True
        body = {"model": NAME, "prompt": "logged text", "max_tokens": 1}
        server.ask("POST", "/v1/completions", body)
        server.ask("GET", "/v1/models")
    first, second = map(json.loads, capsys.readouterr().err.splitlines())
    assert (first["path"], first["status"]) == ("/v1/completions", 200)
    assert json.loads(first["body"]) == body
    assert (second["path"], second["body"]) == ("/v1/models", None)
