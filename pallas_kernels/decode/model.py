"""What the decode op takes: the packed model, and the arithmetic around its integers."""

import dataclasses

import jax
import jax.numpy as jnp

from ..packed_matmul.linears import Linears


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Model:
    """Weights of the MatMul-free model, stacked over its L layers; D hidden, E state, M of the GLU.

    Attributes:
      mixer_in: i, f and g, [E, D] each.
      mixer_out: o, [D, E].
      glu_in: gate and up, one matrix [2M, D].
      glu_out: down, [D, M].
      head: the head [V, D], a stack of one.
      mixer_norm: [L, D], of the norm in front of the mixer.
      gate_norm: [L, E], of the norm of g.
      glu_norm: [L, D], of the norm in front of the GLU.
      final_norm: [1, D].
      lower_bound: [L, E] float32, of the forget gates.
      embedding: [V, D] float32, bfloat16 or int8.
      embedding_scale: [V, 1] float32, of the rows of an int8 embedding; else None.
    """

    mixer_in: Linears
    mixer_out: Linears
    glu_in: Linears
    glu_out: Linears
    head: Linears
    mixer_norm: jax.Array
    gate_norm: jax.Array
    glu_norm: jax.Array
    final_norm: jax.Array
    lower_bound: jax.Array
    embedding: jax.Array
    embedding_scale: jax.Array | None = None

    @property
    def layers(self) -> int:
        """L."""
        return self.lower_bound.shape[0]

    @property
    def width(self) -> int:
        """D."""
        return self.final_norm.shape[-1]


@dataclasses.dataclass(frozen=True)
class Arithmetic:
    """What surrounds the integer products.

    Attributes:
      eps: of the BitLinears' own norms.
      outer_eps: of the block norms, the gate norm and the final one.
      dtype: of the products' outputs.
      residual_dtype: of the residual stream.
    """

    eps: float
    outer_eps: float
    dtype: jnp.dtype
    residual_dtype: jnp.dtype
