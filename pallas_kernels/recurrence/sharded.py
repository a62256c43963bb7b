"""The recurrence on a mesh: batch and channels apart, time by exchanging chunk summaries.

Batch and channel axes need no communication. Over a time axis every device summarises its piece
of the sequence (product of the decays, state from a zero start), the summaries [B, D] are
gathered, each device folds those before it into its own starting state and then runs its piece.
That is one extra pass over the local inputs, and two gathers of [devices, B, D] float32.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

# forward(*operands, reset_BT, h0_BD) -> (h_BTD, h_last_BD)
# backward(*operands, h_BTD, reset_BT, h0_BD, dh_BTD, dh_last_BD) -> (*gradients, dh0_BD)
# decay(*operands) -> f_BTD in float32


def axes_of(partition: PartitionSpec | None) -> tuple[Any, ...]:
    """The mesh axes of batch, time and channels."""
    return (*(partition or ()), None, None, None)[:3]


def size_of(mesh: Mesh | AbstractMesh, axes: Any) -> int:
    """The number of devices along `axes`, a name, a tuple of names or None."""
    return math.prod(mesh.shape[name] for name in _names(axes))


def forward(
    mesh: Mesh | AbstractMesh,
    partition: PartitionSpec | None,
    op_forward: Callable,
    decay: Callable,
    operands: tuple[jax.Array | None, ...],
    reset_BT: jax.Array | None,
    h0_BD: jax.Array | None,
) -> tuple[Any, ...]:
    """(h_BTD, h_last_BD, start): start is the state before each device's piece, for `backward`."""
    batch, time, channel = axes_of(partition)

    def local(
        operands: tuple[jax.Array | None, ...], reset_BT: jax.Array | None, h0_BD: jax.Array | None
    ) -> tuple[Any, ...]:
        if time is None:
            h_BTD, h_last_BD = op_forward(*operands, reset_BT, h0_BD)
            return h_BTD, h_last_BD, h0_BD
        _, state_BD = op_forward(*operands, reset_BT, None)
        product_BD = _product(decay(*operands), reset_BT)
        start_BD, last_BD = _fold(time, product_BD, state_BD, h0_BD, reverse=False)
        h_BTD, _ = op_forward(*operands, reset_BT, start_BD)
        return h_BTD, last_BD, start_BD[None]

    state = PartitionSpec(batch, channel)
    start = PartitionSpec(time, batch, channel) if time is not None else _spec_of(h0_BD, state)
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            _operand_specs(operands, partition),
            _spec_of(reset_BT, PartitionSpec(batch, time)),
            _spec_of(h0_BD, state),
        ),
        out_specs=(PartitionSpec(batch, time, channel), state, start),
        check_vma=False,
    )(operands, reset_BT, h0_BD)


def backward(
    mesh: Mesh | AbstractMesh,
    partition: PartitionSpec | None,
    op_backward: Callable,
    decay: Callable,
    operands: tuple[jax.Array | None, ...],
    gradient_ranks: tuple[int | None, ...],
    h_BTD: jax.Array,
    reset_BT: jax.Array | None,
    start: jax.Array | None,
    dh_BTD: jax.Array,
    dh_last_BD: jax.Array,
) -> tuple[Any, ...]:
    """(*gradients, dh0_BD); gradients of rank 1, [D], are summed over batch and time axes.

    `gradient_ranks` gives the rank of each gradient, None where the gradient is None.
    """
    batch, time, channel = axes_of(partition)
    summed = tuple(name for axes in (batch, time) for name in _names(axes))

    def local(
        operands: tuple[jax.Array | None, ...],
        h_BTD: jax.Array,
        reset_BT: jax.Array | None,
        start: Any,
        dh_BTD: jax.Array,
        dh_last_BD: jax.Array,
    ) -> tuple[Any, ...]:
        run = functools.partial(op_backward, *operands, h_BTD, reset_BT)
        if time is None:
            *gradients, dh0_BD = run(start, dh_BTD, dh_last_BD)
        else:
            start_BD = start[0]
            *_, carry_BD = run(start_BD, dh_BTD, jnp.zeros_like(dh_last_BD))
            product_BD = _product(decay(*operands), reset_BT)
            dh_last_BD, dh0_BD = _fold(time, product_BD, carry_BD, dh_last_BD, reverse=True)
            *gradients, _ = run(start_BD, dh_BTD, dh_last_BD)
        if summed:
            gradients = [
                jax.lax.psum(g, summed) if g is not None and g.ndim == 1 else g for g in gradients
            ]
        return tuple(gradients), dh0_BD

    state, whole = PartitionSpec(batch, channel), PartitionSpec(batch, time, channel)
    start_spec = PartitionSpec(time, batch, channel) if time is not None else state
    by_rank = {3: whole, 1: PartitionSpec(channel), None: None}
    gradients, dh0_BD = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(
            _operand_specs(operands, partition),
            whole,
            _spec_of(reset_BT, PartitionSpec(batch, time)),
            _spec_of(start, start_spec),
            whole,
            state,
        ),
        out_specs=(tuple(by_rank[rank] for rank in gradient_ranks), state),
        check_vma=False,
    )(operands, h_BTD, reset_BT, start, dh_BTD, dh_last_BD)
    return (*gradients, dh0_BD)


def _fold(
    time: Any,
    product_BD: jax.Array,
    state_BD: jax.Array,
    initial_BD: jax.Array | None,
    *,
    reverse: bool,
) -> tuple[jax.Array, jax.Array]:
    """(state before this device's piece, state after all pieces) from every device's summary."""
    products_SBD = jax.lax.all_gather(product_BD, time)
    states_SBD = jax.lax.all_gather(state_BD, time)
    index = jax.lax.axis_index(time)
    carry_BD = jnp.zeros_like(state_BD) if initial_BD is None else initial_BD.astype(state_BD.dtype)
    mine_BD = carry_BD
    for s in reversed(range(len(states_SBD))) if reverse else range(len(states_SBD)):
        mine_BD = jnp.where(s == index, carry_BD, mine_BD)
        carry_BD = products_SBD[s] * carry_BD + states_SBD[s]
    return mine_BD, carry_BD


def _product(f_BTD: jax.Array, reset_BT: jax.Array | None) -> jax.Array:
    product_BD = jnp.prod(f_BTD, axis=1)
    return product_BD if reset_BT is None else product_BD * ~jnp.any(reset_BT, axis=1)[:, None]


def _operand_specs(
    operands: tuple[jax.Array | None, ...], partition: PartitionSpec | None
) -> tuple[PartitionSpec | None, ...]:
    batch, time, channel = axes_of(partition)
    by_rank = {3: PartitionSpec(batch, time, channel), 1: PartitionSpec(channel)}
    return tuple(None if x is None else by_rank[x.ndim] for x in operands)


def _spec_of(x: jax.Array | None, spec: PartitionSpec) -> PartitionSpec | None:
    return None if x is None else spec


def _names(axes: Any) -> tuple[str, ...]:
    if axes is None:
        return ()
    return (axes,) if isinstance(axes, str) else tuple(axes)
