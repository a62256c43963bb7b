"""Turns of the scheduler one by one: who reads, who answers, when a slot is free."""

import dataclasses

import jax
import numpy as np
import pytest
from small_packed_model import BASE
from small_served_model import answer, prompt, served

from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.serve.batch import Batch
from mmfree_jax.serve.handle import Handle
from mmfree_jax.serve.job import Job, Outbox, new_job
from mmfree_jax.serve.plan import plan_for
from mmfree_jax.serve.prefix_cache import PrefixCache
from mmfree_jax.serve.requests import End, Limits, Request, RowSampling, Tokens, Usage
from mmfree_jax.serve.scheduler import Scheduler
from mmfree_jax.serve.session_store import SessionStore

GREEDY = RowSampling(0.0)


def make_scheduler(store: SessionStore | None = None, ahead: int = 0) -> Scheduler:
    _, weights = served()
    plan = plan_for(Limits(slots=4, batch_sizes=(4,)), BASE, "cpu")
    plan = dataclasses.replace(plan, ahead=ahead)
    store = store or SessionStore(weights, BASE, 2**20)
    return Scheduler(Batch(weights, BASE, plan), plan, PrefixCache(0), store, Outbox())


@pytest.fixture
def scheduler() -> Scheduler:
    return make_scheduler()


def job(request: Request) -> Job:
    return new_job(Handle(request), None, 60.0)


def test_a_long_prompt_is_read_between_the_tokens_of_others(scheduler: Scheduler) -> None:
    first, second = job(Request((1,), 50, GREEDY)), job(Request(prompt(300), 5, GREEDY))
    scheduler.admit(first)
    scheduler.turn()
    scheduler.admit(second)
    given = []
    while not second.answer:
        scheduler.turn()
        given.append(len(first.answer))
    # 300 tokens are four pieces of 64 and one of 44, one a turn; the last turn decodes too.
    assert given == [2, 3, 4, 5, 6]


def test_a_cancelled_request_frees_its_slot_before_the_next_token(scheduler: Scheduler) -> None:
    jobs = [job(Request((1,), 50, GREEDY)) for _ in range(4)]
    for each in jobs:
        scheduler.admit(each)
    scheduler.turn()
    assert not scheduler.has_slot
    jobs[2].handle.cancel()
    scheduler.end_cancelled()
    assert scheduler.has_slot
    scheduler.turn()
    assert [len(each.answer) for each in jobs] == [2, 2, 1, 2]
    assert list(jobs[2].handle.events(0.0)) == [
        Tokens((jobs[2].answer[0],)),
        End("cancelled", Usage(1, 0, 1)),
    ]


def test_a_slot_forgets_the_request_that_was_cancelled_in_it() -> None:
    _, weights = served()
    store = SessionStore(weights, BASE, 2**20)
    scheduler = make_scheduler(store)
    alone, beside = (job(Request(prompt(200), 0, save_as=name)) for name in ("alone", "beside"))
    scheduler.admit(alone)
    while not alone.ended:
        scheduler.turn()
    others = [job(Request((1,), 50, GREEDY)) for _ in range(4)]
    for each in others:
        scheduler.admit(each)
    scheduler.turn()
    others[1].handle.cancel()
    scheduler.end_cancelled()
    scheduler.admit(beside)  # is read in four turns, while the other rows are given tokens
    while not beside.ended:
        scheduler.turn()
    jax.tree.map(np.testing.assert_array_equal, store.find("beside"), store.find("alone"))


def test_tokens_on_the_way_to_a_cut_answer_do_not_count() -> None:
    _, weights = served()
    store = SessionStore(weights, BASE, 2**20)
    scheduler = make_scheduler(store, ahead=1)
    cut = job(Request((1,), 500, GREEDY, save_as="cut"))
    scheduler.admit(cut)
    while len(cut.answer) < 75:
        scheduler.turn()
    cut.handle.cancel(keep=70)
    scheduler.end_cancelled()
    while not cut.ended:  # what is kept is read again in two turns
        scheduler.turn()
    assert len(cut.answer) == 75
    assert list(cut.handle.events(0.0))[-1] == End("cancelled", Usage(1, 0, 70))
    assert [info.tokens for info in store.list()] == [71]


def test_a_slot_is_given_on_as_soon_as_its_last_token_is_on_the_way(scheduler: Scheduler) -> None:
    first, second = job(Request((1,), 2, GREEDY)), job(Request((1,), 2, GREEDY))
    scheduler.admit(first)
    scheduler.turn()
    scheduler.turn()
    assert first.ended
    scheduler.admit(second)
    while not second.ended:
        scheduler.turn()
    assert second.answer == first.answer == answer(list(first.handle.events(0.0)))


def test_prompts_are_cut_the_same_wherever_they_begin_alike() -> None:
    plan = plan_for(Limits(slots=64), BASE, "gpu")
    assert plan.pieces(2700) == [1024, 1024, 256, 256, 64, 64, 12]
    assert plan.pieces(2048) == [1024, 1024]
    assert plan.pieces(40) == [16, 16, 8]
    assert [plan.padded(n) for n in (1, 16, 17, 1000)] == [16, 16, 64, 1024]


def test_sizes_of_calls_by_backend_and_model() -> None:
    attention = ModelConfig(mixer="attention", num_heads=2, hidden_size=32)
    assert plan_for(Limits(slots=128), BASE, "gpu").batch_sizes == (16, 64, 128)
    assert plan_for(Limits(slots=8, few_row_kernels=True), BASE, "gpu").batch_sizes == (1, 2, 8)
    assert plan_for(Limits(slots=6), BASE, "cpu").batch_sizes == (1, 4, 6)
    assert plan_for(Limits(slots=6), attention, "cpu").batch_sizes == (6,)
    assert plan_for(Limits(slots=6), attention, "cpu").max_length == 2048
    with pytest.raises(ConfigError, match="largest must be slots"):
        plan_for(Limits(slots=6, batch_sizes=(2, 4)), BASE, "cpu")
