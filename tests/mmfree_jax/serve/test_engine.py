"""The engine against `generate`, and requests in company against the same alone."""

import asyncio
import dataclasses
import functools
import gc
import random
import threading
import weakref

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from passing_time import an_hour_passes_once
from small_packed_model import BASE
from small_served_model import (
    FOUR,
    PATIENCE_S,
    answer,
    ask,
    changed,
    engine,
    events,
    prompt,
    served,
)

from mmfree_jax.errors import ConfigError, DataError
from mmfree_jax.evaluate.scoring import Query, Scorer
from mmfree_jax.infer import generate
from mmfree_jax.model import LanguageModel
from mmfree_jax.model_config import DENSE
from mmfree_jax.serve import engine as engine_module
from mmfree_jax.serve import programs
from mmfree_jax.serve.engine import Engine
from mmfree_jax.serve.plan import Plan
from mmfree_jax.serve.requests import (
    End,
    EngineClosed,
    Limits,
    PromptScores,
    QueueFull,
    Request,
    RowSampling,
    Tokens,
    UnknownSession,
    Usage,
)

DRAWN = RowSampling(0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2)
GREEDY = RowSampling(0.0)


def mixed_requests(count: int) -> list[Request]:
    """Requests of many lengths and kinds of sampling."""
    kinds = [GREEDY, RowSampling(), DRAWN, RowSampling(0.7, frequency_penalty=0.5)]
    return [
        Request(prompt(1 + 29 * i % 83, i), 5 + i % 9, kinds[i % 4], seed=i % 3, sample=i % 2)
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def alone() -> list[list[int]]:
    """The answers to 16 mixed requests, one after another."""
    with engine() as running:
        return [ask(running, request)[0] for request in mixed_requests(16)]


def test_answers_are_those_of_generate() -> None:
    model, weights = served()
    wanted = generate(
        model, weights, [prompt(21)], max_new_tokens=12, seed=[5], streams=[(0, 3)],
        temperature=0.9, top_k=40, top_p=0.9, min_p=0.01, repetition_penalty=1.2,
    )  # fmt: skip
    with engine() as running:
        found, end = ask(running, Request(prompt(21), 12, DRAWN, seed=5, sample=3))
    assert found == wanted.tokens[0]
    assert end == End("length", Usage(21, 0, 12))


def test_an_answer_does_not_depend_on_the_company(alone: list[list[int]]) -> None:
    requests = mixed_requests(16)
    order = random.Random(4).sample(range(16), 16)
    with engine() as running:
        handles = {}
        for place in order:
            handles[place] = running.submit(requests[place])
            if place % 5 == 0:  # others come and go at any time
                running.submit(changed(requests[place], seed=9, max_tokens=50)).cancel()
            if place % 3 == 0:
                next(running.submit(changed(requests[place], max_tokens=1)).events(PATIENCE_S))
        for place in range(16):
            assert answer(events(handles[place])) == alone[place], place


def test_calls_of_several_steps_looked_at_late_give_the_same(
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a GPU, where prompts of several rows are read at once too.
    plan = Plan(4, None, (4,), 4, {16: 3, 64: 2}, 128, ahead=1)
    monkeypatch.setattr(engine_module, "plan_for", lambda *args: plan)
    with engine() as running:
        requests = mixed_requests(16)
        stop = changed(requests[0], stop_ids=(alone[0][2],))
        handles = [running.submit(request) for request in [*requests, stop]]
        found = [events(handle) for handle in handles]
        assert [answer(each) for each in found[:16]] == alone
        assert answer(found[16]) == alone[0][: alone[0].index(alone[0][2])]
        assert found[16][-1].reason == "stop"
        assert running.statistics().running == 0


def test_fewer_rows_are_decoded_in_smaller_calls() -> None:
    request = Request(prompt(7), 6, GREEDY)
    with engine(Limits(slots=4, batch_sizes=(1, 4))) as running:
        first = ask(running, request)[0]
        handles = [running.submit(request) for _ in range(3)]
        assert [answer(events(handle)) for handle in handles] == [first] * 3


def test_log_probabilities_are_the_models_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "_SCORED_AT_ONCE", 8)  # of 16: in two blocks
    model, weights = served()
    ids = prompt(40)
    # Neither a temperature nor a bias changes what they say.
    sampling = RowSampling(0.0, logit_bias=((7, 100.0),))
    request = Request(ids, 2, sampling, logprobs=2, echo_logprobs=True)
    with engine() as running:
        scored, *tokens, end = events(running.submit(request))
    logits = jax.jit(model.apply)(weights, jnp.asarray([[*ids, 7]]))
    wanted = np.asarray(jax.nn.log_softmax(logits[0]))
    assert isinstance(scored, PromptScores)
    assert scored.scores[0] is None
    for place, score in enumerate(scored.scores[1:]):
        assert score is not None
        np.testing.assert_allclose(score.logprob, wanted[place, ids[place + 1]], atol=1e-3)
        best = np.argsort(-wanted[place])[:2]
        assert len(score.top) == 2
        np.testing.assert_allclose([v for _, v in score.top], wanted[place, best], atol=1e-3)
    assert answer(tokens) == [7, 7]
    (first,), (second,) = (event.scores for event in tokens if isinstance(event, Tokens))
    np.testing.assert_allclose(first.logprob, wanted[39, 7], atol=1e-3)
    np.testing.assert_allclose(second.logprob, wanted[40, 7], atol=1e-3)
    assert first.top[0][0] == int(np.argmax(wanted[39]))
    assert end == End("length", Usage(40, 0, 2))
    # The offline harness says the same of the last ten.
    (score,) = Scorer(model, weights, share_contexts=False).score([Query(ids, 10)])
    total = sum(one.logprob for one in scored.scores[30:] if one is not None)
    assert total == pytest.approx(score.log_likelihood, abs=1e-3)


def test_a_cached_prompt_is_not_read_again() -> None:
    request = Request(prompt(70), 5, DRAWN)
    longer = changed(request, prompt=(*prompt(70), 3, 4))
    other = changed(request, prompt=(*prompt(64), *prompt(9, 8)))
    with engine() as running:
        wanted = [ask(running, r)[0] for r in (request, longer, other)]
        assert running.statistics().prefix_entries == 0
    with engine(dataclasses.replace(FOUR, prefix_cache_bytes=2**20)) as running:
        found = [ask(running, r) for r in (request, request, longer, other)]
        assert [ids for ids, _ in found] == [wanted[0], *wanted]
        assert [end.usage.cached_tokens for _, end in found] == [0, 70, 70, 64]
        counts = running.statistics()
    assert (counts.prefix_hits, counts.prefix_misses) == (3, 1)
    assert counts.prefix_tokens_saved == 204
    assert counts.prefix_bytes > 0


def test_what_cannot_be_served_is_refused() -> None:
    with engine(Limits(slots=4, batch_sizes=(4,), max_length=30)) as running:
        with pytest.raises(DataError, match="prompt has token id 61 at position 1"):
            running.submit(Request((1, 61), 5))
        with pytest.raises(ConfigError, match="stop_ids has 99"):
            running.submit(Request((1,), 5, stop_ids=(99,)))
        with pytest.raises(ConfigError, match="logit_bias has -1"):
            running.submit(Request((1,), 5, RowSampling(logit_bias=((-1, 1.0),))))
        with pytest.raises(ConfigError, match="max_tokens is 11, behind 20 tokens"):
            running.submit(Request(prompt(20), 11))
        with pytest.raises(UnknownSession, match="'nobody'"):
            running.submit(Request((1,), 5, session="nobody"))
        assert ask(running, Request((1,), 2))[1].reason == "length"
    with pytest.raises(EngineClosed, match="closed"):
        running.submit(Request((1,), 5))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"prompt": ()}, "prompt is empty"),
        ({"max_tokens": -1}, "max_tokens is -1"),
        ({"seed": 2**32}, "seed is"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"stop_ids": tuple(range(17))}, "stop_ids has 17"),
        ({"save_as": "../x"}, "save_as is '../x'"),
        ({"session": ""}, "session is ''"),
        ({"time_limit_s": 0.0}, "time_limit_s is 0.0"),
    ],
)
def test_fields_that_no_model_could_serve(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Request(**{"prompt": (1,), "max_tokens": 5, **fields})


def test_a_full_queue_says_when_to_come_again() -> None:
    waiting = Engine(*served(), Limits(slots=4, batch_sizes=(4,), queue=2))
    handles = [waiting.submit(Request((1,), 3)) for _ in range(6)]
    with pytest.raises(QueueFull) as refused:
        waiting.submit(Request((1,), 3))
    assert refused.value.retry_after_s >= 1
    waiting.start(warm_up=False)
    waiting.close()  # lets all of them end first
    assert [events(handle)[-1].reason for handle in handles] == ["length"] * 6


def test_time_limits_hold_in_the_queue_and_running() -> None:
    long = Request(prompt(3), 100_000, RowSampling())
    with engine() as running:
        slow = [running.submit(changed(long, seed=i)) for i in range(4)]
        late = running.submit(changed(long, time_limit_s=0.05))
        over = "the time limit of the request, or of the server, is over"
        assert events(late) == [End("timeout", Usage(3, 0, 0), over)]
        for handle in slow:
            handle.cancel()
        assert {events(handle)[-1].reason for handle in slow} == {"cancelled"}
        before = running.statistics().completion_tokens
        with an_hour_passes_once(lambda: running.statistics().completion_tokens > before):
            limited = events(running.submit(changed(long, time_limit_s=100.0)))
        assert limited[-1].reason == "timeout"
        assert limited[-1].usage.completion_tokens == len(answer(limited)) > 0


def test_a_row_without_finite_logits_ends_alone() -> None:
    model, weights = served()
    table_VD = weights.embedding.table_VD.at[60].set(jnp.nan)
    embedding = weights.embedding.replace(table_VD=table_VD)
    with engine() as running:
        wanted = ask(running, Request((5, 9), 8, GREEDY))[0]
    broken = Engine(model, weights.replace(embedding=embedding), FOUR)
    broken.start(warm_up=False)
    good = broken.submit(Request((5, 9), 8, GREEDY))
    tokens, end = ask(broken, Request((5, 60), 8))
    assert (tokens, end.reason) == ([], "error")
    assert "not finite" in end.message
    assert answer(events(good)) == wanted
    assert broken.healthy
    broken.close()


def test_the_engine_outlives_a_failed_call_and_gives_up_after_three() -> None:
    with engine() as running:
        decode = running._batch.decode
        failures = 1

        def fail(*args: object) -> object:
            nonlocal failures
            if failures == 0:
                return decode(*args)
            failures -= 1
            raise RuntimeError("RESOURCE_EXHAUSTED")

        running._batch.decode = fail
        tokens, end = ask(running, Request((5, 9), 3))
        assert (tokens, end.reason) == ([], "error")
        assert "the device failed" in end.message
        assert ask(running, Request((5, 9), 3))[1].reason == "length"
        assert running.healthy
        failures = 3
        for _ in range(3):
            assert ask(running, Request((5, 9), 3))[1].reason == "error"
        running._thread.join(PATIENCE_S)
        assert not running.healthy
        with pytest.raises(EngineClosed, match="failed"):
            running.submit(Request((5, 9), 3))
        assert running.statistics().device_failures == 4


def test_many_coroutines_read_their_own_tokens(alone: list[list[int]]) -> None:
    requests = mixed_requests(16)

    async def read(running: Engine, place: int) -> None:
        found = [event async for event in running.submit(requests[place])]
        assert answer(found) == alone[place]
        assert found[-1].reason == "length"

    async def read_all(running: Engine) -> None:
        slow = running.submit(changed(requests[0], max_tokens=40))  # is not read meanwhile
        await asyncio.gather(*(read(running, place) for place in range(16)))
        assert len(answer([event async for event in slow])) == 40

    with engine() as running:
        asyncio.run(read_all(running))


def test_nothing_is_kept_of_requests_that_have_ended() -> None:
    with engine() as running:
        handles = [running.submit(request) for request in mixed_requests(8)]
        handles[3].cancel()
        for handle in handles:
            events(handle)
        ask(running, Request((1,), 1))
        gone = [weakref.ref(handle) for handle in handles]
        del handles, handle
        ask(running, Request((1,), 1))
        gc.collect()
        assert [ref() for ref in gone] == [None] * 8
        counts = running.statistics()
        assert counts.ended == {"length": 9, "cancelled": 1}
        assert (counts.running, counts.waiting) == (0, 0)


def test_closing_at_once_ends_every_request_as_cancelled() -> None:
    with engine() as running:
        handles = [running.submit(Request((1,), 100_000, seed=i)) for i in range(6)]
        next(handles[0].events(PATIENCE_S))
        closing = threading.Thread(target=functools.partial(running.close, drain=False))
        closing.start()
        assert [events(handle)[-1].reason for handle in handles] == ["cancelled"] * 6
        closing.join(PATIENCE_S)
        assert not running.healthy


@functools.cache
def hybrid() -> tuple[LanguageModel, dict[str, object]]:
    config = dataclasses.replace(
        BASE, hidden_size=32, mixer="mingru,attention", num_heads=2, mixer_linear=DENSE,
        glu_linear=DENSE, head_linear=DENSE,
    )  # fmt: skip
    model = LanguageModel(config)
    return model, jax.jit(model.init)(jax.random.key(3), jnp.zeros((1, 4), jnp.int32))["params"]


def test_models_with_attention_are_served_within_their_length() -> None:
    model, params = hybrid()
    prompts = [prompt(5), prompt(33, 1), prompt(45, 2)]
    wanted = [
        generate(model, params, [ids], max_new_tokens=9, temperature=0).tokens[0] for ids in prompts
    ]
    running = Engine(model, params, Limits(slots=2, max_length=55))
    running.start(warm_up=False)
    handles = [running.submit(Request(ids, 9, GREEDY)) for ids in prompts]
    assert [answer(events(handle)) for handle in handles] == wanted
    with pytest.raises(ConfigError, match="together they must be at most 55"):
        running.submit(Request(prompts[2], 11))
    # A session goes on where it was.
    assert ask(running, Request(prompts[1], 4, GREEDY, save_as="x"))[0] == wanted[1][:4]
    assert ask(running, Request((), 5, GREEDY, session="x"))[0] == wanted[1][4:]
    assert running.statistics().prefix_entries == 0
    running.close()
    with pytest.raises(ConfigError, match="batch_sizes is"):
        Engine(model, params, Limits(slots=2, batch_sizes=(1, 2)))


def test_tokens_come_in_one_event_a_call() -> None:
    with engine() as running:
        found = events(running.submit(Request((1,), 3)))
    assert [type(event) for event in found] == [Tokens, Tokens, Tokens, End]
