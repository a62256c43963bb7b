"""Gated linear recurrence h_t = f_t h_{t-1} + x_t: the public door.

`implementation=None` takes the fastest that works here; a name takes exactly that one, or fails.

On a mesh, give `partition`: the Pallas kernels then run on each device's part, and a sequence may
be split over devices. Without it, sharded inputs are left to the XLA implementation, which the
compiler partitions.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from ..dispatch import measured_best
from . import pallas_gpu, pallas_tpu, sharded, xla
from .gates import gate_values

__all__ = [
    "linear_recurrence",
    "mlgru_recurrence",
]

_IMPLEMENTATIONS: dict[str, Any] = {
    "xla": xla,
    "pallas_gpu": pallas_gpu,
    "pallas_tpu": pallas_tpu,
}

_OPEN = 1e4  # a forget projection whose sigmoid is 1 in every float type


def linear_recurrence(
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    *,
    reset_BT: jax.Array | None = None,
    h0_BD: jax.Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    partition: PartitionSpec | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = f_t h_{t-1} + x_t with a float32 carry (arXiv 2406.02528, section 3.3.1).

    Differentiable in f, x and h0 for cotangents of both outputs; the backward is the reversed
    recurrence and keeps f, h, h0 and the resets.

    Args:
      f_BTD: forget gates, any float dtype.
      x_BTD: inputs of the recurrence, any float dtype.
      reset_BT: bool; where true the state carried into that step is dropped (h0 too at t = 0).
      h0_BD: the state before the first step; zeros when None.
      mesh: devices to run on, each on its part; the one that `jax.set_mesh` set when None.
      partition: mesh axes of batch, time and channels. A time axis splits the sequence. None
        leaves the partitioning to the compiler.
      implementation: "xla", "pallas_gpu", "pallas_tpu", or None for the best here.

    Returns:
      h_BTD in x's dtype, the state after every step, and h_last_BD in float32 (float64 for
      float64 inputs), the state after the last one.

    Raises:
      ValueError: shapes disagree, the implementation's name is unknown, or mesh and partition
        do not fit.
      TypeError: reset_BT is not boolean.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.recurrence.api import linear_recurrence
      >>> half, x = jnp.full((1, 3, 1), 0.5), jnp.array([[[8.0], [0.0], [1.0]]])
      >>> states, last = linear_recurrence(half, x)
      >>> states.ravel().tolist(), last.tolist()
      ([8.0, 4.0, 3.0], [[3.0]])
      >>> states, _ = linear_recurrence(half, x, reset_BT=jnp.array([[False, True, False]]))
      >>> states.ravel().tolist()
      [8.0, 0.0, 1.0]
    """
    _check("x_BTD", f_BTD, x_BTD, reset_BT, h0_BD)
    mesh = _mesh_for(mesh, partition, x_BTD.shape)
    how = _How(_resolve(implementation, x_BTD, mesh, partition), mesh, partition)
    return _linear(how, f_BTD, x_BTD, reset_BT, h0_BD)


def mlgru_recurrence(
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None = None,
    *,
    reset_BT: jax.Array | None = None,
    h0_BD: jax.Array | None = None,
    padding_BT: jax.Array | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    partition: PartitionSpec | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """The MLGRU's gates and recurrence in one: from the projections i and f to the states.

    F = lb + (1 - lb) sigmoid(f), h_t = F_t h_{t-1} + (1 - F_t) silu(i_t) (arXiv 2406.02528,
    section 3.3.1, in the form of the released models). The gates live in registers and in
    float32; the backward computes them anew from i and f and keeps, beside those, only h.

    Args:
      i_BTD: candidate projection, any float dtype.
      f_BTD: forget projection, any float dtype.
      lower_bound_D: float32 lower bound of the forget gate, in [0, 1); None for none.
      padding_BT: bool; where true the state is held and the inputs are ignored.
      reset_BT, h0_BD, mesh, partition, implementation: as in `linear_recurrence`.

    Returns:
      h_BTD in i's dtype and h_last_BD in float32; differentiable in i, f, lower_bound and h0.

    Raises:
      ValueError, TypeError: as in `linear_recurrence`.

    Example:
      >>> import jax.numpy as jnp
      >>> from mmfree_jax.pallas_kernels.recurrence.api import mlgru_recurrence
      >>> i, f = jnp.ones((2, 5, 4)), jnp.zeros((2, 5, 4))
      >>> states, last = mlgru_recurrence(i, f, lower_bound_D=jnp.full(4, 0.1))
      >>> states.shape, last.shape
      ((2, 5, 4), (2, 4))
    """
    _check("i_BTD", f_BTD, i_BTD, reset_BT, h0_BD)
    _check_mask("padding_BT", padding_BT, i_BTD.shape)
    if lower_bound_D is not None and lower_bound_D.shape != i_BTD.shape[2:]:
        raise ValueError(
            f"lower_bound_D has shape {lower_bound_D.shape}; it must be {i_BTD.shape[2:]}"
        )
    mesh = _mesh_for(mesh, partition, i_BTD.shape)
    how = _How(_resolve(implementation, i_BTD, mesh, partition), mesh, partition)
    if padding_BT is not None and not how.takes_held:
        f_BTD, padding_BT = _held_open(f_BTD, padding_BT), None
    return _mlgru(how, i_BTD, f_BTD, lower_bound_D, reset_BT, h0_BD, padding_BT)


def _held_open(f_BTD: jax.Array, padding_BT: jax.Array) -> jax.Array:
    """A gate fully open keeps the state, and closes the input."""
    return jnp.where(padding_BT[..., None], jnp.asarray(_OPEN, f_BTD.dtype), f_BTD)


class _How(NamedTuple):
    """What the custom derivative treats as static."""

    implementation: str
    mesh: Mesh | AbstractMesh | None
    partition: PartitionSpec | None

    @property
    def module(self) -> Any:
        return _IMPLEMENTATIONS[self.implementation]

    @property
    def takes_held(self) -> bool:
        """Whether the implementation itself holds the state on padding."""
        return self.mesh is None and getattr(self.module, "TAKES_HELD", False)


def _resolve(
    implementation: str | None,
    x_BTD: jax.Array,
    mesh: Mesh | AbstractMesh | None,
    partition: PartitionSpec | None,
) -> str:
    if implementation is None:
        kind, dtype = jax.devices()[0].device_kind, x_BTD.dtype.name
        best = measured_best("recurrence", x_BTD.shape, device_kind=kind, dtype=dtype) or "xla"
        # A kernel does not see how its inputs are sharded: without a partition it runs only
        # where there is nothing to shard over. One step is one multiply-add, which XLA fuses.
        ambient = jax.sharding.get_abstract_mesh()
        alone = jax.device_count() == 1 or (not ambient.empty and ambient.size == 1)
        worthwhile = x_BTD.shape[1] > 1 and x_BTD.dtype != jnp.float64
        if best == "pallas_gpu":
            worthwhile &= _channels_of_a_part(x_BTD, mesh, partition) % pallas_gpu.CHANNELS == 0
        return best if worthwhile and (alone or partition is not None) else "xla"
    if implementation not in _IMPLEMENTATIONS:
        raise ValueError(
            f"implementation={implementation!r} is unknown; choose one of "
            f"{', '.join(sorted(_IMPLEMENTATIONS))} or None"
        )
    return implementation


def _channels_of_a_part(
    x_BTD: jax.Array, mesh: Mesh | AbstractMesh | None, partition: PartitionSpec | None
) -> int:
    """How many channels each device has."""
    if mesh is None or partition is None:
        return x_BTD.shape[2]
    return x_BTD.shape[2] // sharded.size_of(mesh, sharded.axes_of(partition)[2])


def _mesh_for(
    mesh: Mesh | AbstractMesh | None, partition: PartitionSpec | None, shape: tuple[int, ...]
) -> Mesh | AbstractMesh | None:
    """The mesh to shard over, or None where the compiler partitions."""
    if partition is None:
        if mesh is not None:
            raise ValueError(f"partition=None with mesh={mesh}; name the axes of [B, T, D]")
        return None
    mesh = mesh or jax.sharding.get_abstract_mesh()
    if mesh.empty:
        raise ValueError(f"partition={partition} needs a mesh: pass mesh= or use jax.set_mesh")
    for axes, size in zip(sharded.axes_of(partition), shape, strict=True):
        parts = sharded.size_of(mesh, axes)
        if size % parts:
            raise ValueError(
                f"partition={partition} splits [B, T, D] = {shape} unevenly: "
                f"{size} over {parts} devices of {axes!r}"
            )
    return mesh


def _check(
    name: str,
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
) -> None:
    if x_BTD.ndim != 3 or f_BTD.shape != x_BTD.shape or 0 in x_BTD.shape:
        raise ValueError(
            f"f_BTD {f_BTD.shape} and {name} {x_BTD.shape} must have the same non-empty "
            "[B, T, D] shape"
        )
    B, _, D = x_BTD.shape
    _check_mask("reset_BT", reset_BT, x_BTD.shape)
    if h0_BD is not None and h0_BD.shape != (B, D):
        raise ValueError(f"h0_BD has shape {h0_BD.shape}; it must be {(B, D)}")


def _check_mask(name: str, mask_BT: jax.Array | None, shape: tuple[int, ...]) -> None:
    if mask_BT is None:
        return
    if mask_BT.shape != shape[:2]:
        raise ValueError(f"{name} has shape {mask_BT.shape}; it must be {shape[:2]}")
    if mask_BT.dtype != jnp.bool_:
        raise TypeError(f"{name} has dtype {mask_BT.dtype}; it must be bool")


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear(
    how: _How,
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _linear_forward(how, f_BTD, x_BTD, reset_BT, h0_BD)[0]


def _linear_decay(f_BTD: jax.Array, *_: Any) -> jax.Array:
    return f_BTD.astype(xla.carry_dtype(f_BTD))


def _linear_forward(
    how: _How,
    f_BTD: jax.Array,
    x_BTD: jax.Array,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    if how.mesh is None:
        h_BTD, h_last_BD = how.module.forward(f_BTD, x_BTD, reset_BT, h0_BD)
        start = h0_BD
    else:
        h_BTD, h_last_BD, start = sharded.forward(
            how.mesh,
            how.partition,
            how.module.forward,
            _linear_decay,
            (f_BTD, x_BTD),
            reset_BT,
            h0_BD,
        )
    h_BTD = checkpoint_name(h_BTD, "state")
    return (h_BTD, h_last_BD), (f_BTD, h_BTD, reset_BT, h0_BD, start)


def _linear_backward(how: _How, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    f_BTD, h_BTD, reset_BT, h0_BD, start = residuals
    if how.mesh is None:
        df_BTD, dx_BTD, dh0_BD = how.module.backward(f_BTD, h_BTD, reset_BT, h0_BD, *cotangents)
    else:
        df_BTD, dx_BTD, dh0_BD = sharded.backward(
            how.mesh,
            how.partition,
            how.module.backward,
            _linear_decay,
            (f_BTD,),
            (3, 3),
            h_BTD,
            reset_BT,
            start,
            *cotangents,
        )
    return df_BTD, dx_BTD, None, _like(dh0_BD, h0_BD)


_linear.defvjp(_linear_forward, _linear_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mlgru(
    how: _How,
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
    padding_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    return _mlgru_forward(how, i_BTD, f_BTD, lower_bound_D, reset_BT, h0_BD, padding_BT)[0]


def _mlgru_decay(i_BTD: jax.Array, f_BTD: jax.Array, lower_bound_D: jax.Array | None) -> jax.Array:
    dtype = xla.carry_dtype(f_BTD)
    return gate_values(i_BTD.astype(dtype), f_BTD.astype(dtype), lower_bound_D).forget


def _mlgru_forward(
    how: _How,
    i_BTD: jax.Array,
    f_BTD: jax.Array,
    lower_bound_D: jax.Array | None,
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
    padding_BT: jax.Array | None,
) -> tuple[tuple[jax.Array, jax.Array], tuple[Any, ...]]:
    operands = (i_BTD, f_BTD, lower_bound_D)
    if how.mesh is None:
        held = {} if padding_BT is None else {"held_BT": padding_BT}
        h_BTD, h_last_BD = how.module.mlgru_forward(*operands, reset_BT, h0_BD, **held)
        start = h0_BD
        if padding_BT is not None:  # The backward sees it in the gates.
            operands = (i_BTD, _held_open(f_BTD, padding_BT), lower_bound_D)
    else:
        forward = how.module.mlgru_forward
        h_BTD, h_last_BD, start = sharded.forward(
            how.mesh, how.partition, forward, _mlgru_decay, operands, reset_BT, h0_BD
        )
    h_BTD = checkpoint_name(h_BTD, "state")
    return (h_BTD, h_last_BD), (operands, h_BTD, reset_BT, h0_BD, start)


def _mlgru_backward(how: _How, residuals: Any, cotangents: Any) -> tuple[Any, ...]:
    operands, h_BTD, reset_BT, h0_BD, start = residuals
    lower_bound_D = operands[2]
    if how.mesh is None:
        gradients = how.module.mlgru_backward(*operands, h_BTD, reset_BT, h0_BD, *cotangents)
    else:
        gradients = sharded.backward(
            how.mesh,
            how.partition,
            how.module.mlgru_backward,
            _mlgru_decay,
            operands,
            (3, 3, None if lower_bound_D is None else 1),
            h_BTD,
            reset_BT,
            start,
            *cotangents,
        )
    di_BTD, df_BTD, dbound_D, dh0_BD = gradients
    return di_BTD, df_BTD, _like(dbound_D, lower_bound_D), None, _like(dh0_BD, h0_BD), None


_mlgru.defvjp(_mlgru_forward, _mlgru_backward)


def _like(gradient: Any, primal: jax.Array | None) -> jax.Array | None:
    return None if primal is None else gradient.astype(primal.dtype)
