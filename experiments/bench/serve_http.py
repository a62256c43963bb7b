"""A real server of an engine, in a thread of this process, for clients that are elsewhere."""

import contextlib
import threading
import time
from collections.abc import Iterator, Sequence

from mmfree_jax.data.tokenizer import ByteTokenizer, Tokenizer
from mmfree_jax.serve import server
from mmfree_jax.serve.app import make_app
from mmfree_jax.serve.chat_template import find_chat_format
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.metrics import Metrics
from mmfree_jax.serve.service import Service, ServiceLimits

NAME = "bench"
_PATIENCE_S = 60.0


class StandIn(ByteTokenizer):
    """For a model without a tokenizer: three letters for each id."""

    kind = "stand-in"

    def decode_bytes(self, ids: Sequence[int]) -> bytes:
        """Bytes of ids."""
        return b"".join(bytes((97 + i % 26, 97 + i // 26 % 26, 32)) for i in map(int, ids))


@contextlib.contextmanager
def serve_engine(engine: Engine, tokenizer: Tokenizer | None) -> Iterator[str]:
    """The URL of a server on loopback; it closes the engine at the end.

    Args:
      engine: started.
      tokenizer: of the model; None: a stand-in.
    """
    tokenizer = tokenizer or StandIn()
    service = Service(
        name=NAME,
        engine=engine,
        tokenizer=tokenizer,
        chat=find_chat_format(tokenizer, None),
        end_ids=(),
        limits=ServiceLimits(choices=engine.plan.slots),
        metrics=Metrics(engine),
        created=int(time.time()),
    )
    listening = server.bind("127.0.0.1", 0)
    running = server.Running(make_app(service), service, server.Patience())
    ready = threading.Event()
    thread = threading.Thread(target=running.run, args=(listening, ready.set), daemon=True)
    thread.start()
    ready.wait(_PATIENCE_S)
    try:
        yield server.address_of(listening)
    finally:
        running.stop()
        thread.join(_PATIENCE_S)
        listening.close()
