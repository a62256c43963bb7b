"""A small packed model behind an engine of four slots, whose programs all tests share."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
from small_packed_model import BASE, build

from mmfree_jax.model import LanguageModel
from mmfree_jax.model.packing import pack
from mmfree_jax.model.weights import Packed, Params, Ternary, as_weights
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.requests import End, Event, Limits, Request, Tokens

FOUR = Limits(slots=4, batch_sizes=(4,), prefix_cache_bytes=0)
PATIENCE_S = 120.0


@functools.cache
def served() -> tuple[LanguageModel, Packed]:
    """The model and its packed weights."""
    model, params = build(BASE)

    @jax.jit
    def packed(params: Params) -> Packed:
        weights = as_weights(params, BASE)
        assert isinstance(weights, Ternary)
        return pack(weights, BASE)

    return model, packed(params)


@contextmanager
def engine(limits: Limits = FOUR, **options: Any) -> Iterator[Engine]:
    """A started engine, closed behind the block."""
    running = Engine(*served(), limits, **options)
    running.start(warm_up=False)
    try:
        yield running
    finally:
        running.close(drain=False)


def prompt(length: int, seed: int = 0) -> tuple[int, ...]:
    """Random tokens."""
    return tuple(np.random.default_rng(seed).integers(0, BASE.vocab_size, length).tolist())


def events(handle: Handle) -> list[Event]:
    """All events of a request."""
    return list(handle.events(PATIENCE_S))


def answer(found: Sequence[Event]) -> list[int]:
    """The tokens among events."""
    return [token for event in found if isinstance(event, Tokens) for token in event.ids]


def ask(running: Engine, request: Request) -> tuple[list[int], End]:
    """The tokens of an answer and its last event."""
    found = events(running.submit(request))
    assert isinstance(found[-1], End)
    return answer(found), found[-1]


def changed(request: Request, **fields: Any) -> Request:
    """The request with other fields."""
    return dataclasses.replace(request, **fields)
