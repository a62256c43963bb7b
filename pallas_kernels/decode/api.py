"""A token through all layers of the MatMul-free model, from packed weights. The public door.

    pallas_token_gpu   one kernel for whole tokens, one row; it also chooses the likeliest next
    pallas_fused_gpu   four kernels a layer, a few rows
    xla                layer after layer in plain jnp: the oracle, right on every backend

Shapes: B rows, D hidden, E state, L layers, V vocabulary, N tokens, S stop tokens.
"""

import os

import jax
import jax.numpy as jnp

from ..packed_matmul.api import kernels_serve
from ..packed_matmul.linears import Linears
from . import device, fused_gpu, reference, token_gpu
from .device import multiprocessors
from .model import Arithmetic, Model
from .token_plan import Cut

__all__ = [
    "IMPLEMENTATIONS",
    "KERNELS_VARIABLE",
    "Arithmetic",
    "Cut",
    "Linears",
    "Model",
    "decode_greedy",
    "decode_token",
    "greedy_rows",
    "measured_best",
    "multiprocessors",
]

IMPLEMENTATIONS = ("xla", "pallas_fused_gpu", "pallas_token_gpu")
"""Names that `implementation` takes."""

KERNELS_VARIABLE = "MMFREE_DECODE_KERNELS"
"""Environment variable: "layers" keeps the kernel of whole tokens off."""


def measured_best(rows: int, *, width: int, state_size: int, glu_size: int) -> str | None:
    """The kernels that measured fastest for a token of so many rows on the first device.

    Args:
      rows: B.
      width: D.
      state_size: E.
      glu_size: M, half the rows of `Model.glu_in`.

    Returns:
      One of `IMPLEMENTATIONS`; None: none is faster there than a program of one product after
      another (`packed_matmul.api`), which keeps the tensor cores busy.
    """
    if not kernels_serve():
        return None
    if rows == 1 and _whole_tokens(state_size, glu_size):
        return "pallas_token_gpu"
    return "pallas_fused_gpu" if rows <= fused_gpu.most_rows(width) else None


def greedy_rows(*, width: int, state_size: int, glu_size: int) -> int:
    """Rows up to which `decode_greedy`, for one after another, measured fastest; 0: for none.

    Args: as of `measured_best`.
    """
    if not _whole_tokens(state_size, glu_size) or not kernels_serve():
        return 0
    return device.rows_in_turn(width)


def _whole_tokens(state_size: int, glu_size: int) -> bool:
    on = os.environ.get(KERNELS_VARIABLE) != "layers"
    return on and device.runs_whole_tokens(state_size, glu_size)


def decode_token(
    model: Model,
    token_B: jax.Array,
    h_LBE: jax.Array,
    held_B: jax.Array | None = None,
    *,
    arithmetic: Arithmetic,
    implementation: str | None = None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Reads one token a row.

    Args:
      model: weights.
      token_B: int32.
      h_LBE: float32 states.
      held_B: True for rows whose token is padding: their state is kept, and their logits mean
        nothing. None: no row.
      arithmetic: norms' eps and dtypes.
      implementation: one of `IMPLEMENTATIONS`; None: `measured_best`, else "xla".
      cut: of "pallas_token_gpu"; None: as measured for the device.
      interpret: run the kernels as JAX programs, to check them without a GPU.

    Returns:
      [B, V] float32 logits, and the new states.

    Raises:
      ValueError: an unknown implementation, more rows than it takes, operands that do not fit.
    """
    implementation = implementation or _best(model, token_B.shape[0]) or "xla"
    _check(implementation, IMPLEMENTATIONS, model)
    if implementation == "pallas_token_gpu":
        limit_1 = jnp.ones(1, jnp.int32) if held_B is None else (~held_B).astype(jnp.int32)
        _, logits_BV, new_LBE = token_gpu.decode_tokens(
            token_B, model, h_LBE, jnp.zeros((1, _vocabulary(model)), jnp.float32), limit_1,
            jnp.full(1, -1, jnp.int32), steps=1, arithmetic=arithmetic,
            cut=cut or device.measured_cut(model.width), interpret=interpret,
        )  # fmt: skip
        return logits_BV, new_LBE
    if implementation == "pallas_fused_gpu":
        logits_BV, new_LBE = fused_gpu.decode_token(
            model, token_B, h_LBE, arithmetic=arithmetic, interpret=interpret
        )
    else:
        logits_BV, new_LBE = reference.decode_token(model, token_B, h_LBE, arithmetic=arithmetic)
    if held_B is not None:
        new_LBE = jnp.where(held_B[None, :, None], h_LBE, new_LBE)
    return logits_BV, new_LBE


def decode_greedy(
    model: Model,
    h_L1E: jax.Array,
    logits_1V: jax.Array,
    limit_1: jax.Array,
    stop_ids_S: jax.Array,
    *,
    steps: int,
    arithmetic: Arithmetic,
    implementation: str | None = None,
    cut: Cut | None = None,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads the likeliest token of one row, then the likeliest that follows, and so on.

    It ends behind `limit_1` tokens, or before a stop token, which is not read. As one kernel it
    takes no longer than its tokens, whatever `steps` is.

    Args:
      model: weights.
      h_L1E: float32 states.
      logits_1V: float32, of the token that comes first.
      limit_1: int32, most tokens to read, up to `steps`; 0 leaves all as it is.
      stop_ids_S: int32; -1 is none.
      steps: static, most tokens.
      arithmetic: norms' eps and dtypes.
      implementation: "xla" or "pallas_token_gpu"; None: the kernel where it measured fastest.
      cut: of the kernel; None: as measured for the device.
      interpret: run it as a JAX program.

    Returns:
      [N = steps] int32 tokens that were read, -1 behind them; the logits after the last, and the
      new states.

    Raises:
      ValueError: an implementation that has no such loop, operands that do not fit.
    """
    if implementation is None:
        best = _best(model, 1)
        implementation = best if best == "pallas_token_gpu" else "xla"
    _check(implementation, ("xla", "pallas_token_gpu"), model)
    if implementation == "xla":
        return reference.decode_greedy(
            model, h_L1E, logits_1V, limit_1, stop_ids_S, steps=steps, arithmetic=arithmetic
        )
    first_1 = jnp.argmax(logits_1V, axis=-1).astype(jnp.int32)
    return token_gpu.decode_tokens(
        first_1, model, h_L1E, logits_1V, limit_1, stop_ids_S, steps=steps, arithmetic=arithmetic,
        cut=cut or device.measured_cut(model.width), interpret=interpret,
    )  # fmt: skip


def _best(model: Model, rows: int) -> str | None:
    if not _one_scale(model):
        return None
    state_size, glu_size = (
        linears.norms[0].shape[-1] for linears in (model.mixer_out, model.glu_out)
    )
    return measured_best(rows, width=model.width, state_size=state_size, glu_size=glu_size)


def _one_scale(model: Model) -> bool:
    """Whether each matrix has one scale, which is what the kernels read."""
    return model.head.scales[0].size == 1


def _vocabulary(model: Model) -> int:
    return model.head.words[0].shape[1]


def _check(implementation: str, known: tuple[str, ...], model: Model) -> None:
    if implementation not in known:
        raise ValueError(f"implementation={implementation!r} is unknown: choose one of {known}")
    if implementation != "xla" and not _one_scale(model):
        raise ValueError(
            f"implementation={implementation!r} takes one scale a matrix, and these weights have "
            "one a group of inputs: choose 'xla'"
        )
