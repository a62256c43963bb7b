"""Instruction semantics: integers against exact arithmetic, and numpy against JAX."""

import math
from fractions import Fraction

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfree_jax.experiments.accelerator import fixed

WORD = st.integers(-32_768, 32_767)
WORDS = st.lists(WORD, min_size=1, max_size=9).map(lambda x: np.array(x, np.int32))
SHIFT = st.integers(0, 30)
BITS = st.integers(2, 16)


def _round(x: Fraction) -> int:
    return math.floor(x + Fraction(1, 2))


def _clip(x: int, bits: int) -> int:
    return max(-(2 ** (bits - 1)), min(2 ** (bits - 1) - 1, x))


@given(WORD, WORD, SHIFT, BITS)
def test_add_sub_mul_round_halves_up_and_saturate(a, b, shift, bits):
    x, y = np.int32([a]), np.int32([b])
    aligned = _round(Fraction(a, 2**shift))
    assert fixed.add(x, y, shift=shift, bits=bits)[0] == _clip(aligned + b, bits)
    assert fixed.sub(x, y, shift=shift, bits=bits)[0] == _clip(aligned - b, bits)
    expected = _clip(_round(Fraction(a * b, 2**shift)), bits)
    assert fixed.mul(x, y, shift=shift, bits=bits)[0] == expected


@given(WORD, WORD, st.integers(0, 15), BITS)
def test_div_truncates_and_knows_zero(a, b, shift, bits):
    got = fixed.div(np.int32([a]), np.int32([b]), shift=shift, bits=bits)[0]
    if b:
        expected = math.trunc(Fraction(a * 2**shift, b))
    else:
        expected = 2**30 * ((a > 0) - (a < 0))
    assert got == _clip(expected, bits)


@given(WORD, st.integers(0, 15))
def test_sigmoid_is_close_symmetric_and_monotone(x, frac):
    value = fixed.sig(np.int32([x]), frac=frac)[0] / fixed.ONE
    assert (
        abs(value - 1 / (1 + math.exp(min(-x / 2**frac, 700)))) < 0.0145
    )  # linear over steps of 1
    if x > -32_768:
        assert fixed.sig(np.int32([x, -x]), frac=frac).sum() == fixed.ONE
    following = fixed.sig(np.int32([min(x + 1, 32_767)]), frac=frac)[0]
    assert following >= value * fixed.ONE


@pytest.mark.parametrize("entries", [16, 32, 64])
def test_larger_sigmoid_tables_are_closer(entries):
    x = np.arange(-32_768, 32_768, 17, dtype=np.int32)
    exact = fixed.sig(x, frac=11, entries=0)
    worst = abs(fixed.sig(x, frac=11, entries=entries) - exact).max()
    assert worst < abs(fixed.sig(x, frac=11, entries=entries // 2) - exact).max()


@given(WORD, st.integers(0, 15))
def test_exp_is_close_and_saturates(x, frac):
    got = fixed.exp(np.int32([x]), frac=frac)[0]
    exact = min(math.exp(min(x / 2**frac, 1.0)) * fixed.ONE, 32_767)
    assert abs(got - exact) <= 2 + 0.0012 * exact


@given(WORDS, st.integers(1, 10_000), st.integers(0, 12))
def test_norm_is_close_to_the_real_one(x, eps, frac_out):
    root, shift = fixed.norm_constants(len(x), frac_out)
    got = fixed.norm(x, eps=eps, root=root, shift=shift)
    total = float((x.astype(np.int64) ** 2).sum() + eps)
    exact = x / math.sqrt(total / len(x)) * 2**frac_out
    exact = np.clip(exact, -32_768, 32_767)
    assert np.all(abs(got - exact) <= 1 + 3e-4 * abs(exact))


def test_norm_of_the_largest_and_the_smallest():
    x = np.full(4096, -32_768, np.int32)
    root, shift = fixed.norm_constants(4096, 11)
    assert set(fixed.norm(x, eps=1, root=root, shift=shift)) <= {-2048, -2047}
    assert not fixed.norm(np.zeros(7, np.int32), eps=1, root=root, shift=shift).any()
    high, low = fixed.sum_of_squares(x)
    assert int(high[0]) * 2**15 + int(low[0]) == 4096 * 2**30


def test_newton_steps_converge():
    mantissa = np.arange(1 << 14, 1 << 16, dtype=np.int32)
    exact = 2**15 / np.sqrt(mantissa / 2**14)
    errors = [abs(fixed.inverse_root(mantissa, newton=n) - exact).max() for n in (0, 1, 2, 5)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[3] < 2


@settings(max_examples=30)
@given(st.integers(1, 70), st.integers(1, 9), SHIFT, BITS, st.integers(0, 2**32 - 1))
def test_tmatmul_is_exact(k, n, shift, bits, seed):
    rng = np.random.default_rng(seed)
    x = rng.integers(-32_768, 32_768, k).astype(np.int32)
    trits = rng.integers(-1, 2, (n, k)).astype(np.int8)
    got = fixed.tmatmul(x, trits, shift=shift, bits=bits)
    sums = trits.astype(np.int64) @ x
    assert got.tolist() == [_clip(_round(Fraction(int(s), 2**shift)), bits) for s in sums]


def test_tmatmul_is_exact_at_its_widest():
    x = np.full(fixed.MAX_COLUMNS, -32_768, np.int32)
    ones = np.ones((1, fixed.MAX_COLUMNS), np.int8)
    total = -32_768 * fixed.MAX_COLUMNS
    assert fixed.tmatmul(x, ones, shift=16)[0] == _round(Fraction(total, 2**16))


def test_numpy_and_jax_agree():
    rng = np.random.default_rng(0)
    a = rng.integers(-32_768, 32_768, (3, 40)).astype(np.int32)
    b = rng.integers(-300, 301, (3, 40)).astype(np.int32)
    trits = rng.integers(-1, 2, (20, 40)).astype(np.int8)
    root, shift = fixed.norm_constants(40, 10)
    calls = [
        lambda x, y: fixed.add(x, y, shift=2),
        lambda x, y: fixed.sub(x, y, shift=1, bits=8),
        lambda x, y: fixed.mul(x, y, shift=9),
        lambda x, y: fixed.div(x, y, shift=5),
        lambda x, y: fixed.sig(x, frac=11),
        lambda x, y: fixed.sig(y, frac=5, entries=32),
        lambda x, y: fixed.exp(x, frac=12),
        lambda x, y: fixed.norm(x, eps=77, root=root, shift=shift),
        lambda x, y: fixed.norm(y >> 7, eps=1, root=root, shift=shift),
        lambda x, y: fixed.tmatmul(x, trits, shift=4),
    ]
    for call in calls:
        np.testing.assert_array_equal(call(a, b), np.asarray(call(jnp.asarray(a), jnp.asarray(b))))
