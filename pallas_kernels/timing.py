"""What the ops' benchmarks share: programs that rotate among inputs, their time and their error."""

import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def compile_for(function: Callable, argument_sets: Sequence[tuple]) -> Callable:
    """One program that runs the function on every argument set."""
    inner = jax.jit(function)  # Lowered once, whatever the number of sets.
    program = jax.jit(lambda sets: [inner(*arguments) for arguments in sets])
    return program.lower(list(argument_sets)).compile()


def median_ms(
    program: Callable, argument_sets: Sequence[tuple], *, calls: int = 4, repeats: int = 7
) -> tuple[float, Any]:
    """Median milliseconds of the function of a `compile_for` program, and its first result.

    Several programs are queued and the clock is read when the last has ended, so that
    launches hide behind work.
    """
    sets = list(argument_sets)
    first = jax.block_until_ready(program(sets))[0]
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        for _ in range(calls):
            result = program(sets)
        jax.block_until_ready(result)
        times.append((time.perf_counter() - start) / (calls * len(sets)))
        del result
    return 1e3 * statistics.median(times), first


def row_of(
    row: dict[str, Any], measure: Callable[..., dict[str, Any]], *arguments: Any
) -> dict[str, Any]:
    """The row with what is measured, or with the error: a variant that fails is a result too."""
    try:
        return {**row, **measure(*arguments)}
    except Exception as error:
        return {**row, "error": in_words(error)}


def in_words(error: Exception) -> str:
    """The error in a few words, for a row."""
    return f"{type(error).__name__}: {str(error)[:200]}"


@jax.jit
def _relative(a: jax.Array, b: jax.Array) -> jax.Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    return jnp.sqrt(jnp.mean((a - b) ** 2) / jnp.maximum(jnp.mean(b**2), 1e-30))


def largest_difference(got: Any, expected: Any) -> float:
    """The largest relative RMS difference over the arrays of two trees of one structure; NaN where
    one of them holds a NaN or an infinity.
    """
    pairs = zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True)
    # Python's max leaves out a NaN that comes behind a number.
    return float(np.max([float(_relative(g, e)) for g, e in pairs]))


def bandwidth(
    function: Callable,
    argument_sets: Sequence[tuple],
    expected: Any,
    megabytes: float,
    timer: Callable[..., tuple[float, Any]] = median_ms,
) -> dict[str, Any]:
    """What a row says of a function bound by memory: ms, GB/s and its difference to `expected`."""
    ms, got = timer(compile_for(function, argument_sets), argument_sets)
    differ = largest_difference(got, expected)
    return {"differ": differ, "ms": round(ms, 5), "gb_per_s": round(megabytes / ms, 1)}
