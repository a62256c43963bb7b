"""Decode on a GPU: norm, quantisation, 2-bit matrix-vector product and what follows, in one kernel.

At one token the time goes into reading weights and into launches, so a layer is four kernels.
Each program normalises and quantises the whole input for itself (a few KB from cache), reads
the rows of weights that are its own once, and finishes its outputs:

    mixer_in   RMSNorm, {i, f, g}, the gates and the recurrence  -> g, new state
    mixer_out  RMSNorm(g) silu(h), o                             -> residual stream
    glu_in     RMSNorm, gate and up, SwiGLU                      -> z
    glu_out    down                                              -> residual stream
    head       final RMSNorm, head                               -> logits

Weights are int32 words (`words.py`), stacked over layers; the layer's number is an operand, so
nothing is sliced in memory and all layers share one program. The integers are exact.
"""

import jax
import jax.numpy as jnp

from ..packed_matmul.linears import Linears
from .fused_kernel import call
from .model import Arithmetic, Model
from .reference import embed

# Hidden size -> most rows for which these kernels, whose products are dot products row by row,
# are faster on an H100 than tensor cores; wider models: `_FEWEST_ROWS`.
_MOST_ROWS = {1024: 4, 2048: 3}
_FEWEST_ROWS = 2

# Layers whose kernels are laid out one after another in the compiled loop over layers.
UNROLL = 8


def most_rows(width: int) -> int:
    """Rows of a batch up to which these kernels measured fastest, at this hidden size."""
    return max((n for widest, n in _MOST_ROWS.items() if width <= widest), default=_FEWEST_ROWS)


def decode_token(
    model: Model,
    token_B: jax.Array,
    h_LBE: jax.Array,
    *,
    arithmetic: Arithmetic,
    unroll: int = UNROLL,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """`reference.decode_token` by four kernels a layer, for at most `MAX_ROWS` rows."""
    eps = {"eps": arithmetic.eps}
    norms = eps | {"outer_eps": arithmetic.outer_eps}
    how = {"dtype": arithmetic.dtype, "interpret": interpret}

    def step(x_BD: jax.Array, index: jax.Array) -> tuple[jax.Array, jax.Array]:
        layer = index[None]
        g_BE, h_BE = mixer_in(
            x_BD, layer, model.mixer_norm, model.mixer_in, model.lower_bound, h_LBE, **norms, **how
        )
        x_BD = mixer_out(g_BE, h_BE, layer, model.gate_norm, model.mixer_out, x_BD, **norms, **how)
        z_BM = glu_in(x_BD, layer, model.glu_norm, model.glu_in, **norms, **how)
        return glu_out(z_BM, layer, model.glu_out, x_BD, **eps, **how), h_BE

    x_BD, new_LBE = jax.lax.scan(
        step,
        embed(model, token_B, arithmetic),
        jnp.arange(model.layers, dtype=jnp.int32),
        unroll=min(unroll, model.layers),
    )
    return head(x_BD, model.final_norm, model.head, **norms, **how), new_LBE


def mixer_in(
    x: jax.Array,
    layer: jax.Array,
    outer_norm: jax.Array,
    weights: Linears,
    lower_bound: jax.Array,
    h: jax.Array,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """The mixer up to its recurrence.

    Args:
      x: [M, D] residual stream.
      layer: [1] int32, the layer's number.
      outer_norm: [L, D], the blocks' norms.
      weights: i, f and g.
      lower_bound: [L, D] float32 of the forget gates.
      h: [L, M, D] float32 states.
      eps, outer_eps: of the BitLinears' norms and of the block's.
      dtype: of the projections' outputs.
      interpret: run as a JAX program, to check the arithmetic without a GPU.

    Returns:
      g [M, D] in dtype, and the layer's new state [M, D] float32.
    """
    m, width = x.shape[0], weights.words[0].shape[1]
    g, new = call(
        x, layer, weights, outer_norm, [lower_bound, h], "mlgru",
        [((m, width), jnp.dtype(dtype)), ((m, width), jnp.float32)],
        eps=eps, outer_eps=outer_eps, dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return g, new


def mixer_out(
    g: jax.Array,
    h: jax.Array,
    layer: jax.Array,
    gate_norm: jax.Array,
    weights: Linears,
    residual: jax.Array,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """residual + o(RMSNorm(g) silu(h)), [M, D]; g in dtype, h [M, E] float32."""
    (out,) = call(
        g, layer, weights, gate_norm, [residual], "residual",
        [(residual.shape, residual.dtype)],
        eps=eps, outer_eps=outer_eps, dtype=dtype, interpret=interpret, state=h,
    )  # fmt: skip
    return out


def glu_in(
    x: jax.Array,
    layer: jax.Array,
    outer_norm: jax.Array,
    weights: Linears,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """silu(gate) * up of RMSNorm(x), [M, N / 2] in dtype; gate is the first half of the rows."""
    half = weights.words[0].shape[1] // 2
    (out,) = call(
        x, layer, weights, outer_norm, [], "swiglu", [((x.shape[0], half), jnp.dtype(dtype))],
        eps=eps, outer_eps=outer_eps, dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return out


def glu_out(
    z: jax.Array,
    layer: jax.Array,
    weights: Linears,
    residual: jax.Array,
    *,
    eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """residual + down(z), [M, D]."""
    (out,) = call(
        z, layer, weights, None, [residual], "residual", [(residual.shape, residual.dtype)],
        eps=eps, outer_eps=eps, dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return out


def head(
    x: jax.Array,
    outer_norm: jax.Array,
    weights: Linears,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    interpret: bool = False,
) -> jax.Array:
    """Logits of RMSNorm(x), [M, V] float32 after rounding to dtype; stacks of one layer."""
    out_shape = (x.shape[0], weights.words[0].shape[1])
    (out,) = call(
        x, jnp.zeros((1,), jnp.int32), weights, outer_norm, [], "store",
        [(out_shape, jnp.float32)],
        eps=eps, outer_eps=outer_eps, dtype=dtype, interpret=interpret,
    )  # fmt: skip
    return out
