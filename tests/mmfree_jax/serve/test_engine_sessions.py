"""Named sessions: what goes on from them, and what becomes of them on disk."""

import dataclasses
from pathlib import Path

import pytest
from small_packed_model import BASE
from small_served_model import FOUR, answer, ask, changed, engine, events, prompt, served

from mmfree_jax.errors import CheckpointError, ConfigError, MMFreeError, OutputError
from mmfree_jax.files import InUseError
from mmfree_jax.infer import fork, load_session, save_session
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.requests import End, Request, RowSampling, SessionsFull, UnknownSession, Usage

DRAWN = RowSampling(0.8, repetition_penalty=1.3)
WHOLE = Request(prompt(9), 12, DRAWN, seed=2)


def test_a_session_goes_on_as_if_nothing_had_been_between(tmp_path: Path) -> None:
    with engine(sessions=tmp_path) as running:
        wanted = ask(running, WHOLE)[0]
        assert ask(running, changed(WHOLE, max_tokens=5, save_as="talk"))[0] == wanted[:5]
        (info,) = running.sessions()
        assert (info.name, info.tokens) == ("talk", 14)
        assert info.bytes == running.statistics().session_bytes
        rest = changed(WHOLE, prompt=(), max_tokens=7, session="talk")
        assert ask(running, rest) == (wanted[5:], End("length", Usage(0, 0, 7)))
        running.fork_session("talk", "copy")
        # It is appended to, and the fork stays where it was.
        ask(running, changed(rest, prompt=(4, 5), save_as="talk"))
        assert [(s.name, s.tokens) for s in running.sessions()] == [("copy", 14), ("talk", 23)]
        assert ask(running, changed(rest, session="copy"))[0] == wanted[5:]
        with pytest.raises(UnknownSession, match="not kept"):
            running.restore_session("talk")
    # As the engine was closed, they were kept; `mmfree generate` reads such files too.
    assert sorted(p.name for p in tmp_path.glob("*.safetensors")) == [
        "copy.safetensors",
        "talk.safetensors",
    ]
    _, weights = served()
    loaded = load_session(tmp_path / "talk.safetensors", weights, BASE)
    assert loaded.state.position_B.tolist() == [23]
    with engine(sessions=tmp_path) as running:
        assert ask(running, changed(rest, session="copy"))[0] == wanted[5:]
        ask(running, Request((1,), 1, save_as="copy"))
        assert running.restore_session("copy").tokens == 14
        running.delete_session("talk")
        assert not (tmp_path / "talk.safetensors").exists()
        with pytest.raises(UnknownSession, match="'talk'"):
            running.delete_session("talk")
        with pytest.raises(ConfigError, match="name is 'a/b'"):
            running.fork_session("copy", "a/b")
        with pytest.raises(InUseError, match="in use"):
            Engine(*served(), FOUR, sessions=tmp_path)


def test_a_cut_answer_is_saved_as_far_as_it_counts() -> None:
    with engine() as running:
        wanted = ask(running, changed(WHOLE, max_tokens=40))[0]
        handle = running.submit(changed(WHOLE, max_tokens=10_000, save_as="cut"))
        found, stream = [], handle.events(60)
        while len(answer(found)) < 9:
            found.append(next(stream))
        handle.cancel(keep=6)
        end = [*found, *stream][-1]
        assert end == End("cancelled", Usage(9, 0, 6))
        assert running.sessions()[0].tokens == 15
        rest = changed(WHOLE, prompt=(), max_tokens=34, session="cut")
        assert ask(running, rest)[0] == wanted[6:]
        # What was broken off without a word is not saved.
        handle = running.submit(changed(WHOLE, max_tokens=10_000, save_as="broken"))
        handle.cancel()
        events(handle)
        ask(running, Request(prompt(5), 0, save_as="read"))
        assert [s.name for s in running.sessions()] == ["cut", "read"]


def test_sessions_have_bounded_memory() -> None:
    with engine(dataclasses.replace(FOUR, session_bytes=1000)) as running:
        ask(running, Request((1,), 1, save_as="one"))
        size = running.sessions()[0].bytes
        assert size < 1000 < 2 * size
        with pytest.raises(SessionsFull, match="'two'"):
            running.submit(Request((1,), 1, save_as="two"))
        with pytest.raises(SessionsFull, match="'two'"):
            running.fork_session("one", "two")
        ask(running, Request((1, 2), 1, save_as="one"))
        assert running.sessions()[0].tokens == 3


def test_what_is_no_session_of_this_model_stays_as_it_is(tmp_path: Path) -> None:
    model, weights = served()
    notes = tmp_path / "notes.safetensors"
    with engine(sessions=tmp_path) as running:
        for name in ("a", "notes"):
            ask(running, Request((1,), 1, save_as=name))
        notes.write_bytes(b"my own")  # after the start
        with pytest.raises(OutputError, match="no session"):
            running.delete_session("notes")
        with pytest.raises(OutputError, match=r"notes.safetensors is not replaced"):
            running.close()
    assert (tmp_path / "a.safetensors").exists()  # the others were kept all the same
    assert notes.read_bytes() == b"my own"
    with pytest.raises(CheckpointError, match="no readable header"):
        Engine(model, weights, FOUR, sessions=tmp_path)
    notes.unlink()
    other = weights.replace(final_norm_D=2 * weights.final_norm_D)
    with pytest.raises(CheckpointError, match="other weights"):
        Engine(model, other, FOUR, sessions=tmp_path)
    two = fork(load_session(tmp_path / "a.safetensors", weights, BASE), 2)
    save_session(tmp_path / "b.safetensors", two, weights, BASE)
    with pytest.raises(CheckpointError, match="2 rows"):
        Engine(model, weights, FOUR, sessions=tmp_path)
    (tmp_path / "b.safetensors").rename(tmp_path / "-b.safetensors")
    with pytest.raises(MMFreeError, match=r"-b.safetensors"):
        Engine(model, weights, FOUR, sessions=tmp_path)
