"""The layout in which kernels read 2-bit weights: four bytes of the packed row in one int32.

A row of K columns is padded to a multiple of 16, so that each plane is whole words: word w of
a row holds columns jQ + 4w ... jQ + 4w + 3 of every plane j, and (word >> 2j) & 0x03030303 is
four trits (plus one) side by side, as the instruction dp4a wants them. Where 16 divides K this
is the packed format itself, read as int32.
"""

import jax
import jax.numpy as jnp

from . import reference


def plane_columns(columns: int) -> int:
    """Columns of one plane, Q: a quarter of K rounded up to a multiple of 16."""
    return 4 * -(-columns // 16)


def to_words(packed: jax.Array, columns: int) -> jax.Array:
    """[..., N, ceil(K / 4)] uint8 at 2 bits -> [..., N, Q / 4] int32."""
    size = plane_columns(columns)
    if packed.shape[-1] != size:
        trits = reference.unpack(packed, columns)
        padding = [(0, 0)] * (trits.ndim - 1) + [(0, 4 * size - columns)]
        packed = reference.pack(jnp.pad(trits, padding))
    return jax.lax.bitcast_convert_type(packed.reshape(*packed.shape[:-1], size // 4, 4), jnp.int32)


def from_words(words: jax.Array) -> jax.Array:
    """[..., N, Q / 4] int32 -> [..., N, Q] uint8 at 2 bits, for `reference.unpack`."""
    packed = jax.lax.bitcast_convert_type(words, jnp.uint8)
    return packed.reshape(*words.shape[:-1], 4 * words.shape[-1])
