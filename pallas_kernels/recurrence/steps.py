"""The recurrences as data: what each computes from a row, for the kernel that walks over time.

A kernel offers `scan(steps, rows, previous_BTD=, start_BD=, initial_BD=, lanes=, reset_BT=)`,
and the GPU's also `held_BT=`, which returns (outputs, last state [B, D], sums [D]):

  rows: inputs [B, T, D] by name, given to `steps` in float32;
  previous_BTD: an array whose row t - 1 is wanted beside row t, as row["previous"], zero where
    the state is reset; `start_BD` stands before its first row (zeros when None);
  initial_BD: the state before the first step walked (zeros when None);
  lanes: inputs [D] by name, given to `steps` with every row;
  reset_BT: bool, where true the state does not pass;
  held_BT: bool, where true the state passes unchanged.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .gates import gate_gradients, gate_values

Row = dict[str, Any]
# A kernel's `scan`: (outputs, last state, sums).
Scan = Callable[..., tuple[list[jax.Array], jax.Array, list[jax.Array]]]


@dataclasses.dataclass(frozen=True)
class Steps:
    """What one recurrence computes from a row of its inputs.

    Attributes:
      coefficients: row -> (a, b) of s_t = a_t s_{t-1} + b_t, float32. Where the state is reset,
        a is replaced by zero, and in reverse b too.
      emit: (row, s before the step, s after it) -> the outputs, then the terms of the sums.
      outputs: dtype of each output [B, T, D].
      sums: how many sums over batch and time are wanted.
      reverse: whether time runs backwards.
    """

    coefficients: Callable[[Row], tuple[jax.Array, jax.Array]]
    emit: Callable[[Row, jax.Array, jax.Array], Sequence[jax.Array]]
    outputs: tuple[Any, ...]
    sums: int = 0
    reverse: bool = False


def forward(
    scan: Scan,
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(h_BTD in x's dtype, h_last_BD in float32); reset and h0 may be None."""
    steps = Steps(
        coefficients=lambda row: (row["f"], row["x"]),
        emit=lambda row, before, after: (after,),
        outputs=(x_BTD.dtype,),
    )
    rows = {"f": f_BTD, "x": x_BTD}
    (h_BTD,), h_last_BD, _ = scan(steps, rows, initial_BD=_float32(h0_BD), reset_BT=reset_BT)
    return h_BTD, h_last_BD


def backward(
    scan: Scan,
    f_BTD: jax.Array,
    h_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
    dh_BTD: jax.Array,
    dh_last_BD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(df_BTD, dx_BTD, dh0_BD): the state walked backwards is c_t = a_t (dh_t + c_{t+1})."""

    def emit(row: Row, before: jax.Array, after: jax.Array) -> tuple[jax.Array, ...]:
        g = row["dh"] + before
        return g * row["previous"], g

    steps = Steps(
        coefficients=lambda row: (row["f"], row["f"] * row["dh"]),
        emit=emit,
        outputs=(f_BTD.dtype, h_BTD.dtype),
        reverse=True,
    )
    (df_BTD, dx_BTD), dh0_BD, _ = scan(
        steps,
        {"f": f_BTD, "dh": dh_BTD},
        previous_BTD=h_BTD,
        start_BD=_float32(h0_BD),
        initial_BD=_float32(dh_last_BD),
        reset_BT=reset_BT,
    )
    return df_BTD, dx_BTD, dh0_BD


def mlgru_forward(
    scan: Scan,
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
    **held: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """(h_BTD in i's dtype, h_last_BD): the gates are computed beside the recurrence."""

    def coefficients(row: Row) -> tuple[jax.Array, jax.Array]:
        gates = gate_values(row["i"], row["f"], row.get("bound"))
        return gates.forget, gates.candidate * gates.complement

    steps = Steps(
        coefficients=coefficients,
        emit=lambda row, before, after: (after,),
        outputs=(i_BTD.dtype,),
    )
    (h_BTD,), h_last_BD, _ = scan(
        steps,
        {"i": i_BTD, "f": f_BTD},
        lanes=_bound(lower_bound_D),
        initial_BD=_float32(h0_BD),
        reset_BT=reset_BT,
        **held,
    )
    return h_BTD, h_last_BD


def mlgru_backward(
    scan: Scan,
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None,
    h_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
    dh_BTD: jax.Array,
    dh_last_BD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array | None, jax.Array]:
    """(di_BTD, df_BTD, dlower_bound_D or None, dh0_BD); the gates are computed anew."""

    def coefficients(row: Row) -> tuple[jax.Array, jax.Array]:
        forget = gate_values(row["i"], row["f"], row.get("bound")).forget
        return forget, forget * row["dh"]

    def emit(row: Row, before: jax.Array, after: jax.Array) -> tuple[jax.Array, ...]:
        gates = gate_values(row["i"], row["f"], row.get("bound"))
        di, df, dbound = gate_gradients(gates, row["dh"] + before, row["previous"])
        return (di, df) if lower_bound_D is None else (di, df, dbound)

    steps = Steps(
        coefficients=coefficients,
        emit=emit,
        outputs=(i_BTD.dtype, f_BTD.dtype),
        sums=0 if lower_bound_D is None else 1,
        reverse=True,
    )
    (di_BTD, df_BTD), dh0_BD, sums = scan(
        steps,
        {"i": i_BTD, "f": f_BTD, "dh": dh_BTD},
        lanes=_bound(lower_bound_D),
        previous_BTD=h_BTD,
        start_BD=_float32(h0_BD),
        initial_BD=_float32(dh_last_BD),
        reset_BT=reset_BT,
    )
    return di_BTD, df_BTD, sums[0] if sums else None, dh0_BD


def _float32(x: jax.Array | None) -> jax.Array | None:
    return None if x is None else x.astype(jnp.float32)


def _bound(lower_bound_D: jax.Array | None) -> dict[str, jax.Array]:
    return {} if lower_bound_D is None else {"bound": lower_bound_D}
