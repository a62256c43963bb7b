"""The head on NVIDIA GPUs: `xla`'s chunks, with kernels for the logits and for their rows.

The logits of the ternary head come from the op `ternary_matmul`. One program of the kernel here
then takes one token's row of logits: it reads it once from memory for the loss, and once more,
by then from the cache, to write the gradient.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax import lax

from .. import triton as pltriton
from ..refs import Ref
from ..ternary_matmul.api import ternary_matmul
from . import xla

_BLOCK = 4096  # Columns at a time; a row in one piece would leave no registers for a second row.
_LEAST = -1e30  # Below any logit, and finite: differences of it are no NaN.


def forward(*args: Any, interpret: bool = False, **options: Any) -> tuple[jax.Array, ...]:
    """See `xla.forward`."""
    return xla.forward(*args, **options, **_kernels(interpret))


def forward_with_gradients(
    *args: Any, interpret: bool = False, **options: Any
) -> tuple[jax.Array, ...]:
    """See `xla.forward_with_gradients`."""
    return xla.forward_with_gradients(*args, **options, **_kernels(interpret))


backward = xla.backward


def _kernels(interpret: bool) -> dict[str, Callable[..., Any]]:
    return {"logits": _logits, "rows": functools.partial(softmax_rows, interpret=interpret)}


def _logits(
    left_PD: jax.Array, scale_P1: jax.Array, weights_VD: jax.Array, w_scale: jax.Array | None
) -> jax.Array:
    if w_scale is None:
        return xla._logits(left_PD, scale_P1, weights_VD, w_scale)
    return ternary_matmul(
        left_PD, scale_P1, weights_VD, jnp.atleast_2d(w_scale), out_dtype=jnp.float32
    )


def softmax_rows(
    logits_PV: jax.Array,
    targets_P: jax.Array,
    z_loss: float,
    dtype: jax.typing.DTypeLike | None,
    *,
    interpret: bool = False,
) -> tuple[jax.Array, ...]:
    """Cross-entropy of rows of logits and the gradient of its sum.

    Args:
      logits_PV: float32.
      targets_P: int32 columns; below zero means no loss and no gradient.
      z_loss: weight of lse^2.
      dtype: of the gradient; None leaves it out.
      interpret: run the kernel as a JAX program.

    Returns:
      loss_P, correct_P (bool), lse_P, and the gradient [P, V].
    """
    P, V = logits_PV.shape
    scalar = jax.ShapeDtypeStruct((P,), jnp.float32)
    loss_P, correct_P, lse_P, *gradient = pl.pallas_call(
        functools.partial(_kernel, z_loss=z_loss, block=min(_BLOCK, pl.next_power_of_2(V))),
        out_shape=[
            scalar,
            jax.ShapeDtypeStruct((P,), jnp.int32),
            scalar,
            *([] if dtype is None else [jax.ShapeDtypeStruct((P, V), dtype)]),
        ],
        grid=(P,),
        compiler_params=pltriton.CompilerParams(num_warps=8, num_stages=1),
        interpret=interpret,
        name="softmax_rows",
    )(logits_PV, targets_P)
    return loss_P, correct_P != 0, lse_P, *gradient


def _kernel(
    logits_ref: Ref,
    target_ref: Ref,
    loss_ref: Ref,
    correct_ref: Ref,
    lse_ref: Ref,
    *gradient_refs: Ref,
    z_loss: float,
    block: int,
) -> None:
    row, V = pl.program_id(0), logits_ref.shape[1]
    lane = jnp.arange(block)
    blocks = pl.cdiv(V, block)

    def at(ref: Ref, i: Any) -> Ref:
        # By numbers of columns: a slice must not end beyond the array, masked or not.
        return ref.at[row, i * block + lane]

    def inside(i: Any) -> jax.Array | None:
        return None if V % block == 0 else i * block + lane < V

    def load(i: Any) -> jax.Array:
        mask = inside(i)
        return pltriton.load(at(logits_ref, i), mask=mask, other=None if mask is None else _LEAST)

    def accumulate(i: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        # For each lane its largest value, where it stood, and the sum of exponentials below it.
        largest, where, total = carry
        x = load(i)
        ratio = jnp.exp(-jnp.abs(x - largest))
        grows = x > largest
        total = jnp.where(grows, total * ratio + 1.0, total + ratio)
        return jnp.where(grows, x, largest), jnp.where(grows, i, where), total

    zeros = jnp.zeros((block,), jnp.float32)
    init = (jnp.full((block,), _LEAST, jnp.float32), jnp.zeros((block,), jnp.int32), zeros)
    largest, where, total = lax.fori_loop(0, blocks, accumulate, init)
    maximum = jnp.max(largest)  # No NaN is larger than anything: it shows in the total alone.
    lse = jnp.log(jnp.sum(total * jnp.exp(largest - maximum))) + maximum
    argmax = jnp.min(jnp.where(largest == maximum, where * block + lane, V))
    target = pltriton.load(target_ref.at[row])
    valid = target >= 0
    of_target = pltriton.load(logits_ref.at[row, jnp.maximum(target, 0)])
    loss = jnp.where(valid, lse - of_target + z_loss * lse * lse, 0.0)
    pltriton.store(loss_ref.at[row], loss)
    pltriton.store(
        correct_ref.at[row], (valid & (argmax == target) & (lse == lse)).astype(jnp.int32)
    )
    pltriton.store(lse_ref.at[row], lse)

    for gradient_ref in gradient_refs:
        weight = 1.0 + 2.0 * z_loss * lse

        def differentiate(
            i: jax.Array, carry: Any, gradient_ref: Ref = gradient_ref, weight: jax.Array = weight
        ) -> Any:
            one = jnp.where(i * block + lane == target, 1.0, 0.0)
            gradient = jnp.where(valid, jnp.exp(load(i) - lse) * weight - one, 0.0)
            gradient = gradient.astype(gradient_ref.dtype)
            pltriton.store(at(gradient_ref, i), gradient, mask=inside(i))
            return carry

        lax.fori_loop(0, blocks, differentiate, 0)
