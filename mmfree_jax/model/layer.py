"""The wiring of a MatMul-free layer: once, for every program that is not one kernel.

What computes it stands behind `Operations`: JAX on master weights or trits (`linear.py`), GPU
kernels on packed stacks (`packed_model.py`), an ONNX graph that is being built
(`export/onnx_graph.py`). The sum of the residual stream and what a mixer gives is left to the
next linear layers, whose kernels have both at hand.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from mmfree_jax.model.weights import GLUWeights, MLGRUWeights

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


class Operations(NamedTuple):
    """What a layer is computed by.

    Attributes:
      linears: see `Linears`.
      recurrence: (i, f, lower bound, state before) -> every step's state, and the last one:
        h_t = F_t h_{t-1} + (1 - F_t) silu(i_t), F = bound + (1 - bound) sigmoid(f).
    """

    linears: Linears
    recurrence: Callable[[Value, Value, Value, Value], tuple[Value, Value]]


def mlgru(
    ops: Operations, weights: MLGRUWeights[Any, Any], x: Value, update: Value, state: Value
) -> tuple[Value, Value, Value]:
    """The token mixer on the stream x + update (arXiv 2406.02528, section 3.3).

    Returns:
      x + update, this mixer's update of it, and the state after the last step.
    """
    inputs = [weights.i_proj, weights.f_proj, weights.g_proj]
    x, (i, f, g) = ops.linears(
        inputs, x, residual=update, outer_norm=weights.norm, skip=True, name="i_f_g"
    )
    return x, *mix(ops, weights, i, f, g, state)


def mix(
    ops: Operations, weights: MLGRUWeights[Any, Any], i: Value, f: Value, g: Value, state: Value
) -> tuple[Value, Value]:
    """What follows the projections i, f and g: the update of the stream, and the last state."""
    h, last = ops.recurrence(i, f, weights.lower_bound, state)
    _, (update,) = ops.linears(
        [weights.o_proj], g, outer_norm=weights.gate_norm, times_silu=h, name="o"
    )
    return update, last


def glu(
    ops: Operations, weights: GLUWeights[Any, Any], x: Value, update: Value
) -> tuple[Value, Value]:
    """The channel mixer on the stream x + update (arXiv 2406.02528, section 3.4).

    Returns:
      x + update, and this mixer's update of it.
    """
    x, (gate_up,) = ops.linears(
        [weights.gate_up_proj],
        x,
        residual=update,
        outer_norm=weights.norm,
        skip=True,
        to_gate=True,
        name="gate_up",
    )
    _, (update,) = ops.linears([weights.down_proj], gate_up, gated=True, name="down")
    return x, update
