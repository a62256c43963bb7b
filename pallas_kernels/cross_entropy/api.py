"""Linear layer and softmax cross-entropy without materialised logits: the public door.

The plain head computes x @ w^T; the ternary head computes Q8(x) @ (trits * w_scale)^T on
integers, with straight-through gradients to x and to the float master weights.
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from ..over_tokens import covers_mesh, total
from ..ternary_matmul.api import check_scale
from . import pallas_gpu, xla

__all__ = [
    "CrossEntropy",
    "linear_cross_entropy",
    "linear_cross_entropy_sum",
    "ternary_linear_cross_entropy",
    "ternary_linear_cross_entropy_sum",
]

_IMPLEMENTATIONS = {"xla": xla, "pallas_gpu": pallas_gpu}
# Devices where the kernels were measured to win: see `benchmark.py`.
_MEASURED = ("NVIDIA H100", "NVIDIA H200")


class CrossEntropy(NamedTuple):
    """Per-token results. The mean negative log-likelihood is that of loss - z_loss * lse^2.

    Attributes:
      loss_N: float32, lse - logit of the target + z_loss * lse^2; zero where the target is < 0.
      correct_N: bool, whether the target is the argmax (the first of equals).
      lse_N: float32, log of the sum of the exponentiated logits; differentiable too.
    """

    loss_N: jax.Array
    correct_N: jax.Array
    lse_N: jax.Array


def linear_cross_entropy(
    x_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = (),
    implementation: str | None = None,
) -> CrossEntropy:
    """Cross-entropy of logits = x @ w^T, with exact gradients to x and w.

    The products run in x's dtype and accumulate in float32; the loss is float32. The backward
    computes the logits anew; where only the sum of the losses is differentiated,
    `linear_cross_entropy_sum` saves that.

    Args:
      x_ND: activations, N tokens.
      w_VD: output embedding, one row for each of V words.
      targets_N: int, the words to predict; below zero means no loss and no gradient.
      z_loss: weight of lse^2 (0 for none).
      chunk_size: tokens whose logits exist at one time, on each device where token_axes are
        named and else over all devices; None for 256 MiB of float32 logits.
      token_axes: axes of the mesh that `jax.set_mesh` set over which the tokens are split. Each
        device then walks over its own tokens with the whole w, and the gradient of w is summed
        over devices once. With none named the compiler partitions the loop, which also allows w
        split over words, but sums the gradient of w once a chunk.
      implementation: "xla"; "pallas_gpu", on a Hopper; None for the best on this backend.

    Raises:
      ValueError: shapes disagree, or the implementation's name is unknown.
      TypeError: targets_N are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.cross_entropy.api import linear_cross_entropy
      >>> x, w = jnp.array([[1.0, 0.0], [0.0, 1.0]]), jnp.array([[9.0, 0.0], [0.0, 9.0]])
      >>> found = linear_cross_entropy(x, w, jnp.array([0, -1]))  # -1: no loss
      >>> [round(float(loss), 5) for loss in found.loss_N]
      [0.00012, 0.0]
    """
    how = _how(x_ND, w_VD, targets_N, z_loss, chunk_size, token_axes, implementation)
    return _cross_entropy(how, x_ND, w_VD, w_VD, None, targets_N.astype(jnp.int32))


def linear_cross_entropy_sum(
    x_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, CrossEntropy]:
    """The sum of `linear_cross_entropy`'s losses, its gradients computed along with it.

    Under differentiation the logits are computed once, not twice: a quarter of the head's
    operations. Only the sum is differentiable; the per-token results have their gradients
    stopped. Arguments and errors are those of `linear_cross_entropy`.
    """
    how = _how(x_ND, w_VD, targets_N, z_loss, chunk_size, token_axes, implementation)
    targets_N = targets_N.astype(jnp.int32)
    results: Any = _cross_entropy_sum(how, x_ND, w_VD, w_VD, None, targets_N)
    return results[0], jax.lax.stop_gradient(results[1])


def ternary_linear_cross_entropy(
    x_ND: jax.Array,
    w_VD: jax.Array,
    trits_VD: jax.Array,
    w_scale: jax.typing.ArrayLike,
    targets_N: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = (),
    implementation: str | None = None,
) -> CrossEntropy:
    """Cross-entropy of the ternary head, logits = Q8(x) @ (trits * w_scale)^T.

    x is quantised to int8 for each token, and the integer sums are exact. Straight through
    (arXiv 2406.02528, algorithm 1): dX = dlogits @ (trits * w_scale), dW = dlogits^T @ Q8(x).

    Args:
      x_ND: normalised activations, N tokens.
      w_VD: float master weights; never read, they only receive the gradient dW.
      trits_VD: int8 in {-1, 0, 1}, the ternarised w_VD.
      w_scale: one float32 number, so that w is about trits * w_scale; or [V, D / GROUP] of them.
      targets_N, z_loss, chunk_size, token_axes, implementation: as in `linear_cross_entropy`.

    Raises:
      ValueError: shapes disagree, or the implementation's name is unknown.
      TypeError: targets_N or trits_VD are not integers.
    """
    how = _how(x_ND, w_VD, targets_N, z_loss, chunk_size, token_axes, implementation)
    w_scale = _check_ternary(w_VD, trits_VD, w_scale)
    return _cross_entropy(how, x_ND, w_VD, trits_VD, w_scale, targets_N.astype(jnp.int32))


def ternary_linear_cross_entropy_sum(
    x_ND: jax.Array,
    w_VD: jax.Array,
    trits_VD: jax.Array,
    w_scale: jax.typing.ArrayLike,
    targets_N: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk_size: int | None = None,
    token_axes: Sequence[str] = (),
    implementation: str | None = None,
) -> tuple[jax.Array, CrossEntropy]:
    """The sum of `ternary_linear_cross_entropy`'s losses, its gradients computed along with it.

    As `linear_cross_entropy_sum` is to `linear_cross_entropy`.
    """
    how = _how(x_ND, w_VD, targets_N, z_loss, chunk_size, token_axes, implementation)
    w_scale = _check_ternary(w_VD, trits_VD, w_scale)
    targets_N = targets_N.astype(jnp.int32)
    results: Any = _cross_entropy_sum(how, x_ND, w_VD, trits_VD, w_scale, targets_N)
    return results[0], jax.lax.stop_gradient(results[1])


def _resolve(implementation: str | None, words: int, token_axes: Sequence[str]) -> str:
    if implementation is None:
        measured = jax.devices()[0].device_kind.startswith(_MEASURED)
        best = measured and covers_mesh(token_axes) and pallas_gpu.takes(words)
        return "pallas_gpu" if best else "xla"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose one of "
            f"{', '.join(sorted(_IMPLEMENTATIONS))} or None"
        )
    return implementation


def _how(
    x_ND: jax.Array,
    w_VD: jax.Array,
    targets_N: jax.Array,
    z_loss: float,
    chunk_size: int | None,
    token_axes: Sequence[str],
    implementation: str | None,
) -> "_How":
    """Checks what both heads share, and gathers the static part."""
    if x_ND.ndim != 2 or w_VD.ndim != 2 or x_ND.shape[1] != w_VD.shape[1] or 0 in x_ND.shape:
        raise ValueError(f"x_ND {x_ND.shape} and w_VD {w_VD.shape} must be [N, D] and [V, D]")
    if targets_N.shape != x_ND.shape[:1]:
        raise ValueError(f"targets_N has shape {targets_N.shape}; it must be {x_ND.shape[:1]}")
    if not jnp.issubdtype(targets_N.dtype, jnp.integer):
        raise TypeError(f"targets_N has dtype {targets_N.dtype}; it must be an integer type")
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")
    return _How(
        _resolve(implementation, len(w_VD), token_axes),
        float(z_loss),
        chunk_size,
        tuple(token_axes),
    )


def _check_ternary(
    w_VD: jax.Array, trits_VD: jax.Array, w_scale: jax.typing.ArrayLike
) -> jax.Array:
    """Checks the ternary weights; returns the scale as a float32 scalar."""
    if trits_VD.shape != w_VD.shape:
        raise ValueError(f"trits_VD {trits_VD.shape} must have the shape of w_VD {w_VD.shape}")
    if trits_VD.dtype != jnp.int8:
        raise TypeError(f"trits_VD has dtype {trits_VD.dtype}; it must be int8")
    w_scale = jnp.asarray(w_scale, jnp.float32)
    check_scale(w_scale, trits_VD)
    return w_scale if w_scale.size > 1 else w_scale.reshape(())


class _How(NamedTuple):
    """What the custom derivatives treat as static."""

    implementation: str
    z_loss: float
    chunk_size: int | None
    token_axes: tuple[str, ...]

    def call(self, name: str, *args: Any) -> Any:
        """A function of the implementation, on each device's own tokens where axes are named.

        Arrays that start with N tokens stay apart, and so do the weight gradients, [devices or
        1, V, D], for `total`.
        """
        function = functools.partial(
            getattr(_IMPLEMENTATIONS[self.implementation], name),
            z_loss=self.z_loss,
            chunk_size=self.chunk_size,
        )
        with_gradient = name != "forward"

        def local(*args: Any) -> Any:
            results = function(*args)
            return (*results[:-1], results[-1][None]) if with_gradient else results

        if not self.token_axes:
            return local(*args)
        tokens, whole = PartitionSpec(self.token_axes), PartitionSpec()
        # Operands are x, weights, scale, then per-token arrays.
        in_specs = (tokens, whole, None if args[2] is None else whole) + (tokens,) * len(args[3:])
        return jax.shard_map(local, in_specs=in_specs, out_specs=tokens, check_vma=False)(*args)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(
    how: _How,
    x_ND: jax.Array,
    w_VD: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
) -> CrossEntropy:
    del w_VD  # only its gradient matters
    return CrossEntropy(*how.call("forward", x_ND, weights_VD, w_scale, targets_N))


def _cross_entropy_forward(
    how: _How,
    x_ND: jax.Array,
    w_VD: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
) -> tuple[CrossEntropy, tuple[Any, ...]]:
    result = CrossEntropy(*how.call("forward", x_ND, weights_VD, w_scale, targets_N))
    return result, (x_ND, w_VD, weights_VD, w_scale, targets_N, result.lse_N)


def _cross_entropy_backward(how: _How, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    x_ND, w_VD, *operands = residuals
    dx_ND, dw_1VD = how.call("backward", x_ND, *operands, cotangents.loss_N, cotangents.lse_N)
    return dx_ND, total(dw_1VD.astype(w_VD.dtype)), None, None, None


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy_sum(
    how: _How,
    x_ND: jax.Array,
    w_VD: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
) -> tuple[jax.Array, CrossEntropy]:
    del w_VD
    result = CrossEntropy(*how.call("forward", x_ND, weights_VD, w_scale, targets_N))
    return jnp.sum(result.loss_N), result


def _cross_entropy_sum_forward(
    how: _How,
    x_ND: jax.Array,
    w_VD: jax.Array,
    weights_VD: jax.Array,
    w_scale: jax.Array | None,
    targets_N: jax.Array,
) -> tuple[tuple[jax.Array, CrossEntropy], tuple[jax.Array, ...]]:
    operands = x_ND, weights_VD, w_scale, targets_N
    *result, dx_ND, dw_1VD = how.call("forward_with_gradients", *operands)
    result = CrossEntropy(*result)
    return (jnp.sum(result.loss_N), result), (dx_ND, dw_1VD, w_VD)


def _cross_entropy_sum_backward(how: _How, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    dx_ND, dw_1VD, w_VD = residuals
    dtotal = cotangents[0]  # the per-token results come with their gradients stopped
    dx_ND = (dx_ND.astype(dtotal.dtype) * dtotal).astype(dx_ND.dtype)
    return dx_ND, total((dw_1VD * dtotal).astype(w_VD.dtype)), None, None, None


_cross_entropy_sum.defvjp(_cross_entropy_sum_forward, _cross_entropy_sum_backward)
