"""Learning-rate schedules against their closed forms."""

import math
from typing import Any

import jax
import numpy as np
import pytest

from mmfree_jax.config import OptimizerConfig
from mmfree_jax.train.schedule import make_schedule, recorded_rate

STEPS, WARMUP, PEAK = 200, 20, 3e-3
COUNTS = np.arange(STEPS + 5)


def _rates(**kwargs):
    config = OptimizerConfig(learning_rate=PEAK, **kwargs)
    return np.asarray(jax.jit(make_schedule(config, STEPS))(COUNTS), np.float64)


def _cosine(step):
    p = min(1.0, max(0.0, (step - WARMUP) / (STEPS - WARMUP)))
    return 0.5 * (1 + math.cos(math.pi * p))


def test_paper_halves_the_cosine_from_the_midpoint_and_ends_at_zero():
    rates = _rates(schedule="paper", warmup_steps=WARMUP)
    for step in range(WARMUP, STEPS + 1):
        half = 0.5 if step >= STEPS / 2 else 1.0
        assert rates[step] == pytest.approx(PEAK * half * _cosine(step), rel=1e-5, abs=1e-9)
    assert rates[STEPS // 2 - 1] / rates[STEPS // 2] > 1.9
    assert rates[STEPS] == pytest.approx(0, abs=1e-9)


def test_paper_ignores_the_floor():
    assert _rates(schedule="paper", min_lr_ratio=0.1)[STEPS] == pytest.approx(0, abs=1e-9)


def test_cosine_reaches_its_floor_and_stays():
    rates = _rates(schedule="cosine", warmup_steps=WARMUP, min_lr_ratio=0.1)
    for step in range(WARMUP, STEPS + 1):
        expected = PEAK * (0.1 + 0.9 * _cosine(step))
        assert rates[step] == pytest.approx(expected, rel=1e-5)
    assert rates[STEPS:] == pytest.approx(PEAK * 0.1, rel=1e-5)


def test_linear():
    rates = _rates(schedule="linear", warmup_steps=WARMUP, min_lr_ratio=0.2)
    for step in range(WARMUP, STEPS):
        p = (step - WARMUP) / (STEPS - WARMUP)
        assert rates[step] == pytest.approx(PEAK * (0.2 + 0.8 * (1 - p)), rel=1e-5)


def test_wsd_is_flat_then_linear():
    rates = _rates(schedule="wsd", warmup_steps=WARMUP, decay_fraction=0.25, min_lr_ratio=0.1)
    assert rates[WARMUP:151] == pytest.approx(PEAK, rel=1e-6)
    assert rates[175] == pytest.approx(PEAK * 0.55, rel=1e-5)
    assert rates[STEPS] == pytest.approx(PEAK * 0.1, rel=1e-5)


def test_wsd_without_decay_is_constant():
    assert _rates(schedule="wsd", decay_fraction=0.0)[:STEPS] == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("schedule", ["paper", "cosine", "linear", "wsd", "constant"])
def test_warm_up_is_linear_from_zero(schedule):
    rates = _rates(schedule=schedule, warmup_steps=WARMUP)
    assert rates[:WARMUP] == pytest.approx(PEAK * COUNTS[:WARMUP] / WARMUP, rel=1e-5)
    assert rates[WARMUP] == pytest.approx(PEAK, rel=1e-5)


@pytest.mark.parametrize("schedule", ["paper", "cosine", "linear", "wsd", "constant"])
def test_without_warm_up_the_first_update_has_the_peak_rate(schedule):
    assert _rates(schedule=schedule)[0] == pytest.approx(PEAK, rel=1e-6)


@pytest.mark.parametrize("shape", ["paper", "cosine", "wsd", "linear", "constant"])
def test_a_record_has_the_rate_that_the_step_took(shape):
    more: dict[str, Any] = {} if shape == "paper" else {"second_stage_at": 0.5, "min_lr_ratio": 0.1}
    more |= {"schedule": shape, "warmup_steps": WARMUP}
    config = OptimizerConfig(learning_rate=PEAK, **more)
    recorded = [recorded_rate(config, STEPS, int(count)) for count in COUNTS]
    assert recorded == pytest.approx(_rates(**more), rel=1e-5, abs=1e-9)
    assert max(recorded) > 0.9 * PEAK
