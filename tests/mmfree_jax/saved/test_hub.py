"""Sending an export: what huggingface_hub itself sends to a server on this machine."""

import base64
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub import constants

from mmfree_jax.cli.main import main

RUN = Path(__file__).parent / "old/run"
NAMES = [
    "README.md",
    "checks_mmfree.py",
    "config.json",
    "configuration_mmfree.py",
    "generation_config.json",
    "linear_mmfree.py",
    "model.safetensors",
    "modeling_mmfree.py",
    "recurrence_mmfree.py",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def server(monkeypatch):
    """A Hub that takes whatever it is sent; gives the requests: (path, token, body)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = self.read_body()
            requests.append((self.path, self.headers["Authorization"], body))
            address = f"http://{self.headers['Host']}/me/words"
            if self.path == "/api/repos/create":
                answer = {"url": address}
            elif self.path.endswith("/preupload/main"):
                paths = [file["path"] for file in json.loads(body)["files"]]
                answer = {"files": [
                    {"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths
                ]}  # fmt: skip
            elif "/commit/" in self.path:
                answer = {"commitOid": "1" * 40, "commitUrl": f"{address}/commit/{'1' * 40}"}
            else:
                answer = {"errors": [], "warnings": []}
            self.send_response(403 if "denied" in self.path or b"denied" in body else 200)
            self.end_headers()
            self.wfile.write(json.dumps(answer).encode())

        def read_body(self):
            if self.headers["Transfer-Encoding"] != "chunked":
                return self.rfile.read(int(self.headers["Content-Length"]))
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            return b"".join(chunks)

        def log_message(self, *args):
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as found:
        thread = threading.Thread(target=found.serve_forever, daemon=True)
        thread.start()
        address = f"http://127.0.0.1:{found.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", "hf_test")
        yield requests
        found.shutdown()
        thread.join()


@pytest.fixture
def export(tmp_path, monkeypatch, capsys):
    """Runs the command with further words; gives its exit code, output and errors."""
    monkeypatch.chdir(tmp_path)

    def run(words):
        code = main(["export-hf", str(RUN), "hf", *words.split()])
        return code, *capsys.readouterr()

    return run


def refused(result, *why):
    code, _, error = result
    assert code == 2
    assert error.startswith("mmfree: error: ")
    assert error.count("\n") == 1
    assert all(text in error for text in why), error


def test_the_files_go_out_as_one_commit(export, server):
    code, out, _ = export("--push-to-hub me/words")
    assert code == 0
    assert out.splitlines()[-1].startswith("http://127.0.0.1:")
    assert {token for _, token, _ in server} == {"Bearer hf_test"}
    bodies = {path.partition("?")[0]: body for path, _, body in server}
    made = json.loads(bodies["/api/repos/create"])
    assert made["name"] == "words"
    assert made["organization"] == "me"
    assert made.get("private") is True or made.get("visibility") == "private"
    lines = [json.loads(x) for x in bodies["/api/models/me/words/commit/main"].splitlines()]
    assert lines[0]["value"]["summary"] == "Add hf"
    sent = {x["value"]["path"]: base64.b64decode(x["value"]["content"]) for x in lines[1:]}
    assert sorted(sent) == NAMES
    assert all(data == (Path("hf") / name).read_bytes() for name, data in sent.items())
    assert b'from_pretrained("me/words", trust_remote_code=True)' in sent["README.md"]


def test_a_dry_run_lists_the_files_and_sends_nothing(export, server, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    code, out, _ = export("--push-to-hub me/words --dry-run")
    assert code == 0
    assert server == []
    *listed, last = out.splitlines()[1:]
    sizes = [(Path("hf") / name).stat().st_size for name in NAMES]
    assert [line.split() for line in listed] == [
        [f"{size:,}", name] for size, name in zip(sizes, NAMES, strict=True)
    ]
    assert last == f"me/words: {len(NAMES)} files, {sum(sizes):,} bytes; dry run: nothing is sent"


def test_what_cannot_be_sent_to_is_refused_before_anything_is_written(export, monkeypatch):
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    refused(export("--push-to-hub me/words"), "--push-to-hub me/words needs a token", "HF_TOKEN")
    for name in ("a/b/c", "datasets/a/b", "-x/y", "a--b"):
        why = f"--push-to-hub is '{name}': give the repository as owner/name"
        refused(export(f"--push-to-hub={name} --dry-run"), why)
    refused(export("--dry-run"), "--dry-run is given", "--push-to-hub OWNER/NAME")
    assert not Path("hf").exists()


def test_a_hub_that_refuses_leaves_the_folder(export, server):
    refused(export("--push-to-hub me/denied"), "me/denied was not sent", "403", "hf is written")
    assert Path("hf/model.safetensors").is_file()


def test_no_network_is_one_line(export, server, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(export("--push-to-hub me/words"), "me/words was not sent", "Connect", "hf is written")
    assert server == []
