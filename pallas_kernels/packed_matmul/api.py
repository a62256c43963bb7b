"""Packed ternary matrices: packing, unpacking and their product. The public door.

`packed_matmul` is the op. GPU programs that keep matrices stacked over layers call its kernels
with the layer's number instead: `quantize_rows`, then `scaled_matmul` for some hundred rows, or
`unpack_many` and the product of `ternary_matmul` for more. A token through all layers is
`pallas_kernels/decode`.
"""

import functools

import jax
import jax.numpy as jnp

from .. import triton
from . import pallas_gpu, pallas_tpu, reference, xla
from .linears import Linears
from .pallas_gpu import scaled_matmul, unpack_many
from .reference import FORMATS, pack, packed_columns, unpack
from .rows_gpu import quantize_rows
from .words import from_words, plane_columns, to_words

__all__ = [
    "FORMATS",
    "IMPLEMENTATIONS",
    "Linears",
    "from_words",
    "kernels_serve",
    "pack",
    "packed_columns",
    "packed_matmul",
    "plane_columns",
    "quantize_rows",
    "scaled_matmul",
    "to_words",
    "unpack",
    "unpack_many",
]

IMPLEMENTATIONS = ("xla", "pallas_gpu", "pallas_tpu")
"""Names that `implementation` takes."""


def kernels_serve() -> bool:
    """Whether the kernels for stacked matrices run here: on GPUs that Pallas-Triton serves."""
    return jax.default_backend() == "gpu" and triton.serves()


def packed_matmul(
    x_q: jax.Array,
    packed: jax.Array,
    *,
    bits: str = "2",
    implementation: str | None = None,
    interpret: bool = False,
) -> jax.Array:
    """x_q @ trits^T, exactly.

    Args:
      x_q: [..., K] int8 activations.
      packed: [N, ceil(K / 4)] uint8 at 2 bits, or [N, ceil(K / 5)] at 1.6: `pack(trits)`.
      bits: a weight, "2" or "1.6"; the kernels take "2".
      implementation: one of `IMPLEMENTATIONS`; None: "xla".
      interpret: run a kernel as a JAX program, to check it without its device.

    Returns:
      [..., N] int32.

    Raises:
      TypeError: an operand's dtype.
      ValueError: shapes that do not fit, an unknown implementation, or bits it does not take.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.packed_matmul.api import pack, packed_matmul
      >>> trits = jnp.array([[1, -1, 0, 1], [0, 0, -1, 1]], jnp.int8)
      >>> packed_matmul(jnp.array([[5, 7, 1, -2]], jnp.int8), pack(trits))
      Array([[-4, -3]], dtype=int32)
    """
    if x_q.dtype != jnp.int8 or packed.dtype != jnp.uint8:
        raise TypeError(f"x_q must be int8 and packed uint8, got {x_q.dtype} and {packed.dtype}")
    if bits not in reference.FORMATS:
        raise ValueError(f"bits={bits!r} is unknown: choose one of {tuple(reference.FORMATS)}")
    size = reference.packed_columns(x_q.shape[-1], bits)
    if packed.ndim != 2 or packed.shape[1] != size:
        raise ValueError(
            f"packed must be [N, {size}] for x_q {x_q.shape} at {bits} bits, got {packed.shape}"
        )
    implementation = implementation or "xla"
    if implementation == "xla":
        return xla.packed_matmul(x_q, packed, bits=bits)
    kernels = {"pallas_gpu": pallas_gpu.packed_matmul, "pallas_tpu": pallas_tpu.packed_matmul}
    if implementation not in kernels:
        raise ValueError(
            f"implementation={implementation!r} is unknown: choose one of {IMPLEMENTATIONS}"
        )
    if bits != "2":
        raise ValueError(f"implementation={implementation!r} takes bits='2', got {bits!r}")
    kernel = functools.partial(kernels[implementation], interpret=interpret)
    out = kernel(x_q.reshape(-1, x_q.shape[-1]), packed)
    return out.reshape(*x_q.shape[:-1], packed.shape[0])
