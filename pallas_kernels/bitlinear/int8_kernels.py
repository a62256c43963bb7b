"""The 8-bit backward products on a Hopper: rounding by Triton, products by s8 wgmma.

The definition, and the program everywhere else, is `int8_backward.py`.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .. import triton
from ..over_tokens import TOKENS, WHOLE, devices_in_mesh, over_tokens, partial_sums
from ..ternary_matmul import api as ternary_matmul
from . import int8_triton

_KERNEL = "pallas_mosaic_gpu"
_MULTIPLE = 128  # Of all three sizes: the tiles that are turned.


def fit(
    m: int, n: int, k: int, *, implementation: str | None, token_axes: Sequence[str] = ()
) -> bool:
    """Whether both products of a layer run here.

    Args:
      m: tokens.
      n: outputs of the layer.
      k: its inputs.
      implementation: of the products; None asks whether the kernel is the fastest for the sizes.
      token_axes: mesh axes that split the tokens.
    """
    local = m // devices_in_mesh()
    if any(size % _MULTIPLE for size in (local, n, k)) or local > ternary_matmul.MAX_INT8_COLUMNS:
        return False
    if implementation is not None:
        return implementation == _KERNEL
    chosen = ternary_matmul.default_implementation(m, k, n, token_axes=token_axes)
    return chosen == _KERNEL and triton.serves()


def input_gradient(
    d: jax.Array,
    trits: jax.Array,
    x_scale: jax.Array | None,
    out_dtype: jax.typing.DTypeLike,
    *,
    token_axes: Sequence[str] = (),
) -> tuple[jax.Array, jax.Array | None]:
    """`int8_backward.input_gradient`, and what `weight_gradient` needs to know of d.

    Args:
      d: [..., N] float.
      trits: [N, K] int8.
      x_scale: [..., 1] float32, of the layer's int8 inputs; None where its weight has no gradient.
      out_dtype: of the result.
      token_axes: mesh axes that split d's leading axis.

    Returns:
      [..., K], and the largest magnitude of each column of d x_scale, [devices, N] float32 (None
      without x_scale).
    """

    def local(
        d: jax.Array, x_scale: jax.Array | None, trits: jax.Array
    ) -> tuple[jax.Array, jax.Array | None]:
        scale = None if x_scale is None else x_scale.reshape(-1)
        q, d_scale, largest = int8_triton.quantize_rows(d.reshape(-1, d.shape[-1]), scale)
        d_x = _product(q, d_scale, trits, out_dtype)
        d_x = d_x.reshape(*d.shape[:-1], d_x.shape[-1])
        return d_x, None if largest is None else largest[None]

    return over_tokens(local, token_axes, (TOKENS, TOKENS, WHOLE), (TOKENS, TOKENS))(
        d, x_scale, trits
    )


def weight_gradient(
    d: jax.Array,
    x: jax.Array,
    x_scale: jax.Array,
    largest: jax.Array,
    out_dtype: jax.typing.DTypeLike,
    *,
    token_axes: Sequence[str] = (),
) -> jax.Array:
    """`int8_backward.weight_gradient` of each device's tokens, for `total`.

    Args:
      d: [..., N] float.
      x: [..., K] int8, the layer's inputs.
      x_scale: [..., 1] float32.
      largest: [devices, N], as `input_gradient` returned it.
      out_dtype: of the result.
      token_axes: mesh axes that split the leading axes.

    Returns:
      [devices or 1, N, K].
    """

    def local(d: jax.Array, x: jax.Array, x_scale: jax.Array, largest: jax.Array) -> jax.Array:
        q, d_scale = int8_triton.quantize_columns(
            d.reshape(-1, d.shape[-1]), x_scale.reshape(-1), largest[0]
        )
        return _product(q, d_scale, x.reshape(-1, x.shape[-1]), out_dtype)

    return partial_sums(local, token_axes, 4)(d, x, x_scale, largest)


def _product(
    q: jax.Array, scale: jax.Array, right: jax.Array, out_dtype: jax.typing.DTypeLike
) -> jax.Array:
    """(q right) scale: int8 [M, K] by int8 [K, N], a float32 scale [M] for each row of q."""
    return ternary_matmul.ternary_matmul(
        q,
        scale[:, None],
        int8_triton.transpose(right),
        jnp.ones((1,), jnp.float32),
        out_dtype=out_dtype,
        implementation=_KERNEL,
    )
