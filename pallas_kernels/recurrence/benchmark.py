"""Times the recurrence, plain and with the MLGRU's gates, forward and backward.

python -m mmfree_jax.pallas_kernels.recurrence.benchmark
"""

import functools
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp

from ..timing import bandwidth, row_of
from . import pallas_gpu, pallas_tpu, xla

SHAPES = ((8, 2048, 2048), (8, 2048, 1024), (1, 2048, 2048), (1, 16384, 2048))
MODULES = {
    "xla": xla,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
}
# Arrays [B, T, D] that each pass must read and write at least once.
ARRAYS = {"forward": 3, "backward": 5, "mlgru_forward": 3, "mlgru_backward": 6}


def variants(names: Iterable[str] | None = None) -> dict[str, dict[str, Callable]]:
    """name -> pass -> function; by default XLA and the kernels of this backend."""
    names = names or ("xla", *(n for n in MODULES if n.endswith(jax.default_backend())))
    return {name: {step: getattr(MODULES[name], step) for step in ARRAYS} for name in names}


def benchmark(
    shapes: Iterable[tuple[int, int, int]] = SHAPES,
    functions: dict[str, dict[str, Callable]] | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    resets: bool = False,
) -> Iterable[dict]:
    """One row for each shape, pass and variant: ms, GB/s of the fewest bytes, difference to XLA."""
    for shape in shapes:
        B, T, D = shape
        array_bytes = B * T * D * jnp.dtype(dtype).itemsize
        # Enough input sets that none waits in a cache of about 50 MB.
        copies = min(8, max(3, 2**28 // (3 * array_bytes)))
        reset_BT = jax.random.bernoulli(jax.random.key(9), 1 / 512, (B, T)) if resets else None
        sets = [_arguments(shape, seed, dtype, reset_BT) for seed in range(copies)]
        for step, arrays in ARRAYS.items():
            arguments = [of_pass[step] for of_pass in sets]
            expected = jax.jit(getattr(xla, step))(*arguments[0])
            for name, functions_of in (functions or variants()).items():
                row = {"op": f"recurrence {step}", "shape": shape, "resets": resets}
                row["variant"] = name
                if step not in functions_of:
                    continue
                megabytes = 1e-6 * arrays * array_bytes
                yield row_of(row, bandwidth, functions_of[step], arguments, expected, megabytes)


@functools.partial(jax.jit, static_argnums=(0, 2))
def _arguments(
    shape: tuple[int, ...], seed: int, dtype: jax.typing.DTypeLike, reset_BT: jax.Array | None
) -> dict[str, tuple]:
    """The arguments of every pass; gates spread over (0, 1) as in a trained model."""
    B, _, D = shape
    keys = jax.random.split(jax.random.key(seed), 6)
    normal = [jax.random.normal(key, shape) for key in keys[:4]]
    i, raw, dh, h = (x.astype(dtype) for x in normal)
    f = jax.nn.sigmoid(2 * normal[1] + 1).astype(dtype)
    bound = jax.random.uniform(keys[4], (D,), maxval=0.9)
    h0 = jnp.zeros((B, D))
    dh_last = jax.random.normal(keys[5], (B, D))
    return {
        "forward": (f, i, reset_BT, h0),
        "backward": (f, h, reset_BT, h0, dh, dh_last),
        "mlgru_forward": (i, raw, bound, reset_BT, h0),
        "mlgru_backward": (i, raw, bound, h, reset_BT, h0, dh, dh_last),
    }


if __name__ == "__main__":
    for row in benchmark():
        print(row, flush=True)
