"""Times the head: linear layer, softmax cross-entropy and their gradients.

python -m mmfree_jax.pallas_kernels.cross_entropy.benchmark
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ..timing import compile_for, median_ms, row_of
from . import api

# (tokens, words, width): 16 sequences of 1024 for the 370M, 1.3B and 2.7B models.
SHAPES = ((16384, 32000, 1024), (16384, 32000, 2048), (16384, 32000, 2560))
CHUNKS = (1024, 2048, 4096, 8192)


def _losses(
    x: jax.Array, w: jax.Array, trits: jax.Array, targets: jax.Array, **options: Any
) -> jax.Array:
    return api.ternary_linear_cross_entropy(x, w, trits, 0.02, targets, **options).loss_N


def _total(
    x: jax.Array, w: jax.Array, trits: jax.Array, targets: jax.Array, **options: Any
) -> jax.Array:
    return api.ternary_linear_cross_entropy_sum(x, w, trits, 0.02, targets, **options)[0]


def _plain_total(
    x: jax.Array, w: jax.Array, trits: jax.Array, targets: jax.Array, **options: Any
) -> jax.Array:
    del trits
    return api.linear_cross_entropy_sum(x, w.astype(x.dtype), targets, **options)[0]


def _gradients(
    loss: Callable[..., jax.Array], x: jax.Array, w: jax.Array, *rest: jax.Array, **options: Any
) -> Any:
    return jax.grad(lambda x, w: loss(x, w, *rest, **options).sum(), (0, 1))(x, w)


def variants(chunks: Iterable[int] = CHUNKS) -> dict[str, tuple[Callable, int]]:
    """name -> (function of (x, w, trits, targets), products of 2 N V D operations)."""
    found = {}
    for chunk in chunks:
        loss = functools.partial(_losses, chunk_size=chunk)
        gradients = functools.partial(_gradients, chunk_size=chunk)
        at_once = functools.partial(gradients, _total)
        found |= {
            f"ternary loss, chunk {chunk}": (loss, 1),
            f"ternary gradients, logits twice, chunk {chunk}": (
                functools.partial(gradients, _losses),
                4,
            ),
            f"ternary gradients, logits once, chunk {chunk}": (at_once, 3),
            f"ternary gradients, logits once, chunk {chunk}, xla": (
                functools.partial(at_once, implementation="xla"),
                3,
            ),
            f"bf16 gradients, logits once, chunk {chunk}": (
                functools.partial(gradients, _plain_total),
                3,
            ),
        }
    return found


def benchmark(
    shapes: Iterable[tuple[int, int, int]] = SHAPES,
    functions: dict[str, tuple[Callable, int]] | None = None,
) -> Iterable[dict]:
    """One row for each shape and variant: ms, TFLOP/s, and megabytes beyond inputs and outputs."""
    for n, v, d in shapes:
        keys = jax.random.split(jax.random.key(0), 4)
        arguments = (
            jax.random.normal(keys[0], (n, d), jnp.bfloat16),
            0.03 * jax.random.normal(keys[1], (v, d)),
            jax.random.randint(keys[2], (v, d), -1, 2, jnp.int8),
            jax.random.randint(keys[3], (n,), 0, v),
        )
        for name, (function, products) in (functions or variants()).items():
            row = {"op": "cross_entropy", "n": n, "v": v, "d": d, "variant": name}
            operations = 2 * products * n * v * d
            yield row_of(row, _measure, function, arguments, operations)


def _measure(function: Callable, arguments: tuple, operations: int) -> dict[str, Any]:
    program = compile_for(function, [arguments])
    ms, _ = median_ms(program, [arguments])
    memory = program.memory_analysis().temp_size_in_bytes
    tflops = round(1e-9 * operations / ms, 1)
    return {"ms": round(ms, 3), "tflops": tflops, "temp_mb": memory >> 20}


if __name__ == "__main__":
    for row in benchmark():
        print(row, flush=True)
