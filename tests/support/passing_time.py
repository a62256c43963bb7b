"""Time that passes when a test says so, and not by how busy the machine is."""

import contextlib
import time
import types
from collections.abc import Callable, Iterator

import pytest


@contextlib.contextmanager
def an_hour_passes_once(happened: Callable[[], bool]) -> Iterator[None]:
    """Inside, the time limits of an engine's requests are over once something has happened."""

    def monotonic() -> float:
        return time.monotonic() + (3600.0 if happened() else 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmfree_jax.serve.job.time", types.SimpleNamespace(monotonic=monotonic))
        yield
