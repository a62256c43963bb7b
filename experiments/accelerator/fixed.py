"""What each instruction computes, on integers: the bit-true definition of the accelerator.

The functions take numpy or JAX arrays of int32 and use nothing wider, so that the simulator
(numpy), the evaluation (JAX) and the RTL share one definition. Values are 16-bit signed words
with a fixed binary point that the caller keeps track of: a word w with `frac` fraction bits
stands for w * 2^-frac.

Formats: words are saturated to `bits` (16, or 8 for the activations of w8a8); gates (SIG, EXP)
have 14 fraction bits, so that 1.0 is 16384; the sum of squares is exact (45 bits, in two limbs);
the accumulator of TMATMUL is 32 bits wide and exact up to 32,767 columns.
Rounding is to nearest, halves towards plus infinity.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

Array = Any  # numpy or JAX, int32

GATE_FRAC = 14
ONE = 1 << GATE_FRAC
WORD_BITS = 16
MAX_COLUMNS = 32_767
# The values that the lookup tables hold; a table entry is rounded to nearest.
SIGMOID_ENTRIES = 8
SIGMOID_RANGE = 8
EXP_ENTRIES = 16
RSQRT_ENTRIES = 24
NEWTON_STEPS = 5
_LOG2E = round(math.log2(math.e) * (1 << 14))


def _xp(x: Array) -> Any:
    return np if isinstance(x, (np.ndarray, np.generic, int)) else jnp


def saturate(x: Array, bits: int) -> Array:
    """Clips to the signed range of `bits`."""
    limit = 1 << (bits - 1)
    return _xp(x).clip(x, -limit, limit - 1)


def round_shift(x: Array, shift: Array | int) -> Array:
    """x * 2^-shift, rounded to nearest, halves up; 0 <= shift <= 30 and |x| <= 2^30."""
    half = (1 << shift) >> 1 if isinstance(shift, int) else (_xp(shift).left_shift(1, shift) >> 1)
    return (x + half) >> shift


def add(a: Array, b: Array, *, shift: Any = 0, bits: int = WORD_BITS) -> Array:
    """ADD: round(a / 2^shift) + b, saturated."""
    return saturate(round_shift(a, shift) + b, bits)


def sub(a: Array, b: Array, *, shift: Any = 0, bits: int = WORD_BITS) -> Array:
    """SUB: round(a / 2^shift) - b, saturated."""
    return saturate(round_shift(a, shift) - b, bits)


def mul(a: Array, b: Array, *, shift: Any = 0, bits: int = WORD_BITS) -> Array:
    """MUL: round(a b / 2^shift), saturated."""
    return saturate(round_shift(a * b, shift), bits)


def div(a: Array, b: Array, *, shift: int = 0, bits: int = WORD_BITS) -> Array:
    """DIV: a 2^shift / b towards zero, saturated; a / 0 has a's sign and the largest size, 0/0 = 0.

    0 <= shift <= 15.
    """
    xp = _xp(a) if not isinstance(a, int) else _xp(b)
    a = xp.asarray(a, dtype=xp.int32)
    size = xp.abs(a) << shift
    quotient = size // xp.maximum(xp.abs(b), 1)
    quotient = xp.where(b == 0, xp.where(a == 0, 0, 1 << 30), quotient)
    return saturate(xp.where((a < 0) != (b < 0), -quotient, quotient), bits)


@functools.cache
def sigmoid_table(entries: int = SIGMOID_ENTRIES) -> tuple[int, ...]:
    """sigmoid at k * 8 / entries with 14 fraction bits, and 1.0 behind the last."""
    step = SIGMOID_RANGE / entries
    return (*(round(ONE / (1 + math.exp(-k * step))) for k in range(entries)), ONE)


@functools.cache
def exp_table() -> tuple[int, ...]:
    """2^(k / 16) for k = 0 to 16, with 14 fraction bits."""
    return tuple(round(ONE * 2 ** (k / EXP_ENTRIES)) for k in range(EXP_ENTRIES + 1))


@functools.cache
def rsqrt_table() -> tuple[int, ...]:
    """1 / sqrt at the middles of 24 steps of [1, 4), with 15 fraction bits."""
    return tuple(round((1 << 15) / math.sqrt(1 + (k + 0.5) / 8)) for k in range(RSQRT_ENTRIES))


def sig(x: Array, *, frac: Any, entries: int = SIGMOID_ENTRIES) -> Array:
    """SIG: the logistic function by a table and linear interpolation, 14 fraction bits out.

    sigmoid(-x) = 1 - sigmoid(x); a step of the table is cut into 64.

    Args:
      x: words.
      frac: of x.
      entries: of the table over [0, 8), a power of two from 8; 0: exact, for comparison only.
    """
    xp = _xp(x)
    if entries == 0:
        real = xp.asarray(x, dtype=xp.float32) * xp.exp2(-xp.asarray(frac, dtype=xp.float32))
        return xp.round(ONE / (1 + xp.exp(-real))).astype(xp.int32)
    point = 6 + (entries // SIGMOID_ENTRIES).bit_length() - 1  # fraction bits of u
    size = xp.minimum(xp.abs(x), 32_767)
    up = xp.maximum(point - frac, 0)
    # 2^15 has left the table (x >= 8) whatever the step.
    u = xp.minimum((size << up) >> xp.maximum(frac - point, 0), 64 * entries)
    table = xp.asarray(sigmoid_table(entries), dtype=xp.int32)
    k = xp.minimum(u >> 6, entries - 1)
    t = u - (k << 6)
    y = table[k] + (((table[k + 1] - table[k]) * t + 32) >> 6)
    return xp.where(x < 0, ONE - y, y)


def exp(x: Array, *, frac: int) -> Array:
    """EXP: e^x with 14 fraction bits, saturated from ln 2 on; 0 <= frac <= 15.

    2^(x log2 e): the whole part shifts, a table of 16 interpolates the fraction.
    """
    xp = _xp(x)
    z = (x * _LOG2E) >> (frac + 4)  # 10 fraction bits
    whole, u = z >> 10, z & 1023
    table = xp.asarray(exp_table(), dtype=xp.int32)
    k, t = u >> 6, u & 63
    m = table[k] + (((table[k + 1] - table[k]) * t + 32) >> 6)
    y = round_shift(m, xp.clip(-whole, 0, 30))
    return xp.minimum(xp.where(whole > 0, 32_767, y), 32_767)


def sum_of_squares(x: Array) -> tuple[Array, Array]:
    """Exact sum over the last axis as (high, low): high * 2^15 + low, low < 2^15; keeps dims."""
    square = x * x
    high = (square >> 15).sum(-1, keepdims=True, dtype=np.int32)
    low = (square & 0x7FFF).sum(-1, keepdims=True, dtype=np.int32)
    return high + (low >> 15), low & 0x7FFF


def _bit_length(x: Array) -> Array:
    """Of 0 <= x < 2^31."""
    if _xp(x) is np:
        return np.frexp(np.asarray(x, np.float64))[1].astype(np.int32)
    return 32 - jax.lax.clz(x)


def inverse_root(mantissa: Array, *, newton: int = NEWTON_STEPS) -> Array:
    """1 / sqrt(m) with 15 fraction bits for m = mantissa / 2^14 in [1, 4).

    A table of 24 entries, then y <- y (3 - m y^2) / 2. newton = -1: exact, for comparison only.
    """
    xp = _xp(mantissa)
    if newton < 0:
        real = xp.asarray(mantissa, dtype=xp.float32) / (1 << 14)
        y = xp.round((1 << 15) / xp.sqrt(real)).astype(xp.int32)
        return xp.minimum(y, 32_767)
    y = xp.asarray(rsqrt_table(), dtype=xp.int32)[(mantissa - (1 << 14)) >> 11]
    for _ in range(newton):
        square = (y * y) >> 15
        correction = ((3 << 15) - ((mantissa * square) >> 14)) >> 1
        y = xp.minimum((y * correction) >> 15, 32_767)
    return y


def norm(
    x: Array,
    *,
    eps: Any,
    root: int,
    shift: Any,
    bits: int = WORD_BITS,
    newton: int = NEWTON_STEPS,
) -> Array:
    """NORM: x / sqrt(mean(x^2) + eps), the mean over the last axis.

    With S = sum(x^2) + eps in [4^(e-1), 4^e), the result is
    round(x * R / 2^(shift + e)), R the product of sqrt(n) and 1 / sqrt(S) as mantissas; a
    negative total shift counts as 0. `norm_constants` gives root and shift.

    Args:
      x: words [..., n].
      eps: n times the norm's epsilon in units of x's last place squared; 1 to 2^31 - 1.
      root: mantissa of sqrt(n), 2^14 <= root < 2^15.
      shift: static part of the shift.
      bits: of the result.
      newton: steps of the inverse root.
    """
    xp = _xp(x)
    high, low = sum_of_squares(x)
    low = low + (eps & 0x7FFF)
    high = high + (eps >> 15) + (low >> 15)
    low = low & 0x7FFF
    length = xp.where(high > 0, 15 + _bit_length(high), _bit_length(low))
    half = (length + 1) >> 1  # e
    even = 2 * half
    # The 16 bits from the leading pair of bits down, of a number in two limbs.
    far = high >> xp.clip(even - 31, 0, 30)
    near = (high << xp.clip(31 - even, 0, 15)) + (low >> xp.clip(even - 16, 0, 30))
    small = ((high << 15) + low) << xp.clip(16 - even, 0, 15)
    mantissa = xp.where(even >= 31, far, xp.where(even > 16, near, small))
    gain = (inverse_root(mantissa, newton=newton) * root) >> 15
    return saturate(round_shift(x * gain, xp.clip(shift + half, 0, 30)), bits)


def norm_constants(n: int, frac_out: int) -> tuple[int, int]:
    """root and shift of NORM over n words with `frac_out` fraction bits in the result."""
    exponent = math.floor(math.log2(math.sqrt(n)))
    root = min(round(math.sqrt(n) / 2**exponent * (1 << 14)), 32_767)
    return root, 13 - exponent - frac_out


def norm_eps(n: int, eps: float, frac: int) -> int:
    """The eps operand of NORM over n words with `frac` fraction bits."""
    return int(min(max(round(n * eps * 4.0**frac), 1), 2**31 - 1))


def tmatmul(x: Array, trits_NK: Array, *, shift: Any, bits: int = WORD_BITS) -> Array:
    """TMATMUL: round(x @ trits^T / 2^shift), saturated.

    The sum is exact. It is made of two float32 products of 8-bit halves, whose partial sums
    stay below 2^24 up to 65,536 columns: those are fast on every device.
    """
    xp = _xp(x)
    high, low = x >> 8, x & 0xFF
    if xp is np:
        w_KN = trits_NK.astype(np.float32).T
        parts = [h.astype(np.float32) @ w_KN for h in (high, low)]
    else:
        parts = [
            jax.lax.dot_general(
                h.astype(jnp.float32),
                trits_NK.astype(jnp.float32),
                (((x.ndim - 1,), (1,)), ((), ())),
                precision=jax.lax.Precision.HIGHEST,
            )
            for h in (high, low)
        ]
    total = parts[0].astype(xp.int32) * 256 + parts[1].astype(xp.int32)
    return saturate(round_shift(total, shift), bits)
