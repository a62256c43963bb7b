"""Whole rows of a matrix in a program of a Pallas-Triton kernel (`int8_triton.py`).

A program holds one row at a time in registers, padded to a power of two by masks, and walks
several; while it works on a row, the next is on its way.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import triton as pltriton
from ..refs import Ref


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
