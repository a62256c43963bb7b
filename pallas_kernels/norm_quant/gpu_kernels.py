"""What a program of `pallas_gpu.py` does with the rows at hand.

With y_j = x a b_j, all of a row's reductions read x alone and none waits for another:

    r_o = 1 / sqrt(mean(x^2) + eps_o)    r_i = 1 / sqrt(r_o^2 mean((x a)^2) + eps)
    n_j = y_j r_o r_i                    max|n_j| = r_o r_i max|y_j|

In the backward, with d = sum_j g_j b_j and c = mean(d v), the gradient of u is
r_i (d - v c), and the outer norm's own projection is c eps r_i^2: again one reduction. With
`times_silu`, x silu(s) takes x's place everywhere but in r_o. The norm weights' gradients are
summed in registers as the program walks; the programs' partial sums are added outside.

Each body is called with the form of rows in registers, values by name (numbers, row scalars
[rows], and functions that read a norm weight), references to the tiles in shared memory, where
outputs are written, and the sums over rows so far; it returns row scalars, by name, and the sums.
Every value is read where it is used: a row is kept in registers no longer than it must.
"""

import dataclasses
import functools
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
from jax import lax

from ..keep_nan import at_least
from ..mosaic import Rows
from ..refs import Ref
from ..rounding import ROUNDER_BITS, rounded
from .reference import MIN_ABSMAX

Values = dict[str, Any]


def _sigmoid(x: jax.Array) -> jax.Array:
    return 1.0 / (1.0 + jnp.exp(-x))


def _halves(ref: Ref) -> tuple[Ref, Ref]:
    """gate and up of [rows, 2, K]."""
    return ref.at[:, 0], ref.at[:, 1]


@dataclasses.dataclass(frozen=True)
class Forward:
    """`norm_quant` of a few rows."""

    NAME: ClassVar = "norm_quant"
    k: int
    count: int
    gated: bool
    eps: float
    outer_eps: float

    def __call__(self, of: Rows, values: Values, refs: dict[str, Ref], sums: Any) -> Any:
        """The statistics, and no sums."""
        outer_weight, made = values.get("outer_weight"), {}
        if self.gated:
            gate_ref, up_ref = _halves(refs["x"])
            gate = of.load(gate_ref)
            x = gate * _sigmoid(gate) * of.load(up_ref)
        else:
            x = of.load(refs["x"])
        if "residual" in refs:
            x = x + of.load(refs["residual"])
            # Rounded as it is stored, so that the backward sees the same sum.
            stored = x.astype(refs["sum"].dtype)
            of.put(refs["sum"], stored)
            x = stored.astype(jnp.float32)
        gain = None
        if outer_weight is not None:
            gain = lax.rsqrt(of.total(x * x) / self.k + self.outer_eps)
            made["outer"] = gain
        if "silu" in refs:
            s = of.load(refs["silu"])
            x = x * (s * _sigmoid(s))
        if outer_weight is not None:
            x = x * outer_weight()
        if "weight0" in values:
            square = of.total(x * x) / self.k
            if gain is not None:
                square = square * gain * gain
            inverse = lax.rsqrt(square + self.eps)
            made["inner"] = inverse
            gain = inverse if gain is None else gain * inverse
        for j in range(self.count):
            y = x * values[f"weight{j}"]() if f"weight{j}" in values else x
            largest = of.absmax(y)
            absmax = at_least(largest if gain is None else gain * largest, MIN_ABSMAX)
            made[f"absmax{j}"], made[f"scale{j}"] = absmax, absmax / 127.0
            factor = 127.0 / absmax if gain is None else gain * (127.0 / absmax)
            # No magnitude exceeds 127, as none exceeds the row's largest.
            of.put_low_bytes(refs[f"q{j}"], rounded(y * of.long(factor)))
        return made, sums


@dataclasses.dataclass(frozen=True)
class Backward:
    """`norm_backward` of a few rows."""

    NAME: ClassVar = "norm_backward"
    k: int
    count: int
    gated: bool
    eps: float
    requantized: int

    def __call__(self, of: Rows, values: Values, refs: dict[str, Ref], sums: Any) -> Any:
        """No scalars, and the sums for the norm weights."""
        sums, k = list(sums), self.k
        outer_weight, own = values.get("outer_weight"), "weight0" in values
        inverse = of.long(values["inner"]) if own else None
        up: Any = None
        sigmoid: Any = None
        silu: Any = None
        if self.gated:
            gate_ref, up_ref = _halves(refs["x"])
            gate, up = of.load(gate_ref), of.load(up_ref)
            sigmoid = _sigmoid(gate)
            silu = gate * sigmoid
            x_hat = silu * up
        else:
            x_hat = of.load(refs["x"])
        if outer_weight is not None:
            x_hat = x_hat * of.long(values["outer"])
        u = x_hat
        if "silu" in refs:
            s = of.load(refs["silu"])
            sigmoid = _sigmoid(s)
            silu = s * sigmoid
            u = u * silu
        z_hat = u
        if outer_weight is not None:
            u = u * outer_weight()
        v = u if inverse is None else u * inverse
        terms = []
        for j in range(self.count):
            g = of.load(refs[f"g{j}"]) * values[f"scale{j}"]
            weight = values[f"weight{j}"]() if own else None
            if self.requantized:
                self._requantize(j, of, values, refs, v if weight is None else v * weight)
            if weight is not None:
                sums[j] += of.over_rows(g * v)
                g = g * weight
            terms.append(g)
        d = functools.reduce(jnp.add, terms)
        projection = jnp.float32(0)
        if inverse is not None:
            projection = of.total(d * v) / k
            d = inverse * (d - v * of.long(projection))
        if outer_weight is not None:
            sums[-1] += of.over_rows(d * z_hat)
            if inverse is not None:
                outer_projection = projection * self.eps * values["inner"] * values["inner"]
            else:
                outer_projection = of.total(d * u) / k
            d = d * outer_weight()
            if "silu" in refs:
                slope = sigmoid + silu * (1.0 - sigmoid)
                of.put(refs["d_silu"], d * x_hat * slope)
                d = d * silu
            d = of.long(values["outer"]) * (d - x_hat * of.long(outer_projection))
        if "skip" in refs:
            d = d + of.load(refs["skip"])
        if self.gated:
            gate_ref, up_ref = _halves(refs["d_x"])
            of.put(up_ref, d * silu)
            of.put(gate_ref, d * up * (sigmoid + silu * (1.0 - sigmoid)))
        else:
            of.put(refs["d_x"], d)
        return {}, tuple(sums)

    def _requantize(
        self, j: int, of: Rows, values: Values, refs: dict[str, Ref], n: jax.Array
    ) -> None:
        absmax, ref = values[f"absmax{j}"], refs[f"input{j}"]
        q = rounded(n * of.long(127.0 / absmax))
        if ref.dtype == jnp.int8:
            of.put_low_bytes(ref, q)
        else:
            # Not the float sum less its summand, which XLA takes for the identity.
            of.put(ref, (q - ROUNDER_BITS).astype(jnp.float32) * of.long(absmax / 127.0))
