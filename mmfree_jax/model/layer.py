"""The wiring of a MatMul-free layer: once, for every program that is not one kernel.

What computes it stands behind `Operations`: JAX on master weights or trits (`linear.py`), GPU
kernels on packed stacks (`packed_model.py`), an ONNX graph that is being built
(`export/onnx_graph.py`). The sum of the residual stream and what a mixer gives is left to the
next linear layers, whose kernels have both at hand.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Generic, NamedTuple, TypeVar

import flax.linen as nn
import jax
from jax.ad_checkpoint import checkpoint_name

from mmfree_jax.model import functional, mup
from mmfree_jax.model.linear import Linear
from mmfree_jax.model_config import ModelConfig

# What a program computes with: an array, or the name of a tensor in a graph.
Value = Any
# The weights of one linear layer, as the program keeps them.
LinearWeights = Any

# linears(layers, x, *, name, outer_norm, residual, skip, times_silu, gated, to_gate)
# -> (x + residual, outputs): linear layers that read one input.
#
#   outer_norm  scale of an RMSNorm in front of all; None leaves it out
#   residual    added to x first; None: nothing
#   skip        the caller goes on with x + residual
#   times_silu  the input is RMSNorm(x) * silu(times_silu), the norm the outer one
#   gated       the input is silu(gate) * up, of the two halves of x
#   to_gate     the next call is gated, on this one's output
#   name        of the outputs, for the policies of `ModelConfig.remat`
Linears = Callable[..., tuple[Value, Sequence[Value]]]


LinearT = TypeVar("LinearT")  # one linear layer, or a stack of them
VectorT = TypeVar("VectorT")  # a norm's scale or the like, or a stack of them


class MLGRUWeights(NamedTuple, Generic[LinearT, VectorT]):
    """What the token mixer of a MatMul-free layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      i_proj, f_proj, g_proj, o_proj: linear layers; g_proj None with output_gate "none".
      gate_norm: scale of the RMSNorm on g, [E]; None but with output_gate "authors".
      lower_bound: of the forget gate, [E].
    """

    norm: VectorT
    i_proj: LinearT
    f_proj: LinearT
    g_proj: LinearT
    gate_norm: VectorT
    o_proj: LinearT
    lower_bound: VectorT


class GLUWeights(NamedTuple, Generic[LinearT, VectorT]):
    """What the channel mixer of a layer reads, or of a stack of layers.

    Attributes:
      norm: scale of the RMSNorm in front, [D].
      gate_up_proj, down_proj: linear layers.
    """

    norm: VectorT
    gate_up_proj: LinearT
    down_proj: LinearT


class Steps(NamedTuple):
    """What mixers are told of the steps they go through, in JAX.

    Attributes:
      reset_BT: True where what came before is dropped; None: nowhere.
      padding_BT: True where the state is held; None: nowhere, or nobody reads the last state.
      partition: how [B, T, D] lies on the mesh, None for any that the compiler chooses.
      positions_BT: int32, of rotary positions; None: 0, 1, ... of rows that are a document each
        and begin here, with padding on the right.
      segment_ids_BT: int32 documents, 0 for padding; None: one document a row.
      strength: of the quantisers of activations; None: 1.
    """

    reset_BT: Any
    padding_BT: Any
    partition: Callable[[tuple[int, ...]], Any]
    positions_BT: Any
    segment_ids_BT: Any
    strength: Any = None


def _itself(x: Value) -> Value:
    return x


class Operations(NamedTuple):
    """What a layer is computed by.

    Attributes:
      linears: see `Linears`.
      recurrence: (i, f, lower bound, state before) -> every step's state, and the last one:
        h_t = F_t h_{t-1} + (1 - F_t) silu(i_t), F = bound + (1 - bound) sigmoid(f).
      vector: the layer's own of a vector that the weights may hold as a stack over layers.
      steps: for mixers that compute with arrays; None where there are none.
    """

    linears: Linears
    recurrence: Callable[[Value, Value, Value, Value], tuple[Value, Value]]
    vector: Callable[[Value], Value] = _itself
    steps: Steps | None = None


def mlgru(
    ops: Operations,
    weights: MLGRUWeights[Any, Any],
    x: Value,
    update: Value,
    h0: Value,
    gate: str = "authors",
) -> tuple[Value, Value, Value]:
    """The token mixer on the stream x + update.

    Args:
      ops: what it is computed by.
      weights: of the layer.
      x, update: the stream, in two parts.
      h0: the state before the first step.
      gate: a `ModelConfig.output_gate`; those that are not the authors' need arrays.

    Returns:
      x + update, this mixer's update of it, and the state after the last step.
    """
    x, outputs = ops.linears(
        mlgru_inputs(weights), x, residual=update, outer_norm=weights.norm, skip=True, name="i_f_g"
    )
    return x, *after_projections(ops, weights, outputs, h0, gate)


def mlgru_inputs(weights: MLGRUWeights[Any, Any]) -> list[Any]:
    """The layers that read the mixer's input."""
    inputs = [weights.i_proj, weights.f_proj]
    return inputs if weights.g_proj is None else [*inputs, weights.g_proj]


def after_projections(
    ops: Operations,
    weights: MLGRUWeights[Any, Any],
    outputs: Sequence[Value],
    h0: Value,
    gate: str,
) -> tuple[Value, Value]:
    """What follows the projections i, f and g: the update of the stream, and the last state."""
    i, f, *rest = outputs
    h, last = ops.recurrence(i, f, weights.lower_bound, h0)
    if gate == "authors":
        _, (update,) = ops.linears(
            [weights.o_proj], rest[0], outer_norm=weights.gate_norm, times_silu=h, name="o"
        )
        return update, last
    g = checkpoint_name(rest[0], "g") if rest else None
    gated = functional.printed_output_gate(gate, g, h)
    _, (update,) = ops.linears([weights.o_proj], gated, name="o")
    return update, last


def mlgru_from_state(
    ops: Operations,
    weights: MLGRUWeights[Any, Any],
    x: Value,
    update: Value,
    state: dict[str, Any] | None,
    config: ModelConfig,
) -> tuple[Value, Value, dict[str, Any]]:
    """As `PackedForm.mix`; without a state it starts at zero."""
    h0_BE = None if state is None else state["h"]
    x, update, last_BE = mlgru(ops, weights, x, update, h0_BE, config.output_gate)
    return x, update, {"h": last_BE}


def glu(
    ops: Operations,
    weights: GLUWeights[Any, Any],
    x: Value,
    update: Value,
    activation: str = "silu",
) -> tuple[Value, Value]:
    """The channel mixer on the stream x + update (arXiv 2406.02528, section 3.4).

    Args:
      ops: what it is computed by.
      weights: of the layer.
      x, update: the stream, in two parts.
      activation: a `ModelConfig.glu_activation`; what is not silu needs arrays.

    Returns:
      x + update, and this mixer's update of it.
    """
    x, (gate_up,) = ops.linears(
        [weights.gate_up_proj],
        x,
        residual=update,
        outer_norm=weights.norm,
        skip=True,
        to_gate=activation == "silu",
        name="gate_up",
    )
    if activation == "silu":
        _, (update,) = ops.linears([weights.down_proj], gate_up, gated=True, name="down")
    else:
        _, (update,) = ops.linears([weights.down_proj], functional.relu2_glu(gate_up), name="down")
    return x, update


class GLU(nn.Module):
    """Owns the channel mixer: gate and up in one projection of width 2m, projection down."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self, ops: Operations, x: jax.Array, update: jax.Array, norm_scale_D: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """As `glu`, on its own weights."""
        c = self.config
        width, inner = norm_scale_D.shape[0], c.glu_size
        deviation = c.initializer_range * mup.hidden_scale(c)
        init = nn.initializers.normal(deviation)
        down_init = nn.initializers.normal(deviation / math.sqrt(2 * c.num_layers))
        gate_up = Linear(
            2 * inner,
            c.glu_linear,
            c.param_dtype,
            init,
            weight_scale=c.weight_scale,
            name="gate_up_proj",
        )
        down = Linear(
            width,
            c.glu_linear,
            c.param_dtype,
            down_init,
            weight_scale=c.weight_scale,
            name="down_proj",
        )
        weights = GLUWeights(norm_scale_D, gate_up(width), down(inner))
        return glu(ops, weights, x, update, c.glu_activation)
