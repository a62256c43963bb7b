"""Notices of a metadata server, which here is one of the test's own, and what a run does then."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlparse

import pytest
from whole_runs import replace

from mmfree_jax import notices
from mmfree_jax.notices import Notices, metadata_host
from mmfree_jax.progress import Display
from mmfree_jax.saved.manifest import checkpoint_steps
from mmfree_jax.train.stop import STOP_CODES, StopRequest, reason_of
from mmfree_jax.train.training import train

_ROOT = "/computeMetadata/v1/instance/"


class Metadata:
    """A machine's values, served as Compute Engine does; None: it has no such value."""

    def __init__(self):
        self.values = {"preempted": "FALSE", "maintenance-event": "NONE"}
        self.asked = []
        self._changed = threading.Condition()
        metadata = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                metadata.answer(self)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.host = f"127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.01,)).start()

    def set(self, **values):
        with self._changed:
            self.values |= {name.replace("_", "-"): value for name, value in values.items()}
            self._changed.notify_all()

    def until_asked(self, condition):
        """Waits until requests came of which the condition holds."""
        with self._changed:
            assert self._changed.wait_for(lambda: condition(self.asked), timeout=60)

    def answer(self, request):
        url = urlparse(request.path)
        name, query = url.path.removeprefix(_ROOT), parse_qs(url.query)
        with self._changed:
            self.asked.append((name, "wait_for_change" in query))
            self._changed.notify_all()
            if "wait_for_change" in query and request.headers["Metadata-Flavor"] == "Google":
                before = query["last_etag"][0]
                self._changed.wait_for(lambda: self.etag(name) != before, timeout=60)
            value = self.values.get(name)
            request.send_response(404 if value is None else 200)
            request.send_header("Metadata-Flavor", "Google")
            request.send_header("ETag", self.etag(name))
            request.end_headers()
            request.wfile.write(str(value).encode() + b"\n")

    def etag(self, name):
        return f"e-{self.values.get(name)}"

    def close(self):
        self.set(preempted="over", maintenance_event="over")
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def metadata():
    server = Metadata()
    yield server
    server.close()


@pytest.fixture
def announced(metadata):
    """The notices that came, and an event that is set by one."""
    came, told = [], threading.Event()
    watch = Notices(metadata.host, lambda name: (came.append(name), told.set()))
    yield came, told
    watch.close()


def _waits_for(name):
    return lambda asked: (name, True) in asked


def test_a_preemption_is_told_while_it_is_waited_for(metadata, announced):
    came, told = announced
    metadata.until_asked(_waits_for("preempted"))
    metadata.set(preempted="TRUE")
    assert told.wait(60)
    assert came == ["preempted"]
    assert metadata.asked[0][1] is False, "the first value is not waited for"


def test_maintenance_is_told_and_a_migration_is_not(metadata, announced):
    came, told = announced
    metadata.until_asked(_waits_for("maintenance-event"))
    metadata.set(maintenance_event="MIGRATE_ON_HOST_MAINTENANCE")
    metadata.until_asked(lambda asked: asked.count(("maintenance-event", True)) == 2)
    assert came == []
    metadata.set(maintenance_event="TERMINATE_ON_HOST_MAINTENANCE")
    assert told.wait(60)
    assert came == ["maintenance"]


def _threads():
    return [t for t in threading.enumerate() if t.name.startswith("notices-")]


def test_what_a_machine_does_not_know_is_not_asked_again(metadata):
    metadata.values = {"maintenance-event": "NONE"}
    watch = Notices(metadata.host, lambda name: None)
    asked = [t for t in _threads() if t.name == "notices-preempted"]
    for thread in asked:
        thread.join(60)
    metadata.until_asked(_waits_for("maintenance-event"))
    watch.close()
    assert [name for name, _ in metadata.asked].count("preempted") == 1


def test_closing_ends_a_request_that_waits_and_one_that_nobody_answers(metadata):
    nobody = Notices("127.0.0.1:9", lambda name: None)
    watch = Notices(metadata.host, lambda name: None)
    metadata.until_asked(_waits_for("preempted"))
    metadata.until_asked(_waits_for("maintenance-event"))
    threads = _threads()
    assert len(threads) == 4
    watch.close()
    nobody.close()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()


def test_elsewhere_nobody_is_asked(monkeypatch, tmp_path):
    product = tmp_path / "product_name"
    monkeypatch.setattr(notices, "_PRODUCT", product)
    host = {"GCE_METADATA_HOST": "h:1"}
    assert metadata_host("auto", {}) is None
    product.write_text("Some Server\n")
    assert metadata_host("auto", {}) is None
    assert metadata_host("gce", {}) == "metadata.google.internal"
    assert [metadata_host(kind, host) for kind in ("auto", "gce", "none")] == ["h:1", "h:1", None]
    product.write_text("Google Compute Engine\n")
    assert metadata_host("auto", {}) == "metadata.google.internal"
    assert metadata_host("none", {}) is None


def test_one_reason_stands_for_all_processes():
    said = []
    request = StopRequest(said.append)
    assert reason_of(request.wish) is None
    request.announce("maintenance")
    request.announce("preempted")
    assert reason_of(request.wish) == "maintenance"
    assert len(said) == 1
    assert STOP_CODES["SIGUSR1"] == 138
    assert STOP_CODES["preempted"] == STOP_CODES["maintenance"] == 143


@pytest.mark.usefixtures("cached_compilation")
def test_a_run_saves_and_says_why(metadata, small_run, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("GCE_METADATA_HOST", metadata.host)
    noticed = threading.Event()

    class Shown(Display):
        def notice(self, text):
            print(text)
            noticed.set()

        def line(self, text):
            print(text)

    def on_step(step):
        if step == 3:
            metadata.set(preempted="TRUE")
            assert noticed.wait(60)

    config = replace(small_run, run_dir=str(tmp_path), mesh__fsdp=1, eval__batches=0)
    summary = train(config, on_step=on_step, display=Shown())
    assert (summary["status"], summary["stopped_by"], summary["step"]) == (
        "stopped", "preempted", 3,
    )  # fmt: skip
    assert checkpoint_steps(tmp_path / "checkpoints") == [3]
    said = capsys.readouterr().out
    assert "preempted: Compute Engine takes this machine back: saving after this step" in said
    assert "preempted: saved step 3; run the same command to go on" in said
