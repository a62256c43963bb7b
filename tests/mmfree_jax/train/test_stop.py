"""Signals that ask a run to stop: one that comes by two ways is one request."""

import os
import signal

import pytest

from mmfree_jax.train import stop


@pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP"])
def test_a_signal_that_comes_by_two_ways_is_one_request(name):
    said = []
    with stop.catch_signals(said.append) as request:
        for _ in range(3):  # from SLURM to every process, and from the launcher to its own
            os.kill(os.getpid(), signal.Signals[name])
    assert request.reason == name
    assert said == [f"{name}: saving after this step; a second one ends at once"]


def test_a_later_one_ends_the_process_at_once(monkeypatch):
    raised = []
    monkeypatch.setattr(stop, "_TOLD_TWICE_SECONDS", 0.0)
    monkeypatch.setattr(
        signal, "raise_signal", lambda number: raised.append((number, signal.getsignal(number)))
    )
    with stop.catch_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        assert raised == []
        os.kill(os.getpid(), signal.SIGTERM)
    assert raised == [(signal.SIGTERM, signal.SIG_DFL)]


def test_a_second_one_from_the_keyboard_is_meant():
    with stop.catch_signals() as request:
        os.kill(os.getpid(), signal.SIGINT)
        assert request.reason == "SIGINT"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
