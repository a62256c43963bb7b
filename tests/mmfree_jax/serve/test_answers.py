"""Answers from events that hold several tokens, as an engine on a GPU gives them."""

import asyncio

import pytest

from mmfree_jax.data.tokenizer import ByteTokenizer
from mmfree_jax.serve.answers import Answer
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.request_errors import RequestError
from mmfree_jax.serve.requests import End, Request, Tokens, TokenScore, Usage

USAGE = Usage(1, 0, 8)


def read(events, stops=(), **request):
    """The pieces of an answer whose events have all come, and its handle."""
    handle = Handle(Request((256,), 50, **request))
    for event in events:
        handle.put(event)

    async def pieces():
        return [piece async for piece in Answer(handle, ByteTokenizer(), stops).pieces()]

    return asyncio.run(pieces()), handle


def test_a_stop_string_amid_the_tokens_of_one_event_says_how_many_count():
    scores = tuple(TokenScore(-float(i)) for i in range(8))
    events = [Tokens(tuple(b"ab##cdef"), scores), End("cancelled", USAGE)]
    pieces, handle = read(events, ["##"], logprobs=0)
    assert handle.keep == 4
    assert "".join(piece.text for piece in pieces) == "ab"
    assert [s.token for piece in pieces for s in piece.scored] == list(b"ab")
    assert [s.offset for piece in pieces for s in piece.scored] == [0, 1]
    assert pieces[-1].finish == "stop"


def test_the_start_of_a_stop_string_is_held_back_until_it_is_none():
    events = [Tokens(tuple(b"a#")), Tokens(tuple(b"b#")), End("length", USAGE)]
    pieces, handle = read(events, ["##"])
    assert "".join(piece.text for piece in pieces) == "a#b#"
    assert (pieces[-1].finish, handle.cancelled) == ("length", False)


def test_tokens_that_wait_together_make_one_piece():
    pieces, _ = read([Tokens(tuple(b"ab")), Tokens(tuple(b"cd")), End("stop", USAGE)])
    assert [(piece.text, piece.finish) for piece in pieces] == [("abcd", "stop")]
    assert pieces[0].usage == USAGE


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (End("error", USAGE, "the device failed"), 500),
        (End("cancelled", USAGE), 503),
        (End("timeout", Usage(1, 0, 0), "late"), 503),
    ],
)
def test_a_request_that_the_engine_gave_up_is_an_error(end, status):
    with pytest.raises(RequestError) as e:
        read([Tokens(tuple(b"ab")), end])
    assert e.value.status == status


def test_an_answer_whose_time_passes_ends_as_it_is():
    pieces, _ = read([Tokens(tuple(b"ab")), End("timeout", USAGE)])
    assert [(piece.text, piece.finish) for piece in pieces] == [("ab", "length")]
