"""What a program of the double RMSNorm's kernels does with its rows (`pallas_triton.py`).

A program holds one row at a time in registers, padded to a power of two by masks, and
walks several, so that rows and norm weights are read once. While it works on a row, the
next is on its way. With y_j = x a b_j, all of a row's reductions read x alone and none
waits for another:

    r_o = 1 / sqrt(mean(x^2) + eps_o)    r_i = 1 / sqrt(r_o^2 mean((x a)^2) + eps)
    n_j = y_j r_o r_i                    max|n_j| = r_o r_i max|y_j|

In the backward, with d = sum_j g_j b_j and c = mean(d v), the gradient of u is
r_i (d - v c), and the outer norm's own projection is c eps r_i^2: again one reduction. With
`times_silu`, x silu(s) takes x's place everywhere but in r_o. The norm weights' gradients are
summed in registers as the program walks; the programs' partial sums are added outside.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import triton as pltriton
from ..keep_nan import at_least, largest_magnitude
from ..refs import Ref
from .reference import MIN_ABSMAX

# Adding 1.5 * 2^23 rounds a small float32 to an integer, halves to even, which then stands
# in two's complement in the sum's low bits.
_ROUNDER = 12582912.0


class Columns:
    """Loads and stores of whole rows, masked beyond K."""

    def __init__(self, k: int, padded: int) -> None:
        # Numbers of columns and not a slice: jax 0.12 refuses a slice that ends beyond the array.
        self.indices = jnp.arange(padded)
        self.mask = None if k == padded else self.indices < k
        self.other = None if k == padded else 0.0

    def load(self, ref: Ref, row: Any = None) -> jax.Array:
        """One row, in its own dtype."""
        ref = ref.at[self.indices] if row is None else ref.at[row, self.indices]
        return pltriton.load(ref, mask=self.mask, other=self.other)

    def weight(self, ref: Ref) -> jax.Array:
        """A vector of weights, in float32."""
        return self.load(ref).astype(jnp.float32)

    def store(self, ref: Ref, value: jax.Array, row: Any) -> None:
        """One row, in the dtype of where it goes."""
        pltriton.store(ref.at[row, self.indices], value.astype(ref.dtype), mask=self.mask)


def walk(
    load: Callable[[Any], Any],
    body: Callable[[Any, Any, Any], Any],
    init: Any,
    *,
    m: int,
    programs: int,
    ahead: bool,
) -> Any:
    """Folds `body(row, load(row), carry)` over this program's rows, `ahead` by one load or not."""
    program = pl.program_id(0)
    steps = (m - program + programs - 1) // programs

    def wide(loaded: Any) -> Any:
        # Not in `load`: what waits for its turn takes half the registers in bf16.
        return jax.tree.map(lambda a: a.astype(jnp.float32), loaded)

    def at_once(i: jax.Array, carry: Any) -> Any:
        row = program + i * programs
        return body(row, wide(load(row)), carry)

    if not ahead:
        return lax.fori_loop(0, steps, at_once, init)

    def step(i: jax.Array, state: Any) -> Any:
        loaded, carry = state
        row = program + i * programs
        # After the last row it is read once more, for nothing.
        following = load(jnp.minimum(row + programs, m - 1))
        return following, body(row, wide(loaded), carry)

    return lax.fori_loop(0, steps, step, (load(program), init))[1]


def _product(*factors: jax.Array | None) -> Any:
    """The product of those factors that are there; None of none."""
    present = [f for f in factors if f is not None]
    return functools.reduce(lambda a, b: a * b, present) if present else None


def rounded(value: jax.Array) -> jax.Array:
    """Halves to even, as an int32 whose low byte is the integer."""
    return lax.bitcast_convert_type(value + _ROUNDER, jnp.int32)


def forward_kernel(
    x_ref: Ref,
    *all_refs: Ref,
    count: int,
    outer: bool,
    own: bool,
    add: bool,
    modulated: bool,
    gated: bool,
    eps: float,
    outer_eps: float,
    padded: int,
    programs: int,
    ahead: bool,
) -> None:
    """`norm_quant` of the rows of one program."""
    refs = list(all_refs)
    residual_ref = refs.pop(0) if add else None
    silu_ref = refs.pop(0) if modulated else None
    outer_ref = refs.pop(0) if outer else None
    weight_refs = [refs.pop(0) if own else None for _ in range(count)]
    sum_ref = refs.pop(0) if add else None
    q_refs, scale_refs = refs[:count], refs[count : 2 * count]
    absmax_refs, stat_refs = refs[2 * count : 3 * count], refs[3 * count :]
    m, k = q_refs[0].shape
    columns = Columns(k, padded)
    a = None if outer_ref is None else columns.weight(outer_ref)
    weights = [_product(a, None if r is None else columns.weight(r)) for r in weight_refs]

    def load(row: Any) -> Any:
        if gated:
            return columns.load(x_ref, 2 * row), columns.load(x_ref, 2 * row + 1)
        beside = (residual_ref, silu_ref)
        return columns.load(x_ref, row), *(columns.load(r, row) for r in beside if r is not None)

    def body(row: Any, loaded: Any, carry: Any) -> Any:
        x, *beside = loaded
        if gated:
            x = x * jax.nn.sigmoid(x) * beside.pop()
        s = beside.pop() if silu_ref is not None else None
        if beside:
            x = x + beside.pop()
        if sum_ref is not None:
            # Rounded as it is stored, so that the backward sees the same sum.
            x = x.astype(x_ref.dtype)
            columns.store(sum_ref, x, row)
            x = x.astype(jnp.float32)
        gain = jnp.float32(1)
        if outer:
            gain = lax.rsqrt(jnp.sum(x * x) / k + outer_eps)
            pltriton.store(stat_refs[0].at[row], gain)
        if s is not None:
            x = x * (s * jax.nn.sigmoid(s))
        u = x if a is None else x * a
        if own:
            inverse = lax.rsqrt(gain * gain * (jnp.sum(u * u) / k) + eps)
            pltriton.store(stat_refs[-1].at[row], inverse)
            gain = gain * inverse
        for j, weight in enumerate(weights):
            y = x if weight is None else x * weight
            absmax = at_least(gain * largest_magnitude(y), MIN_ABSMAX)
            pltriton.store(absmax_refs[j].at[row], absmax)
            pltriton.store(scale_refs[j].at[row], absmax / 127.0)
            # No magnitude exceeds 127, as none exceeds the row's largest.
            columns.store(q_refs[j], rounded(y * (gain * (127.0 / absmax))), row)
        return carry

    walk(load, body, jnp.int32(0), m=m, programs=programs, ahead=ahead)


def backward_kernel(
    x_ref: Ref,
    *all_refs: Ref,
    count: int,
    outer: bool,
    own: bool,
    modulated: bool,
    gated: bool,
    eps: float,
    padded: int,
    programs: int,
    requantize: bool,
    ahead: bool,
    skip: bool,
) -> None:
    """`norm_backward` of the rows of one program."""
    refs = list(all_refs)
    silu_ref = refs.pop(0) if modulated else None
    skip_ref = refs.pop(0) if skip else None
    gradient_refs = [refs.pop(0) for _ in range(count)]
    scale_refs = [refs.pop(0) for _ in range(count)]
    outer_ref, outer_stat_ref = (refs.pop(0), refs.pop(0)) if outer else (None, None)
    weight_refs = [refs.pop(0) if own else None for _ in range(count)]
    stat_ref = refs.pop(0) if own else None
    absmax_refs = [refs.pop(0) for _ in range(count)] if requantize else []
    d_x_ref = refs.pop(0)
    d_silu_ref = refs.pop(0) if modulated else None
    input_refs = [refs.pop(0) for _ in absmax_refs]
    (sums_ref,) = refs or (None,)
    m, k = gradient_refs[0].shape
    columns = Columns(k, padded)
    scales = [ref[0] for ref in scale_refs]
    b = [None if ref is None else columns.weight(ref) for ref in weight_refs]
    a = None if outer_ref is None else columns.weight(outer_ref)

    def load(row: Any) -> Any:
        rows = (2 * row, 2 * row + 1) if gated else (row,)
        x = [columns.load(x_ref, r) for r in rows]
        added = [columns.load(r, row) for r in (silu_ref, skip_ref) if r is not None]
        gradients = [columns.load(ref, row) for ref in gradient_refs]
        stats = [
            None if r is None else pltriton.load(r.at[row]) for r in (outer_stat_ref, stat_ref)
        ]
        return x, added, gradients, stats, [pltriton.load(r.at[row]) for r in absmax_refs]

    def body(row: Any, loaded: Any, sums: Any) -> Any:
        (x, *beside), added, gradients, (outer_inverse, inverse), absmaxes = loaded
        sums = list(sums)
        if gated:
            (up,) = beside
            gate, sigmoid = x, jax.nn.sigmoid(x)
            silu = gate * sigmoid
            x = silu * up
        x_hat = x if outer_inverse is None else x * outer_inverse
        z_hat = x_hat
        if d_silu_ref is not None:
            s = added[0]
            sigmoid = jax.nn.sigmoid(s)
            silu = s * sigmoid
            z_hat = x_hat * silu
        u = z_hat if a is None else z_hat * a
        v = u if inverse is None else u * inverse
        terms = []
        for j in range(count):
            g = gradients[j] * scales[j]
            if requantize:
                absmax = absmaxes[j]
                n = v if b[j] is None else v * b[j]
                q = rounded(n * (127.0 / absmax)).astype(jnp.int8)
                if input_refs[j].dtype != jnp.int8:
                    q = q.astype(jnp.float32) * (absmax / 127.0)
                columns.store(input_refs[j], q, row)
            if b[j] is not None:
                sums[j] += g * v
                g = g * b[j]
            terms.append(g)
        d = functools.reduce(jnp.add, terms)
        if inverse is not None:
            projection = jnp.sum(d * v) / k
            d = inverse * (d - v * projection)
        if a is not None:
            sums[-1] += d * z_hat
            if inverse is not None:
                outer_projection = projection * eps * inverse * inverse
            else:
                outer_projection = jnp.sum(d * u) / k
            d = d * a
            if d_silu_ref is not None:
                slope = sigmoid + silu * (1.0 - sigmoid)
                columns.store(d_silu_ref, d * x_hat * slope, row)
                d = d * silu
            d = outer_inverse * (d - x_hat * outer_projection)
        if skip_ref is not None:
            d += added[-1]
        if gated:
            columns.store(d_x_ref, d * silu, 2 * row + 1)
            columns.store(d_x_ref, d * up * (sigmoid + silu * (1.0 - sigmoid)), 2 * row)
        else:
            columns.store(d_x_ref, d, row)
        return tuple(sums)

    count_sums = 0 if sums_ref is None else sums_ref.shape[0] // programs
    init = tuple(jnp.zeros((padded,), jnp.float32) for _ in range(count_sums))
    sums = walk(load, body, init, m=m, programs=programs, ahead=ahead)
    for j, value in enumerate(sums):
        columns.store(sums_ref, value, j * programs + pl.program_id(0))
