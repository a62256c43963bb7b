"""One server for the tests of what clients see, and one engine behind all servers of a module."""

from collections.abc import Iterator

import openai
import pytest
from served import Served, served, start_engine

from mmfree_jax.serve.engine import Engine


@pytest.fixture(scope="package")
def engine() -> Iterator[Engine]:
    """An engine of the small model, which several servers use."""
    engine = start_engine()
    yield engine
    engine.close(drain=False)


@pytest.fixture(scope="package")
def small(engine: Engine) -> Iterator[Served]:
    """A server without keys."""
    with served(engine, lent=True) as server:
        yield server


@pytest.fixture
def client(small: Served) -> Iterator[openai.OpenAI]:
    """OpenAI's own client."""
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="none", max_retries=0) as client:
        yield client
