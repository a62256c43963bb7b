"""Times the ternary product's implementations against XLA's bf16 product in the same run.

python -m mmfree_jax.pallas_kernels.ternary_matmul.benchmark [tune] [tokens]
"""

import functools
import json
import sys
from collections.abc import Callable, Iterable
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp

from ..timing import compile_for, in_words, median_ms
from . import api, pallas_mosaic_gpu

# (N, K) of the 370M, 1.3B and 2.7B models' matrices, the heads last.
MODEL_SHAPES = (
    (1024, 1024),
    (5632, 1024),
    (1024, 2816),
    (2048, 2048),
    (11264, 2048),
    (2048, 5632),
    (2560, 2560),
    (13824, 2560),
    (2560, 6912),
    (32000, 1024),
    (32000, 2048),
)
COPIES = 8  # Input sets a call rotates through, so that none waits in the cache.


def operands(m: int, n: int, k: int, copies: int) -> list[tuple]:
    """Random (x_q, x_scale, trits, w_scale) sets that share the weights."""
    keys = jax.random.split(jax.random.key(0), copies + 1)
    trits = jax.random.randint(keys[0], (n, k), -1, 2, jnp.int8)
    w_scale = jnp.full((1, 1), 0.02, jnp.float32)
    return [
        (
            jax.random.randint(key, (m, k), -128, 128, jnp.int8),
            jax.random.uniform(key, (m, 1), jnp.float32),
            trits,
            w_scale,
        )
        for key in keys[1:]
    ]


def bf16_product(x: jax.Array, w: jax.Array) -> jax.Array:
    """The peer: XLA's product of bf16 operands, weights [N, K], bf16 out."""
    return jax.lax.dot_general(x, w, (((1,), (1,)), ((), ())))


def variants(names: Iterable[str] | None = None) -> dict[str, Callable]:
    """name -> function of `ternary_matmul`'s positional arguments; all of this backend for None."""
    return {
        name: functools.partial(_with_implementation, name)
        for name in names or api.available_implementations()
    }


def _with_implementation(name: str, *operands: jax.Array) -> jax.Array:
    return api.ternary_matmul(*operands, out_dtype=jnp.bfloat16, implementation=name)


def benchmark(
    m: int = 16384,
    shapes: Iterable[tuple[int, int]] = MODEL_SHAPES,
    functions: dict[str, Callable] | None = None,
    copies: int = COPIES,
    oracle: str = "xla_int8",
) -> Iterable[dict]:
    """One row for each shape and variant: ms, TFLOP/s and the ratio to XLA's bf16 product.

    Args:
      m: tokens.
      shapes: (N, K) pairs.
      functions: as `variants` makes them; all of them when None.
      copies: input sets to rotate through.
      oracle: the implementation whose results all must equal bit for bit.
    """
    functions = functions or variants()
    for n, k in shapes:
        sets = operands(m, n, k, copies)
        wide = [(x.astype(jnp.bfloat16), t.astype(jnp.bfloat16)) for x, _, t, _ in sets]
        peer, _ = median_ms(compile_for(bf16_product, wide), wide)
        del wide
        exact = functools.partial(api.ternary_matmul, out_dtype=jnp.bfloat16, implementation=oracle)
        expected = exact(*sets[0])
        timings = {"bf16 (peer)": peer}
        # XLA tunes its own products while it compiles them, so those go one by one.
        slow = [name for name in functions if name.startswith("xla")]
        compiled = {name: _try(compile_for, functions[name], sets) for name in slow}
        with futures.ThreadPoolExecutor(8) as pool:
            rest = [name for name in functions if name not in slow]
            programs = pool.map(
                functools.partial(_try, compile_for),
                [functions[name] for name in rest],
                [sets] * len(rest),
            )
            compiled |= dict(zip(rest, programs, strict=True))
        for name in functions:
            row = {"op": "ternary_matmul", "m": m, "n": n, "k": k, "variant": name}
            program = compiled[name]
            timed = program if isinstance(program, str) else _try(median_ms, program, sets)
            if isinstance(timed, str):
                yield {**row, "error": timed}
            elif not bool(jnp.array_equal(timed[1], expected)):
                yield {**row, "error": f"differs from {oracle}"}
            else:
                timings[name] = timed[0]
        for name, ms in timings.items():
            yield {
                "op": "ternary_matmul",
                "m": m,
                "n": n,
                "k": k,
                "variant": name,
                "ms": round(ms, 5),
                "tflops": round(2e-9 * m * n * k / ms, 1),
                "over_bf16": round(peer / ms, 3),
            }


def _try(function: Callable[..., Any], *arguments: Any) -> Any:
    """The function's result, or its error in a few words: a sweep goes on without it."""
    try:
        return function(*arguments)
    except Exception as error:
        return in_words(error)


# Tiles worth trying on an H100: a sweep of more found none that beats these anywhere.
CANDIDATES = (
    {},
    {"split": "n"},
    {"width": 4},
    {"tile_m": 256, "tile_n": 128, "cluster": "n"},
    {"split": "n", "stages": 3, "slots": 4},
    # For few tokens, where 128 x 256 leaves the last round of tiles half empty.
    {"tile_n": 128, "even": True},
    {"tile_n": 160, "store_n": 32, "even": True},
    {"tile_n": 176, "store_n": 16, "slots": 4, "even": True},
    {"tile_n": 192, "even": True},
)


def tune(
    m: int = 16384,
    shapes: Iterable[tuple[int, int]] = MODEL_SHAPES,
    candidates: Iterable[dict] = CANDIDATES,
) -> Iterable[dict]:
    """`benchmark`'s rows for the Mosaic kernel's candidate tiles, which a row carries."""
    candidates = list(candidates)
    functions: dict[str, Callable] = {
        f"pallas_mosaic_gpu {candidate}": functools.partial(_with_tiles, candidate)
        for candidate in candidates
    }
    by_name = dict(zip(functions, candidates, strict=True))
    for n, k in shapes:
        copies = COPIES if n < 20000 else 3
        # Not an XLA product, which would be tuned for each shape only to be compared with.
        for row in benchmark(m, [(n, k)], functions, copies, oracle="pallas_triton"):
            yield {**row, "tiles": by_name.get(row["variant"])}


def best_tiles(rows: Iterable[dict]) -> dict[str, dict]:
    """(N x K) -> the fastest tiles among `tune`'s rows: mosaic_configs.json for an M."""
    best: dict[str, dict] = {}
    for row in rows:
        if row["tiles"] is None or "ms" not in row:
            continue
        shape = f"{row['n']}x{row['k']}"
        if shape not in best or row["ms"] < best[shape]["ms"]:
            best[shape] = row
    return {shape: row["tiles"] for shape, row in best.items()}


def _with_tiles(
    tiles: dict[str, Any], x_q: jax.Array, x_scale: jax.Array, trits: jax.Array, w_scale: jax.Array
) -> jax.Array:
    return pallas_mosaic_gpu.ternary_matmul(
        x_q,
        x_scale.reshape(-1),
        trits,
        w_scale.reshape(-1),
        out_dtype=jnp.bfloat16,
        config=pallas_mosaic_gpu.Config(**tiles),
        multiprocessors=jax.devices()[0].core_count,
    )


if __name__ == "__main__":
    rows = []
    tokens = [int(word) for word in sys.argv[1:] if word.isdigit()] or [16384]
    for row in tune(tokens[0]) if "tune" in sys.argv else benchmark(tokens[0]):
        rows.append(row)
        print(row, flush=True)
    if "tune" in sys.argv:
        print(json.dumps(best_tiles(rows), indent=1))
