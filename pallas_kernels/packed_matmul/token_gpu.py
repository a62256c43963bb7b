"""One token through the whole model in one GPU kernel.

A layer is four steps, each a matrix-vector product whose inputs are all outputs of the step
before. As kernels of their own they spend most of their time on starting and on waiting for
memory. Here a few programs a multiprocessor stay for the whole token:

    mixer_in   RMSNorm, {i, f, g}, the gates and the recurrence  -> g, RMSNorm's weight g silu(h)
    mixer_out  the norm of g, o, residual                        -> stream
    glu_in     RMSNorm, gate and up, SwiGLU                      -> z
    glu_out    down, residual                                    -> stream
    head       final RMSNorm, head                               -> logits

Every program owns an equal share of the rows of each matrix. It asks for the weights of a step
before the step's input exists, so that memory is read while programs wait for each other. They
pass values on through a board in the L2 cache (`token_board.py`); each reads the whole input of
a step and quantises it for itself (`token_step.py`).

A tensor here is one register of each thread, [warps, 32], and everything wider is a Python list
of them: Triton then has no layouts to convert between, and a program of one warp never meets a
barrier.

All programs must run at the same time: a few small ones a multiprocessor do. A wait that never
ends gives NaN logits rather than hang.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp
from jax.experimental.pallas import triton as pltriton

from pallas_kernels.packed_matmul import token_board, token_step
from pallas_kernels.packed_matmul.fused_gpu import Layer
from pallas_kernels.packed_matmul.token_plan import Config, Plan, make_plan, places
from pallas_kernels.packed_matmul.words import plane_columns

_MAX_LOOKS = 1 << 20  # of all waits of one thread together: about a second


class Model(NamedTuple):
    """Weights, stacked over the layers (one "layer" for the head).

    Attributes:
      mixer_in: i, f and g.
      mixer_out: o.
      glu_in: gate and up, one matrix of 2M rows.
      glu_out: down.
      head: the head.
      mixer_norm, gate_norm, glu_norm: [L, columns].
      final_norm: [1, D].
      lower_bound: [L, E] float32, of the forget gates.
    """

    mixer_in: Layer
    mixer_out: Layer
    glu_in: Layer
    glu_out: Layer
    head: Layer
    mixer_norm: jax.Array
    gate_norm: jax.Array
    glu_norm: jax.Array
    final_norm: jax.Array
    lower_bound: jax.Array


def decode_token(
    x: jax.Array,
    model: Model,
    h: jax.Array,
    held: jax.Array | None = None,
    *,
    eps: float,
    outer_eps: float,
    dtype: jax.typing.DTypeLike,
    config: Config,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Logits and new states after one token of one row.

    Args:
      x: [1, D], the embedded token; its dtype is the residual stream's.
      model: weights.
      h: [L, 1, E] float32 states.
      held: [1] bool, True to leave the states as they are; None: do not.
      eps: of the BitLinears' norms.
      outer_eps: of the other norms.
      dtype: of the products' outputs.
      config: programs and tiles.
      interpret: run as a JAX program, step after step, to check the arithmetic without a GPU.

    Returns:
      [1, V] float32 logits, and [L, 1, E] float32 states.

    Raises:
      ValueError: operands that do not fit; more than one row; columns that 16 does not divide
        (except under `interpret`).
    """
    layers, batch, inner = h.shape
    if batch != 1 or x.shape[0] != 1:
        raise ValueError(f"one row at a time, but x is {x.shape} and h {h.shape}")
    plan = make_plan(
        layers=layers, width=x.shape[1], inner=inner, glu=model.glu_in.words[0].shape[1] // 2,
        vocabulary=model.head.words[0].shape[1], residual_dtype=x.dtype, dtype=dtype, eps=eps,
        outer_eps=outer_eps, config=config, emulate=interpret,
    )  # fmt: skip
    for step in plan.steps.values():
        if step.columns % 16 and not interpret:
            raise ValueError(f"{step.name} has {step.columns} columns, not a multiple of 16")
        for words in getattr(model, step.name).words:
            if words.shape[2] != plane_columns(step.columns) // 4:
                raise ValueError(
                    f"{step.name} has words {words.shape}, but {step.columns} columns need "
                    f"{plane_columns(step.columns) // 4}"
                )
    held = jnp.zeros(1, jnp.int32) if held is None else held.astype(jnp.int32)
    operands = {"h": h, "held": held}
    for name, value in model._asdict().items():
        if isinstance(value, Layer):
            for field, arrays in value._asdict().items():
                operands |= {f"{name}/{field}/{i}": array for i, array in enumerate(arrays)}
        else:
            operands[name] = value
    operands["board_in"] = token_board.empty_board(plan, x[0])
    vocabulary = plan.steps["head"].rows
    results = {
        "logits": jax.ShapeDtypeStruct((1, vocabulary), jnp.float32),
        "new_h": jax.ShapeDtypeStruct(h.shape, jnp.float32),
        "board": jax.ShapeDtypeStruct(operands["board_in"].shape, jnp.int32),
    }

    def kernel(*refs):
        _kernel(dict(zip([*operands, *results], refs, strict=True)), plan)

    grid = (config.programs,)
    if interpret:  # Programs run one after another: a step must be over before the next begins.
        grid = (4 * layers + 1, config.programs)
    logits, new_h, _ = pl.pallas_call(
        kernel,
        out_shape=list(results.values()),
        grid=grid,
        input_output_aliases={len(operands) - 1: 2},
        compiler_params=pltriton.CompilerParams(num_warps=config.warps, num_stages=1),
        interpret=interpret,
        name="decode_token",
    )(*operands.values())
    return logits, new_h


_FOLLOWING = {
    "mixer_in": "mixer_out",
    "mixer_out": "glu_in",
    "glu_in": "glu_out",
    "glu_out": "mixer_in",
}


def _kernel(refs: dict[str, Any], plan: Plan) -> None:
    # Read once, here: the interpreter knows program numbers outside conditionals only.
    refs["program"] = pl.program_id(1 if plan.emulate else 0)
    run = functools.partial(token_step.run, refs, plan)
    prefetch = functools.partial(token_step.prefetch, refs, plan)
    patience = jnp.full(places(plan).shape, _MAX_LOOKS, jnp.int32)
    if plan.emulate:
        phase = pl.program_id(0)
        for number, name in enumerate(plan.steps):
            layer = 0 if name == "head" else phase // 4
            last = phase == 4 * plan.layers
            now = last if name == "head" else (phase % 4 == number) & ~last

            @pl.when(now)
            def _(name=name, layer=layer):
                run(name, layer, prefetch(name, layer), lambda: None, patience)

        return

    def body(layer: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        patience, bundle = carry
        for name, following in _FOLLOWING.items():
            at = layer if following != "mixer_in" else jnp.minimum(layer + 1, plan.layers - 1)
            for tile in range(plan.config.ahead):
                patience = token_step.fetch(refs, plan, following, at, tile, patience)
            then = functools.partial(prefetch, following, at)
            patience, bundle = run(name, layer, bundle, then, patience)
        return patience, bundle

    patience, _ = jax.lax.fori_loop(
        0, plan.layers, body, (patience, prefetch("mixer_in", jnp.int32(0)))
    )
    run("head", 0, prefetch("head", 0), lambda: None, patience)
