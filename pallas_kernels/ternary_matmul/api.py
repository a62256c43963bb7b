"""The product of int8 activations with a ternary matrix: the public door."""

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from ..capability import compute_capability
from ..dispatch import measured_best
from ..errors import KernelError
from ..over_tokens import TOKENS, WHOLE, covers_mesh, over_tokens
from . import (
    pallas_mosaic_gpu,
    pallas_tpu,
    pallas_triton,
    reference,
    xla,
)
from .reference import GROUP, scaled, ternarize_groups

__all__ = [
    "GROUP",
    "IMPLEMENTATIONS",
    "MAX_INT8_COLUMNS",
    "available_implementations",
    "check_scale",
    "default_implementation",
    "gated_ternary_matmul",
    "mosaic_config",
    "mosaic_gated_config",
    "scaled",
    "ternarize",
    "ternarize_groups",
    "ternary_matmul",
]

IMPLEMENTATIONS = (*xla.OPERAND_DTYPES, "pallas_mosaic_gpu", "pallas_triton", "pallas_tpu")
"""Names that `implementation` takes."""
MAX_INT8_COLUMNS = 2**31 // 128**2 - 1
"""Products of int8 values that an int32 sum can hold, whatever they are."""
# Tiles from which a Hopper's 132 multiprocessors count as busy. With fewer, part of the chip
# idles, and nobody has measured who wins.
_FULL_CHIP = 128


def available_implementations(backend: str | None = None) -> tuple[str, ...]:
    """The implementations that run on a backend."""
    kernels = {"gpu": ("pallas_mosaic_gpu", "pallas_triton"), "tpu": ("pallas_tpu",)}
    return (*xla.OPERAND_DTYPES, *kernels.get(backend or jax.default_backend(), ()))


def default_implementation(
    m: int,
    n: int,
    k: int,
    *,
    device_kind: str | None = None,
    token_axes: Sequence[str] = (),
) -> str:
    """What `implementation=None` means for a shape on a device, by default the first one.

    The measured winner of the nearest shape; of the Mosaic GPU kernel only where its tiles
    divide the matrix and fill the chip. XLA's int8 product everywhere else.
    """
    kind = device_kind or jax.devices()[0].device_kind
    best = measured_best("ternary_matmul", (m, n, k), dtype="int8", device_kind=kind)
    fits = _fills_the_chip(mosaic_config(m, n, k), m, n, k)
    if best == "pallas_mosaic_gpu" and not fits:
        best = None
    return best if best is not None and covers_mesh(token_axes) else "xla_int8"


def _fills_the_chip(config: pallas_mosaic_gpu.Config, m: int, n: int, k: int) -> bool:
    """Whether the tiles divide the matrix, and are enough for a Hopper."""
    tiles = (m // config.tile_m) * (n // config.tile_n)
    return tiles >= _FULL_CHIP and n % config.block[1] == 0 and k % config.block[2] == 0


def ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
    token_axes: Sequence[str] = (),
    interpret: bool = False,
) -> jax.Array:
    """(x_q @ trits^T) * x_scale * w_scale; the integer sums are exact.

    Not differentiable: the op `bitlinear` is.

    Args:
      x_q: [..., K] int8 activations.
      x_scale: [..., 1] float32, one scale a token.
      trits: [N, K] int8 in {-1, 0, +1}.
      w_scale: float32 with one element; or [N, K / GROUP], one for each GROUP inputs of each
        output, which XLA's implementations take.
      out_dtype: dtype of the result.
      implementation: one of `IMPLEMENTATIONS`; None takes the measured best.
      token_axes: mesh axes over which x_q's leading axis is split, for the Pallas kernels.
      interpret: run the kernel as a JAX program, to check it without its device.

    Returns:
      [..., N] of out_dtype.

    Raises:
      TypeError: an operand that is not int8.
      ValueError: shapes that do not fit, or an unknown implementation.
      KernelError: a kernel that cannot be compiled for this device.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.ternary_matmul.api import ternary_matmul
      >>> x_q, x_scale = jnp.array([[100, -50]], jnp.int8), jnp.array([[0.01]])
      >>> trits, w_scale = jnp.array([[1, 0], [-1, 1]], jnp.int8), jnp.array([[2.0]])
      >>> ternary_matmul(x_q, x_scale, trits, w_scale)
      Array([[ 2., -3.]], dtype=float32)
    """
    for name, operand in (("x_q", x_q), ("trits", trits)):
        if operand.dtype != jnp.int8:
            raise TypeError(f"{name} must be int8, got {operand.dtype}: quantise it first")
    if trits.ndim != 2 or x_q.shape[-1:] != trits.shape[1:]:
        raise ValueError(
            f"x_q [..., K] and trits [N, K] do not fit: got {x_q.shape} and {trits.shape}"
        )
    if x_scale.shape != (*x_q.shape[:-1], 1):
        raise ValueError(f"x_scale must be {(*x_q.shape[:-1], 1)}, got {x_scale.shape}")
    check_scale(w_scale, trits)
    m = math.prod(x_q.shape[:-1])
    n, k = trits.shape
    if w_scale.size > 1 and implementation is None:
        implementation = "xla_int8"
    implementation = implementation or default_implementation(m, n, k, token_axes=token_axes)
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown: choose one of {IMPLEMENTATIONS}"
        )
    if w_scale.size > 1 and implementation not in xla.OPERAND_DTYPES:
        raise ValueError(
            f"implementation={implementation!r} takes one scale a matrix, got {w_scale.shape}: "
            f"choose one of {tuple(xla.OPERAND_DTYPES)}"
        )
    if implementation in xla.OPERAND_DTYPES:
        return xla.ternary_matmul(
            x_q, x_scale, trits, w_scale, out_dtype=out_dtype, implementation=implementation
        )

    def local(
        x_q: jax.Array, x_scale: jax.Array, trits: jax.Array, w_scale: jax.Array
    ) -> tuple[jax.Array]:
        leading = x_q.shape[:-1]
        out = _KERNELS[implementation](
            x_q.reshape(-1, k), x_scale.reshape(-1), trits,
            w_scale.astype(jnp.float32).reshape(1), jnp.dtype(out_dtype), interpret,
        )  # fmt: skip
        return (out.reshape(*leading, n),)

    split = over_tokens(local, token_axes, (TOKENS, TOKENS, WHOLE, WHOLE), (TOKENS,))
    return split(x_q, x_scale, trits, w_scale)[0]


def gated_ternary_matmul(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    *,
    out_dtype: jax.typing.DTypeLike = jnp.float32,
    implementation: str | None = None,
) -> jax.Array:
    """silu(gate) * up of the two halves of `ternary_matmul`'s result, which is cast first.

    Where that takes the Mosaic GPU kernel by default, the halves never reach memory.

    Args:
      x_q, x_scale, w_scale, out_dtype, implementation: as in `ternary_matmul`.
      trits: [2N, K] int8 in {-1, 0, +1}; the gate's rows come first.

    Returns:
      [..., N] of out_dtype.

    Raises:
      TypeError, ValueError, KernelError: as in `ternary_matmul`.
    """
    m, n, k = math.prod(x_q.shape[:-1]), trits.shape[0] // 2, trits.shape[1]
    config = mosaic_gated_config(m, n, k)
    fused = (
        (implementation or default_implementation(m, 2 * n, k)) == "pallas_mosaic_gpu"
        and trits.shape[0] % 2 == 0
        and _fills_the_chip(config, m, n, k)
    )
    if not fused:
        y = ternary_matmul(
            x_q, x_scale, trits, w_scale, out_dtype=out_dtype, implementation=implementation
        )
        gate, up = jnp.split(y.astype(jnp.float32), 2, axis=-1)
        return (jax.nn.silu(gate) * up).astype(out_dtype)
    out = _mosaic_gpu(
        x_q.reshape(-1, k), x_scale.reshape(-1), trits,
        w_scale.astype(jnp.float32).reshape(1), jnp.dtype(out_dtype), False, gated=config,
    )  # fmt: skip
    return out.reshape(*x_q.shape[:-1], n)


def ternarize(w: jax.Array, log_factor: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
    """`reference.ternarize`: trits and one scale a matrix, from float weights [..., N, K].

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize
      >>> trits, scale = ternarize(jnp.array([[0.5, -2.0], [1.5, 0.0]]))
      >>> trits
      Array([[ 0, -1],
             [ 1,  0]], dtype=int8)
      >>> scale
      Array([[1.]], dtype=float32)
    """
    return reference.ternarize(w, log_factor)


def check_scale(w_scale: jax.Array, trits: jax.Array) -> None:
    """Refuses scales that are not one a matrix and not one a group of its inputs.

    Raises:
      ValueError: their shape does not fit the trits [N, K].
    """
    n, k = trits.shape
    if w_scale.size != 1 and (k % GROUP or w_scale.shape != (n, k // GROUP)):
        raise ValueError(
            f"w_scale must hold one element, or be [N, K / {GROUP}] for trits {trits.shape}, got "
            f"shape {w_scale.shape}"
        )


def mosaic_config(m: int, n: int, k: int) -> pallas_mosaic_gpu.Config:
    """The tiles for a shape: those measured for its (N, K) at the nearest M, else the default."""
    return pallas_mosaic_gpu.Config(**_measured_at(m).get(f"{n}x{k}", {}))


def mosaic_gated_config(m: int, n: int, k: int) -> pallas_mosaic_gpu.Config:
    """`mosaic_config` of the gated product of x_q [M, K] with trits [2N, K]."""
    return pallas_mosaic_gpu.Config(**_measured_at(m).get(f"{n}x{k} gated", {"tile_n": 128}))


def _measured_at(m: int) -> dict[str, dict]:
    measured = _measured_configs()
    return measured[min(measured, key=lambda tokens: abs(math.log(tokens / m)))]


@functools.cache
def _measured_configs() -> dict[int, dict[str, dict]]:
    """M -> (N x K) -> tiles; made by `benchmark.py tune M` beside this."""
    table = json.loads(Path(__file__).with_name("mosaic_configs.json").read_text())
    return {int(m): tiles for m, tiles in table.items()}


def _mosaic_gpu(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: bool,
    gated: pallas_mosaic_gpu.Config | None = None,
) -> jax.Array:
    """`gated` holds the tiles of the gated product, which must divide N and K."""
    if interpret:
        raise ValueError("pallas_mosaic_gpu has no interpreter that runs it on every jax version")
    if compute_capability() not in (None, 9.0):
        raise KernelError(
            "pallas_mosaic_gpu multiplies by instructions that only GPUs of compute capability 9.0 "
            f"have, which {jax.devices()[0].device_kind} is not: leave the kernel's name out"
        )
    (m, k), n = x_q.shape, trits.shape[0]
    config = gated or mosaic_config(m, n, k)
    if out_dtype.itemsize > 2:  # the same bytes for each store
        config = dataclasses.replace(config, store_n=config.store_n // 2)
    # Zero rows and columns change no sum; the model's shapes need none.
    up = [-size % block for size, block in zip((m, n, k), config.block, strict=True)]
    x_q = _pad(x_q, up[0], up[2])
    trits = _pad(trits, up[1], up[2])
    x_scale = jnp.pad(x_scale, (0, up[0])) if up[0] else x_scale
    out = pallas_mosaic_gpu.ternary_matmul(
        x_q, x_scale, trits, w_scale, out_dtype=out_dtype, config=config,
        multiprocessors=_multiprocessors(), gated=gated is not None,
    )  # fmt: skip
    return out[:m, :n] if up[0] or up[1] else out  # Gated, up[1] is 0.


def _triton(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    m, n = x_q.shape[0], trits.shape[0]
    # Small outputs take small tiles, so that more programs share the work.
    tile_m, tile_n = (max(16, min(128, pl.next_power_of_2(size))) for size in (m, n))
    config = pallas_triton.Config(tile_m=tile_m, tile_n=tile_n)
    return pallas_triton.ternary_matmul(
        x_q, x_scale, trits, w_scale, out_dtype=out_dtype, config=config, interpret=interpret
    )


def _tpu(
    x_q: jax.Array,
    x_scale: jax.Array,
    trits: jax.Array,
    w_scale: jax.Array,
    out_dtype: jnp.dtype,
    interpret: bool,
) -> jax.Array:
    return pallas_tpu.ternary_matmul(
        x_q, x_scale[:, None], trits, w_scale[:, None], out_dtype=out_dtype, interpret=interpret
    )


_KERNELS = {"pallas_mosaic_gpu": _mosaic_gpu, "pallas_triton": _triton, "pallas_tpu": _tpu}


def _pad(a: jax.Array, rows: int, columns: int) -> jax.Array:
    return jnp.pad(a, ((0, rows), (0, columns))) if rows or columns else a


def _multiprocessors() -> int:
    """Of the device that is lowered for, or of the first one; an H100's where there is none."""
    abstract = jax.sharding.get_abstract_mesh().abstract_device
    if abstract is not None and abstract.num_cores:
        return abstract.num_cores
    return getattr(jax.devices()[0], "core_count", None) or 132
