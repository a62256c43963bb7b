"""Times whole BitLinear layers, forward and with backward, against plain XLA programs.

python -m mmfree_jax.pallas_kernels.bitlinear.benchmark
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from ..norm_quant.reference import quantize_int8, rms_norm
from ..ternary_matmul.api import ternarize
from ..timing import compile_for, in_words, largest_difference, median_ms
from .api import bitlinear_many
from .reference import straight_through

# (K, widths N_j, outer norm): i f g; o; gate and up; down, at 370M and 1.3B.
MODEL_LAYERS = (
    (1024, (1024, 1024, 1024), True),
    (1024, (5632,), True),
    (2816, (1024,), False),
    (2048, (2048, 2048, 2048), True),
    (2048, (11264,), True),
    (5632, (2048,), False),
)


def _fused(
    x: jax.Array,
    norms: tuple[jax.Array, ...],
    ws: tuple[jax.Array, ...],
    ternary: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    outer: jax.Array | None,
    *,
    implementation: str,
) -> tuple[jax.Array, ...]:
    trits, scales = ternary
    return bitlinear_many(
        x,
        norms,
        ws,
        trits,
        scales,
        eps=1e-6,
        outer_norm_weight=outer,
        implementation=implementation,
    )


def _plain(
    x: jax.Array,
    norms: tuple[jax.Array, ...],
    ws: tuple[jax.Array, ...],
    ternary: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    outer: jax.Array | None,
) -> tuple[jax.Array, ...]:
    """The textbook program: fake quantisation, bf16 product, JAX's own differentiation."""
    h = x if outer is None else rms_norm(x, outer, eps=1e-6)
    outputs = []
    for b, w, trits, scale in zip(norms, ws, *ternary, strict=True):
        n = rms_norm(h, b, eps=1e-6)
        q, token_scale = quantize_int8(n)
        n = straight_through(n, q * token_scale).astype(x.dtype)
        w = straight_through(w, trits * scale).astype(x.dtype)
        outputs.append(jax.lax.dot_general(n, w, (((1,), (1,)), ((), ()))))
    return tuple(outputs)


def _training(
    forward: Callable,
    x: jax.Array,
    norms: tuple[jax.Array, ...],
    ws: tuple[jax.Array, ...],
    ternary: tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]],
    outer: jax.Array | None,
    cotangents: tuple[jax.Array, ...],
) -> tuple[Any, Any]:
    outputs, vjp = jax.vjp(lambda x, b, w, a: forward(x, b, w, ternary, a), x, norms, ws, outer)
    return outputs, vjp(cotangents)


def benchmark(
    m: int = 16384,
    layers: Iterable[tuple[int, Sequence[int], bool]] = MODEL_LAYERS,
    implementations: Iterable[str] = ("xla_int8", "xla_bf16", "pallas_mosaic_gpu"),
    copies: int = 4,
) -> Iterable[dict]:
    """One row for each layer and program: ms forward and ms forward with backward.

    `differ` is the largest relative RMS difference of any result from xla_int8's.
    """
    for k, widths, outer in layers:
        keys = jax.random.split(jax.random.key(0), copies + len(widths))
        norms = tuple(jnp.linspace(0.5, 1.5, k) + 0.1 * j for j in range(len(widths)))
        ws = tuple(
            0.02 * jax.random.normal(key, (n, k))
            for key, n in zip(keys[copies:], widths, strict=True)
        )
        ternary = tuple(zip(*(ternarize(w) for w in ws), strict=True))
        a = jnp.linspace(1.5, 0.5, k) if outer else None
        sets = [
            (jax.random.normal(key, (m, k), jnp.bfloat16), norms, ws, ternary, a)
            for key in keys[:copies]
        ]
        cotangents = tuple(
            jax.random.normal(key, (m, n), jnp.bfloat16)
            for key, n in zip(keys, widths, strict=False)
        )
        training_sets = [(*s, cotangents) for s in sets]
        expected = None
        programs = {
            name: functools.partial(_fused, implementation=name) for name in implementations
        }
        for name, forward in (programs | {"plain": _plain}).items():
            row = {"op": "bitlinear", "m": m, "k": k, "widths": tuple(widths), "variant": name}
            try:
                ms, _ = median_ms(compile_for(forward, sets), sets)
                training = functools.partial(_training, forward)
                both, results = median_ms(compile_for(training, training_sets), training_sets)
            except Exception as error:
                yield {**row, "error": in_words(error)}
                continue
            expected = results if expected is None else expected
            yield {
                **row,
                "forward_ms": round(ms, 4),
                "with_backward_ms": round(both, 4),
                "differ": largest_difference(results, expected),
            }


if __name__ == "__main__":
    for row in benchmark():
        print(row, flush=True)
