"""Where a run's time went, over attempts that died: written out, on a clock of the test's own."""

import pytest

from mmfree_jax.saved.goodput import NO_TIME, Goodput, goodput_fault, up_to_now

# Saved at step 4, after 100 s; 25 s later the attempt wrote its last sign, at step 9.
SAVED = Goodput(
    step=60, data=5, eval=4, checkpoint=1, compile=20, restore=0, other=10, lost=0, attempts=1
)


def _record(goodput, step, time_s, unix_time):
    fields = {"kind": "goodput", "step": step, "time_s": time_s, "unix_time": unix_time}
    return fields | goodput.to_record()


DIED = [
    _record(Goodput(attempts=1), 0, 0.0, 1000.0),
    _record(SAVED, 4, 100.0, 1100.0),
    {"kind": "train", "step": 9, "time_s": 125.0, "loss": 3.0},
]


def test_what_a_death_made_worthless_is_lost():
    second = up_to_now(DIED, 4, SAVED, unix_time=1165.0)
    assert second == Goodput(
        step=60, data=5, eval=4, checkpoint=1, compile=20, restore=0, other=10, lost=25,
        down=40, attempts=2,
    )  # fmt: skip

    # It read the checkpoint, compiled, saved step 8 and died beyond it without a word; that
    # checkpoint is damaged, so that the third goes on from step 4 as well.
    at_8 = second.plus({"restore": 3, "compile": 20, "other": 2, "step": 40, "data": 2, "eval": 4,
                        "checkpoint": 1, "total": 99})  # fmt: skip
    history = [
        *DIED[:2],
        _record(second, 4, 125.0, 1165.0),
        _record(at_8, 8, 197.0, 1237.0),
    ]
    third = up_to_now(history, 4, SAVED, unix_time=1300.0)
    assert third == Goodput(
        step=60, data=5, eval=4, checkpoint=1, compile=40, restore=3, other=12, lost=72,
        down=103, attempts=3,
    )  # fmt: skip
    assert third.total == 197
    assert up_to_now(history, 8, at_8, unix_time=1300.0).lost == 25


def test_an_attempt_that_ended_where_the_next_begins_lost_nothing():
    ended = SAVED.plus({"checkpoint": 6, "eval": 2})
    history = [
        _record(ended, 4, 108.0, 1108.0),
        {"kind": "event", "step": 4, "time_s": 109.0, "event": "done"},
    ]
    second = up_to_now(history, 4, SAVED, unix_time=5000.0)
    assert (second.lost, second.checkpoint, second.eval, second.other) == (0, 7, 6, 11)
    assert second.down == 3891


def test_a_run_that_never_saved_lost_all_of_its_work():
    fresh = up_to_now(DIED, 0, NO_TIME, unix_time=1165.0)
    assert (fresh.step, fresh.lost, fresh.compile, fresh.total) == (0, 95, 20, 125)


def test_what_older_versions_left_counts_from_now():
    old = [{"kind": "train", "step": 9, "time_s": 125.0, "loss": 3.0}]
    assert up_to_now(old, 4, NO_TIME, unix_time=0.0) == Goodput(attempts=1)
    damaged = [{**DIED[1], "lost_s": "many"}]
    assert up_to_now(damaged, 4, SAVED, unix_time=0.0).attempts == 2


def test_shares_add_up_and_are_told():
    goodput = up_to_now(DIED, 4, SAVED, unix_time=1165.0)
    assert sum(goodput.shares.values()) == pytest.approx(1)
    assert goodput.shares["step"] == 0.48
    assert goodput.shares["lost"] == 0.2
    record = goodput.to_record()
    assert (record["step_share"], record["lost_s"], record["total_s"]) == (0.48, 25, 125)
    assert str(goodput) == (
        "goodput 48.0% of 2m05s in 2 attempts, 40s between them: step 48.0%, data 4.0%, "
        "eval 3.2%, checkpoint 0.8%, compile 16.0%, other 8.0%, lost 20.0%"
    )
    assert sum(NO_TIME.shares.values()) == 0


def test_a_manifest_of_other_types_is_damaged():
    assert goodput_fault(SAVED.to_json()) is None
    assert goodput_fault(SAVED.to_json() | {"lost": "x"}) == "lost is 'x'"
    assert goodput_fault({"step": 1.0}) == "data is missing"
