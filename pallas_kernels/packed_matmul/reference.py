"""The packed formats and their product in plain jnp: the definition and the oracle.

Both formats are planar. A row of K trits is padded with zeros to P planes of Q columns each;
byte k of the packed row holds column k of every plane, so unpacking needs no interleaving:

    2 bits    P = 4, Q = ceil(K / 4):  byte k = sum_j (t[j Q + k] + 1) 4^j
    1.6 bits  P = 5, Q = ceil(K / 5):  byte k = sum_j (t[j Q + k] + 1) 3^j   (at most 242)
"""

import jax
import jax.numpy as jnp

FORMATS = {"2": (4, 4), "1.6": (5, 3)}
"""Bits a weight, as the user names them -> (planes, base of the digits)."""


def packed_columns(columns: int, bits: str = "2") -> int:
    """Bytes of a packed row of `columns` trits."""
    planes, _ = FORMATS[bits]
    return -(-columns // planes)


def pack(trits: jax.Array, *, bits: str = "2") -> jax.Array:
    """Packs trits.

    Args:
      trits: [..., N, K] int8 in {-1, 0, +1}; values outside are not checked.
      bits: "2" or "1.6".

    Returns:
      [..., N, Q] uint8.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.packed_matmul.api import pack, unpack
      >>> trits = jnp.array([[1, -1, 0, 1]], jnp.int8)
      >>> packed = pack(trits)
      >>> packed.shape, packed.dtype
      ((1, 1), dtype('uint8'))
      >>> bool((unpack(packed, 4) == trits).all())
      True
    """
    planes, base = FORMATS[bits]
    columns = trits.shape[-1]
    size = packed_columns(columns, bits)
    padding = [(0, 0)] * (trits.ndim - 1) + [(0, planes * size - columns)]
    digits = (jnp.pad(trits, padding) + 1).astype(jnp.uint8)
    packed = jnp.zeros((*trits.shape[:-1], size), jnp.uint8)
    for plane in range(planes):
        packed += digits[..., plane * size : (plane + 1) * size] * jnp.uint8(base**plane)
    return packed


def planes_of(packed: jax.Array, *, bits: str = "2") -> list[jax.Array]:
    """The planes of a packed matrix as int32 trits, [..., N, Q] each."""
    digits = packed.astype(jnp.int32)
    if bits == "2":
        return [((digits >> (2 * plane)) & 3) - 1 for plane in range(4)]
    planes = []
    for _ in range(5):
        quotient = (digits * 171) >> 9  # digits // 3 for 0 <= digits <= 255
        planes.append(digits - 3 * quotient - 1)
        digits = quotient
    return planes


def unpack(packed: jax.Array, columns: int, *, bits: str = "2") -> jax.Array:
    """The exact trits that `pack` was given: [..., N, K] int8.

    Args:
      packed: [..., N, Q] uint8.
      columns: K.
      bits: "2" or "1.6".
    """
    planes = [plane.astype(jnp.int8) for plane in planes_of(packed, bits=bits)]
    return jnp.concatenate(planes, axis=-1)[..., :columns]


def packed_matmul(x_q: jax.Array, packed: jax.Array, *, bits: str = "2") -> jax.Array:
    """x_q @ trits^T in int32.

    Args:
      x_q: [M, K] int8.
      packed: [N, Q] uint8.
      bits: "2" or "1.6".

    Returns:
      [M, N] int32, exact.
    """
    trits = unpack(packed, x_q.shape[-1], bits=bits)
    return jnp.matmul(x_q.astype(jnp.int32), trits.astype(jnp.int32).T)
