"""The operations of a layer in JAX: linear layers by their weights, and the recurrence."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec

from mmfree_jax.model import layer
from mmfree_jax.model.linear import linears
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.pallas_kernels.recurrence.api import linear_recurrence, mlgru_recurrence
from mmfree_jax.parallel.sharding import channel_partition


class Rows(NamedTuple):
    """What every block is told about its rows.

    Attributes:
      positions_BT: int32, for rotary positions; None: 0, 1, ... of rows that are a document each
        and begin here, with padding on the right.
      segment_ids_BT: int32 documents, 0 for padding; None: one document a row.
      reset_BT: True where the recurrent state is dropped.
      padding_BT: True where the recurrent state is held.
      strength: of the activations' quantisers; None: 1.
    """

    positions_BT: jax.Array | None
    segment_ids_BT: jax.Array | None
    reset_BT: jax.Array | None
    padding_BT: jax.Array | None
    strength: jax.Array | None = None


def operations(config: ModelConfig, rows: Rows, *, holds: bool) -> layer.Operations:
    """A layer's operations on `LinearWeights`.

    Args:
      config: of the model.
      rows: that it reads.
      holds: somebody wants the state after the last step. Padding ends a row: else it need not
        be held there.
    """
    padding_BT = rows.padding_BT if holds else None
    steps = layer.Steps(
        rows.reset_BT,
        padding_BT,
        channel_partition,
        rows.positions_BT,
        rows.segment_ids_BT,
        rows.strength,
    )
    return layer.Operations(
        functools.partial(linears, config, strength=rows.strength),
        recurrence(config, steps),
        steps=steps,
    )


def run_mixer(
    mix: Callable[..., tuple[jax.Array, jax.Array, dict[str, Any]]],
    weights: Any,
    x_BTD: jax.Array,
    rows: Rows,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[jax.Array, jax.Array, dict[str, Any] | None]:
    """What a mixer's module returns, of `PackedForm.mix` on its `LinearWeights`."""
    ops = operations(config, rows, holds=state is not None)
    x_BTD, update_BTD, new_state = mix(ops, weights, x_BTD, None, state, config)
    return x_BTD, update_BTD, None if state is None else new_state


def recurrence(
    config: ModelConfig, steps: layer.Steps
) -> Callable[..., tuple[jax.Array, jax.Array]]:
    """`Operations.recurrence` over `steps`."""

    def run(
        i_BTE: jax.Array, f_BTE: jax.Array, bound_E: jax.Array | None, h0_BE: jax.Array | None
    ) -> tuple[jax.Array, jax.Array]:
        if config.candidate != "silu":
            return _other_candidate(config, steps, i_BTE, f_BTE, bound_E, h0_BE)
        return mlgru_recurrence(
            i_BTE,
            f_BTE,
            bound_E,
            h0_BD=h0_BE,
            reset_BT=steps.reset_BT,
            padding_BT=steps.padding_BT,
            partition=steps.partition(i_BTE.shape),
            implementation=config.recurrence_kernel,
        )

    return run


def _other_candidate(
    config: ModelConfig,
    steps: layer.Steps,
    i_BTE: jax.Array,
    f_BTE: jax.Array,
    bound_E: jax.Array | None,
    h0_BE: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The MLGRU's recurrence with another candidate than silu(i), which the kernels fuse."""
    i, f = i_BTE.astype(jnp.float32), f_BTE.astype(jnp.float32)
    candidate_BTE = jnp.tanh(i) if config.candidate == "tanh" else i
    # 1 - F without cancellation where F is near 1.
    closed_BTE = jax.nn.sigmoid(-f) * (1.0 if bound_E is None else 1 - bound_E)
    x_BTE = candidate_BTE * closed_BTE
    h_BTE, last_BE = linear_over(config, steps, 1 - closed_BTE, x_BTE, h0_BE)
    return h_BTE.astype(i_BTE.dtype), last_BE


def linear_over(
    config: ModelConfig,
    steps: layer.Steps,
    decay_BTE: jax.Array,
    x_BTE: jax.Array,
    h0_BE: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """h_t = decay_t h_{t-1} + x_t over `steps`: all states in x's dtype, and the last one."""
    if steps.padding_BT is not None:
        held_BT1 = steps.padding_BT[..., None]
        decay_BTE, x_BTE = jnp.where(held_BT1, 1, decay_BTE), jnp.where(held_BT1, 0, x_BTE)
    return linear_recurrence(
        decay_BTE,
        x_BTE,
        reset_BT=steps.reset_BT,
        h0_BD=h0_BE,
        partition=steps.partition(x_BTE.shape),
        implementation=config.recurrence_kernel,
    )


def token_shift(
    steps: layer.Steps, x_BTD: jax.Array, before_BD: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """The token before each, within its document.

    Args:
      steps: that x goes through; padding lies on the right.
      x_BTD: tokens.
      before_BD: the token before the first; None: zeros.

    Returns:
      [B, T, D], zeros where a document begins, and each row's last token that is not padding.
    """
    if before_BD is None:
        before_BD = jnp.zeros_like(x_BTD[:, 0])
    all_BTD = jnp.concatenate([before_BD[:, None].astype(x_BTD.dtype), x_BTD], axis=1)
    last_BD = x_BTD[:, -1]
    if steps.padding_BT is not None:
        length_B11 = jnp.sum(~steps.padding_BT, axis=1)[:, None, None]
        last_BD = jnp.take_along_axis(all_BTD, length_B11, axis=1)[:, 0]
    shifted_BTD = all_BTD[:, :-1]
    if steps.reset_BT is not None:
        shifted_BTD = jnp.where(steps.reset_BT[..., None], 0, shifted_BTD)
    return shifted_BTD, last_BD


def whole(shape: tuple[int, ...]) -> PartitionSpec | None:
    """`Steps.partition` where the compiler lays out all arrays."""
    del shape
    return None
