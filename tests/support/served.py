"""A small random model behind a real server on loopback, in a thread of this process."""

import contextlib
import dataclasses
import json
import threading
from collections.abc import Iterator, Mapping
from http.client import HTTPConnection
from pathlib import Path
from typing import Any

from initial_params import initial_params

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.serve import server
from mmfree_jax.serve.app import make_app
from mmfree_jax.serve.chat_template import find_chat_format
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.metrics import Metrics
from mmfree_jax.serve.requests import Limits
from mmfree_jax.serve.service import Service, ServiceLimits

CONFIG = ModelConfig(
    vocab_size=258,
    hidden_size=32,
    num_layers=1,
    intermediate_size=32,
    compute_dtype="float32",
    residual_dtype="float32",
    remat="none",
)
NAME = "small"


def small_model() -> tuple[LanguageModel, dict[str, Any]]:
    """A byte model whose answers vary with what it has read."""
    model = LanguageModel(CONFIG)
    params = initial_params(CONFIG)
    # Its first logits are all but equal: a larger head makes some bytes likely.
    head = dict(params["head"], norm_scale=4 * params["head"]["norm_scale"])
    return model, dict(params, head=head)


def write_small_model(folder: Path) -> None:
    """The same model as a folder."""
    folder.mkdir(parents=True)
    write_model(folder, CONFIG, small_model()[1])
    (folder / "tokenizer").mkdir()
    ByteTokenizer().save(folder / "tokenizer")


@dataclasses.dataclass(frozen=True)
class Served:
    """A server that runs.

    Attributes:
      url: of the server.
      port: that it listens at.
      service: what it serves.
      running: it.
    """

    url: str
    port: int
    service: Service
    running: server.Running

    def ask(
        self, method: str, path: str, body: Any = None, headers: Mapping[str, str] | None = None
    ) -> tuple[int, Any, Mapping[str, str]]:
        """One request by the standard library: status, parsed JSON (or bytes) and headers."""
        data = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
        sent = {"Content-Type": "application/json"} if data is not None else {}
        connection = HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, data, {**sent, **(headers or {})})
            response = connection.getresponse()
            content = response.read()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in response.getheaders()}
        is_json = found.get("content-type", "").startswith("application/json")
        return response.status, json.loads(content) if is_json else content, found


class _Lent:
    """An engine that another server uses too, and closes."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def close(self, *, drain: bool = True) -> None:
        del drain


def start_engine(limits: Limits | None = None, sessions: Path | None = None) -> Engine:
    """An engine of the small model."""
    model, params = small_model()
    limits = limits or Limits(slots=4, queue=64, batch_sizes=(4,))
    engine = Engine(model, params, limits, sessions=sessions)
    engine.start(warm_up=False)
    return engine


@contextlib.contextmanager
def served(
    engine: Engine,
    service_limits: ServiceLimits | None = None,
    patience: server.Patience | None = None,
    *,
    tokenizer_folder: Path | None = None,
    lent: bool = False,
    end_ids: tuple[int, ...] = (257,),
    **app: Any,
) -> Iterator[Served]:
    """Serves the small model while inside; closes the engine unless it is only lent."""
    if lent:
        engine = _Lent(engine)  # type: ignore[assignment]
    service = Service(
        name=NAME,
        engine=engine,
        tokenizer=ByteTokenizer(),
        chat=find_chat_format(ByteTokenizer(), tokenizer_folder),
        end_ids=end_ids,
        limits=service_limits or ServiceLimits(),
        metrics=Metrics(engine),
        created=0,
    )
    with server.bind("127.0.0.1", 0) as listening:
        running = server.Running(
            make_app(service, **app), service, patience or server.Patience(drain_seconds=5)
        )
        ready = threading.Event()
        thread = threading.Thread(target=running.run, args=(listening, ready.set))
        thread.start()
        try:
            assert ready.wait(60)
            url = server.address_of(listening)
            yield Served(url, int(url.rpartition(":")[2]), service, running)
        finally:
            running.stop()
            thread.join(60)
            assert not thread.is_alive()
