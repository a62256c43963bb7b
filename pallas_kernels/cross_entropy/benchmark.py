"""Times the head: linear layer, softmax cross-entropy and their gradients.

python -m mmfree_jax.pallas_kernels.cross_entropy.benchmark
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp

from ..timing import compile_for, median_ms
from . import api

# (tokens, words, width): 16 sequences of 1024 for the 370M, 1.3B and 2.7B models.
SHAPES = ((16384, 32000, 1024), (16384, 32000, 2048), (16384, 32000, 2560))
CHUNKS = (1024, 2048, 4096, 8192)


def variants(chunks: Iterable[int] = CHUNKS) -> dict[str, tuple[Callable, int]]:
    """name -> (function of (x, w, trits, targets), products of 2 N V D operations)."""
    found = {}
    for chunk in chunks:
        options = {"chunk_size": chunk}

        def loss(
            x: jax.Array,
            w: jax.Array,
            trits: jax.Array,
            targets: jax.Array,
            options: dict[str, Any] = options,
        ) -> jax.Array:
            return api.ternary_linear_cross_entropy(x, w, trits, 0.02, targets, **options).loss_N

        def recomputed(
            x: jax.Array,
            w: jax.Array,
            trits: jax.Array,
            targets: jax.Array,
            loss: Callable[..., jax.Array] = loss,
        ) -> Any:
            return jax.grad(lambda x, w: loss(x, w, trits, targets).sum(), (0, 1))(x, w)

        def at_once(
            x: jax.Array,
            w: jax.Array,
            trits: jax.Array,
            targets: jax.Array,
            options: dict[str, Any] = options,
        ) -> Any:
            def total(x: jax.Array, w: jax.Array) -> jax.Array:
                results = api.ternary_linear_cross_entropy_sum(
                    x, w, trits, 0.02, targets, **options
                )
                return results[0]

            return jax.grad(total, (0, 1))(x, w)

        through_xla = functools.partial(at_once, options=options | {"implementation": "xla"})

        def plain(
            x: jax.Array,
            w: jax.Array,
            trits: jax.Array,
            targets: jax.Array,
            options: dict[str, Any] = options,
        ) -> Any:
            def total(x: jax.Array, w: jax.Array) -> jax.Array:
                return api.linear_cross_entropy_sum(x, w.astype(x.dtype), targets, **options)[0]

            return jax.grad(total, (0, 1))(x, w)

        found |= {
            f"ternary loss, chunk {chunk}": (loss, 1),
            f"ternary gradients, logits twice, chunk {chunk}": (recomputed, 4),
            f"ternary gradients, logits once, chunk {chunk}": (at_once, 3),
            f"ternary gradients, logits once, chunk {chunk}, xla": (through_xla, 3),
            f"bf16 gradients, logits once, chunk {chunk}": (plain, 3),
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
            try:
                program = compile_for(function, [arguments])
                ms, _ = median_ms(program, [arguments])
                memory = program.memory_analysis().temp_size_in_bytes
            except Exception as error:  # a variant that cannot run is a result too
                yield {**row, "error": f"{type(error).__name__}: {str(error)[:200]}"}
                continue
            tflops = 2e-9 * products * n * v * d / ms
            yield {**row, "ms": round(ms, 3), "tflops": round(tflops, 1), "temp_mb": memory >> 20}


if __name__ == "__main__":
    for row in benchmark():
        print(row, flush=True)
