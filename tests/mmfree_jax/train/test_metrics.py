"""Records, time keeping, and the one history on disk."""

import json
import math
import os
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.errors import TrainingError
from mmfree_jax.model_config import DENSE, ModelConfig
from mmfree_jax.readable import bits_per_byte, perplexity
from mmfree_jax.train.loop import next_batch
from mmfree_jax.train.metrics import (
    History,
    Stopwatch,
    TernaryMonitor,
    Window,
    read_history,
    to_json_line,
)


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def test_perplexity_and_bits_per_byte():
    assert perplexity(math.log(7)) == pytest.approx(7)
    assert perplexity(1e4) == math.inf
    # log 256 nats a token of 2 bytes: 8 bits over 2 bytes
    assert bits_per_byte(math.log(256), 2.0) == pytest.approx(4)
    assert bits_per_byte(1.0, 0.0) is None


def test_sections_add_up_also_when_nested_or_open():
    clock = Clock()
    watch = Stopwatch(clock)
    clock.now += 1
    with watch.section("step"):
        clock.now += 2
        with watch.section("eval"):
            clock.now += 4
        clock.now += 8
        taken = watch.take()
        clock.now += 16
    assert taken == {"data": 0, "step": 10, "eval": 4, "checkpoint": 0, "total": 15}
    assert watch.take() == {"data": 0, "step": 16, "eval": 0, "checkpoint": 0, "total": 16}


@pytest.mark.parametrize(
    ("batch_at", "step_at", "lost"),
    [(100, 116, 0), (109, 116, 0), (116, 116, 0), (121, 116, 5), (107, 100, 6)],
)
def test_data_is_waited_for_only_while_no_step_runs(batch_at, step_at, lost):
    """Seconds after 100 at which the next batch is there, and at which the step is done."""
    clock = Clock()
    watch = Stopwatch(clock)

    class Batches:
        def wait(self, seconds):
            clock.now += clock.now < batch_at
            return clock.now >= batch_at

        def __next__(self):
            clock.now = max(clock.now, batch_at)
            return {}

    step = SimpleNamespace(is_ready=lambda: clock.now >= step_at)
    assert next_batch(Batches(), watch, step) == {}
    assert watch.take() == {
        "data": lost, "step": max(0, batch_at - 100 - lost), "eval": 0, "checkpoint": 0,
        "total": max(0, batch_at - 100),
    }  # fmt: skip


def _metrics(loss, finite=1.0):
    return {"loss": loss, "grad_norm": 2 * loss, "accuracy": 0.5, "z_loss": 0.0, "finite": finite}


def test_a_window_goes_on_exactly_after_json():
    losses = [0.1, 0.2, 0.7, 1.1]
    whole, first = Window(), Window()
    for loss in losses:
        whole.add(_metrics(loss), 10)
    for loss in losses[:2]:
        first.add(_metrics(loss), 10)
    second = Window(json.loads(json.dumps(first.state)))
    for loss in losses[2:]:
        second.add(_metrics(loss), 10)
    record = second.take()
    assert record == whole.take()
    assert record["loss"] == pytest.approx(np.mean(losses))
    assert record["grad_norm_max"] == 2.2
    assert second.state == {}


def test_skipped_steps_do_not_enter_the_means():
    window = Window()
    window.add(_metrics(1.0), 10)
    window.add(_metrics(math.nan, finite=0.0), 10)
    record = window.take()
    assert record["loss"] == 1.0
    assert record["skipped_steps"] == 1
    window.add(_metrics(math.nan, finite=0.0), 10)
    assert window.take() == {"skipped_steps": 1}


def _config(**changes):
    return ModelConfig(vocab_size=4, hidden_size=4, num_layers=1, **changes)


def test_shares_of_zero_and_changed_weights():
    # absmean 1/2: entries of 0.1 round to 0, entries of 0.9 to 1.
    mixer = jnp.array([[[0.9, 0.1], [0.9, 0.1]]])
    head = jnp.array([[0.9, 0.9], [-0.9, -0.9]])
    params = {
        "embedding": {"weight": jnp.ones((4, 4))},
        "blocks": {"mixer": {"i_proj": {"weight": mixer, "norm_scale": jnp.ones(2)}}},
        "head": {"weight": head},
    }
    monitor = TernaryMonitor(_config())
    first = monitor(params)
    assert first["zero_share"] == pytest.approx(2 / 8)
    assert (first["zero_share_mixer"], first["zero_share_head"]) == (0.5, 0.0)
    assert first["changed_share"] is None
    params["blocks"]["mixer"]["i_proj"]["weight"] = mixer.at[0, 0, 0].set(-0.9)
    second = monitor(params)
    assert second["changed_share"] == pytest.approx(1 / 8)
    assert (second["changed_share_mixer"], second["changed_share_head"]) == (0.25, 0.0)
    assert second["zero_share"] == pytest.approx(2 / 8)


def test_no_ternary_weights_no_shares():
    config = _config(mixer_linear=DENSE, glu_linear=DENSE, head_linear=DENSE)
    params = {"embedding": {"weight": jnp.ones((4, 4))}, "head": {"weight": jnp.ones((4, 4))}}
    monitor = TernaryMonitor(config)
    assert monitor(params) == {}
    assert monitor(params) == {}


def test_the_monitor_survives_donation():
    params = {"head": {"weight": jnp.array([[0.9, 0.1]])}}
    flip = jax.jit(lambda p: jax.tree.map(lambda x: -x, p), donate_argnums=0)
    monitor = TernaryMonitor(_config())
    monitor(params)
    params = flip(params)
    assert monitor(params)["changed_share"] == 0.5


def _row(step, **values):
    return {"kind": "train", "step": step, "tokens": step, "time_s": step * 2.0, **values}


def test_history_drops_what_is_beyond_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(to_json_line(_row(s)) for s in range(1, 8)) + '{"kind": "tr')
    history = History(path, restored_step=5)
    assert history.seconds == 10.0
    assert history.last["train"]["step"] == 5
    history.write(_row(6, loss=math.nan))
    history.close()
    records = read_history(path)
    assert [r["step"] for r in records] == [1, 2, 3, 4, 5, 6]
    assert records[-1]["loss"] is None
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


def test_a_fresh_start_empties_the_history(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(to_json_line(_row(0)) + to_json_line(_row(1)))
    History(path, restored_step=0).close()
    assert path.read_text() == ""


def test_a_damaged_line_within_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"kind": "train", "step": 1}\nxx\n{"kind": "train", "step": 2}\n')
    with pytest.raises(TrainingError, match="line 2 is not JSON"):
        read_history(path)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ('{"kind": "train", "step": 2, "loss": "3.5"}', "line 2: loss is '3.5', not a number"),
        ('{"kind": "train", "step": [2], "loss": 3.5}', r"line 2: step is \[2\], not a number"),
        ('{"kind": "train", "tokens": true}', "line 2: tokens is True, not a number"),
        ('{"kind": "eval", "time_s": {}}', r"line 2: time_s is \{\}, not a number"),
        ('{"kind": ' + "[" * 100_000 + "]" * 100_000 + "}", "line 2 is not JSON"),
        (r'{"kind": "sample", "text": "\ud800"}', "line 2 is not JSON"),
    ],
)
def test_a_record_of_other_types_is_named(tmp_path, line, told):
    path = tmp_path / "metrics.jsonl"
    path.write_text(f'{{"kind": "train", "step": 1, "loss": null}}\n{line}\n')
    with pytest.raises(TrainingError, match=told):
        read_history(path)


def test_a_history_is_a_file(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl: a named pipe, not a file"):
        read_history(tmp_path / "metrics.jsonl")
