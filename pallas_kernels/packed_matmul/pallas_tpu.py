"""The packed product on a TPU: planes unpacked in vector memory, products on the MXU.

Bits are taken apart in int32, the only width in which every TPU shifts; the planes of x are
split beforehand, so that a tile of packed bytes meets the same columns of all four.
"""

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import tpu as pltpu

from ..refs import Ref

_TILE_M, _TILE_N, _TILE_K = 128, 256, 512


def packed_matmul(x_q: jax.Array, packed: jax.Array, *, interpret: bool = False) -> jax.Array:
    """x_q @ trits^T: [M, K] int8 and [N, Q] uint8 at 2 bits -> [M, N] int32."""
    m, columns = x_q.shape
    n, size = packed.shape
    # Tiles of int8 are 32 x 128. Zero columns of x make the padding of the weights harmless.
    tile_m = min(_TILE_M, _round_up(m, 32))
    tile_n = min(_TILE_N, _round_up(n, 128))
    tile_k = min(_TILE_K, _round_up(size, 128))
    up_m, up_n, up_k = _round_up(m, tile_m), _round_up(n, tile_n), _round_up(size, tile_k)
    x_q = jnp.pad(x_q, ((0, 0), (0, 4 * size - columns))).reshape(m, 4, size).swapaxes(0, 1)
    x_q = jnp.pad(x_q, ((0, 0), (0, up_m - m), (0, up_k - size)))
    packed = jnp.pad(packed, ((0, up_n - n), (0, up_k - size)))
    out = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((up_m, up_n), jnp.int32),
        grid=(up_m // tile_m, up_n // tile_n, up_k // tile_k),
        in_specs=[
            pl.BlockSpec((4, tile_m, tile_k), lambda i, j, k: (0, i, k)),
            pl.BlockSpec((tile_n, tile_k), lambda i, j, k: (j, k)),
        ],
        out_specs=pl.BlockSpec((tile_m, tile_n), lambda i, j, k: (i, j)),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary")
        ),
        interpret=interpret,
        name="packed_matmul",
    )(x_q, packed)
    return out[:m, :n]


def _kernel(x_ref: Ref, w_ref: Ref, out_ref: Ref) -> None:
    @pl.when(pl.program_id(2) == 0)
    def _() -> None:
        out_ref[...] = jnp.zeros_like(out_ref)

    packed = w_ref[...].astype(jnp.int32)
    for plane in range(4):
        trits = (((packed >> (2 * plane)) & 3) - 1).astype(jnp.int8)
        out_ref[...] += lax.dot_general(
            x_ref[plane], trits, (((1,), (1,)), ((), ())), preferred_element_type=jnp.int32
        )


def _round_up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
