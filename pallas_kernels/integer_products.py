"""XLA's product of int8 matrices, looked at once a shape before its sums are trusted on a GPU.

On an H100 with `--xla_gpu_autotune_level=0` XLA gives wrong sums for most shapes, and says
nothing (docs/kernels.md). So the first time a shape is asked for on a GPU, a product of that
shape is made there and some of its rows are compared with exact sums on the host. What is wrong
is refused: no result is better than such a one.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np

from .errors import IntegerProductError

# Rows of the product that is made, and int32 elements of it: enough for XLA to choose as it
# would for more, and little memory.
_MOST_ROWS, _MOST_OUTPUTS = 2048, 1 << 24
_COMPARED_ROWS = 16
# Operands repeat with these periods, so that no two rows of a usual width are alike.
_PERIODS = (65521, 65519)
# A float32 sum of K products of magnitude 128 at most is exact below 2^24.
MAX_FLOAT_COLUMNS = 2**24 // 128


def int8_dot(x: jax.Array, w: jax.Array, axes: tuple[int, int] = (-1, 1)) -> jax.Array:
    """XLA's int8 product of x with w, by default x @ w^T.

    Args:
      x: [..., K] int8; [K, M] where its first axis is summed over.
      w: [N, K] int8, or [K, N].
      axes: of x (-1 or 0) and of w, summed over.

    Returns:
      [..., N] int32, exact.

    Raises:
      IntegerProductError: the default device is a GPU, and its sums at this shape are wrong.
    """
    k, n = x.shape[axes[0]], w.shape[1 - axes[1]]
    require_exact(x.size // max(k, 1), n, k, axes)
    if jax.default_backend() == "cpu" and x.ndim > 1 and x.size == k and axes[0] == -1:
        # Its product of a vector and a matrix takes up to 25 times as long as that of two rows:
        # a row of zeros beside it, and added to it, so that XLA does not take it out again.
        row = x.reshape(1, k)
        sums = jnp.sum(_dot(jnp.concatenate([row, jnp.zeros_like(row)]), w, axes), axis=0)
        return sums.reshape(*x.shape[:-1], n)
    return _dot(x, w, axes)


def require_exact(m: int, n: int, k: int, axes: tuple[int, int] = (-1, 1)) -> None:
    """Checks the sums over k of an [m, n] product on a GPU, once a process, shape and layout.

    Raises:
      IntegerProductError: they are wrong.
    """
    if jax.default_backend() != "gpu" or not (m and n and k):
        return
    rows = min(m, _MOST_ROWS, max(_COMPARED_ROWS, _MOST_OUTPUTS // n))
    wrong = _wrong_sums(1 << (rows - 1).bit_length(), n, k, axes)
    if wrong:
        raise IntegerProductError(
            f"XLA's int8 product of [{m}, {k}] with [{n}, {k}] is wrong on this "
            f"{jax.local_devices()[0].device_kind}: {wrong:.1%} of the sums that were compared. "
            "It is known to be with --xla_gpu_autotune_level=0 in XLA_FLAGS: leave that flag out, "
            "or put --xla_gpu_enable_triton_gemm=false or --xla_gpu_deterministic_ops=true beside "
            "it"
        )


@functools.cache
def _wrong_sums(m: int, n: int, k: int, axes: tuple[int, int]) -> float:
    """The share of sums that are wrong among those compared.

    In a thread of its own: whoever asks may be tracing a program, or have set a mesh.
    """
    with concurrent.futures.ThreadPoolExecutor(1) as executor:
        return executor.submit(_compare, m, n, k, axes).result()


def _compare(m: int, n: int, k: int, axes: tuple[int, int]) -> float:
    rng = np.random.default_rng(0)
    x = np.resize(rng.integers(-127, 128, _PERIODS[0], dtype=np.int8), (m, k))
    trits = np.resize(rng.integers(-1, 2, _PERIODS[1], dtype=np.int8), (n, k))
    rows = np.unique(np.linspace(0, m - 1, _COMPARED_ROWS).astype(int))
    with jax.default_device(jax.local_devices()[0]):
        left = jnp.asarray(x if axes[0] == -1 else x.T)
        right = jnp.asarray(trits if axes[1] == 1 else trits.T)
        found = np.asarray(_product(left, right, axes)[rows])
    exact = np.float32 if k < MAX_FLOAT_COLUMNS else np.float64
    return float(np.mean(found != x[rows].astype(exact) @ trits.T.astype(exact)))


def _dot(x: jax.Array, w: jax.Array, axes: tuple[int, int]) -> jax.Array:
    contract = (((axes[0] % x.ndim,), (axes[1],)), ((), ()))
    return jax.lax.dot_general(x, w, contract, preferred_element_type=jnp.int32)


_product = jax.jit(_dot, static_argnums=2)
