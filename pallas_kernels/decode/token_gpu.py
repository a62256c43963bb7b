"""Tokens of one row through the whole model, one after another, in one GPU kernel.

A layer is four steps, each a matrix-vector product whose inputs are all outputs of the step
before. As kernels of their own they spend most of their time on starting and on waiting for
memory, and between two tokens a dozen small kernels would choose the next. Here a few programs
a multiprocessor stay for all tokens:

    embed      the token's row of the embedding                  -> stream
    mixer_in   RMSNorm, {i, f, g}, the gates and the recurrence  -> g, RMSNorm's weight g silu(h)
    mixer_out  the norm of g, o, residual                        -> stream
    glu_in     RMSNorm, gate and up, SwiGLU                      -> z
    glu_out    down, residual                                    -> stream
    head       final RMSNorm, head                               -> logits
    choose     the likeliest token

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

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.numpy as jnp

from .. import triton as pltriton
from ..packed_matmul.linears import Linears
from ..packed_matmul.words import plane_columns
from ..refs import Ref
from . import token_board, token_choice, token_step
from .inline import EMPTY
from .model import Arithmetic, Model
from .token_plan import Cut, Plan, make_plan, places

_MAX_LOOKS = 1 << 20  # of all waits of one thread for one token: about a second


def decode_tokens(
    token: jax.Array,
    model: Model,
    h: jax.Array,
    logits: jax.Array,
    limit: jax.Array,
    stop_ids: jax.Array,
    *,
    steps: int,
    arithmetic: Arithmetic,
    cut: Cut,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Reads a token, then the likeliest one that follows, and so on.

    It ends behind `limit` tokens, or before a stop token, which is not read.

    Args:
      token: [1] int32, the first.
      model: weights.
      h: [L, 1, E] float32 states.
      logits: [1, V] float32, returned if no token is read.
      limit: [1] int32, most tokens to read; 0 leaves all as it is.
      stop_ids: [S] int32; -1 is none.
      steps: most tokens that `limit` may hold; with 1 nothing is chosen.
      arithmetic: norms' eps and dtypes.
      cut: programs and tiles.
      interpret: run as a JAX program, step after step, to check the arithmetic without a GPU.

    Returns:
      [steps] int32 tokens that were read, -1 behind them; [1, V] float32 logits after the last,
      and [L, 1, E] float32 states.

    Raises:
      ValueError: operands that do not fit; more than one row; columns that 16 does not divide
        (except under `interpret`).
    """
    layers, batch, _ = h.shape
    if batch != 1 or token.shape != (1,):
        raise ValueError(f"one row at a time, but token is {token.shape} and h {h.shape}")
    plan = make_plan(model, arithmetic, boards=2 if steps > 1 else 1, cut=cut, emulate=interpret)
    for step in plan.steps.values():
        if step.columns % 16 and not interpret:
            raise ValueError(f"{step.name} has {step.columns} columns, not a multiple of 16")
        for words in getattr(model, step.name).words:
            if words.shape[2] != plane_columns(step.columns) // 4:
                raise ValueError(
                    f"{step.name} has words {words.shape}, but {step.columns} columns need "
                    f"{plane_columns(step.columns) // 4}"
                )
    operands = {"first": token, "limit": limit, "stop_ids": stop_ids}
    for name, value in _fields(model).items():
        if isinstance(value, Linears):
            for field, arrays in _fields(value).items():
                operands |= {f"{name}/{field}/{i}": array for i, array in enumerate(arrays)}
        elif value is not None:
            operands[name] = value
    begun = {
        "tokens": jnp.full(steps, -1, jnp.int32),
        "logits": logits,
        "new_h": h,
        "board": jnp.full(token_board.board_size(plan), EMPTY, jnp.int32),
    }

    def kernel(*refs: Ref) -> None:
        names = [*operands, *(f"{name} before" for name in begun), *begun]
        _kernel(dict(zip(names, refs, strict=True)), plan, steps)

    grid = (cut.programs,)
    if interpret:  # Programs run one after another: a step must be over before the next begins.
        grid = (steps * (4 * layers + 2), cut.programs)
    tokens, logits, new_h, _ = pl.pallas_call(
        kernel,
        out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in begun.values()],
        grid=grid,
        input_output_aliases={len(operands) + i: i for i in range(len(begun))},
        compiler_params=pltriton.CompilerParams(num_warps=cut.warps, num_stages=1),
        interpret=interpret,
        name="decode_tokens",
    )(*operands.values(), *begun.values())
    return tokens, logits, new_h


def _fields(value: Any) -> dict[str, Any]:
    return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}


_FOLLOWING = {
    "mixer_in": "mixer_out",
    "mixer_out": "glu_in",
    "glu_in": "glu_out",
    "glu_out": "mixer_in",
}


def _kernel(refs: dict[str, Any], plan: Plan, steps: int) -> None:
    # Read once, here: the interpreter knows program numbers outside conditionals only.
    refs["program"] = pl.program_id(1 if plan.emulate else 0)
    limit = refs["limit"][0]
    stop_ids = [refs["stop_ids"][i] for i in range(refs["stop_ids"].shape[0])]

    def goes_on(step: Any, token: jax.Array) -> jax.Array:
        stops = functools.reduce(jnp.logical_or, [token == stop for stop in stop_ids])
        return (step < limit) & ~stops

    if plan.emulate:
        _emulate(refs, plan, steps, goes_on)
        return

    def read(carry: Any) -> Any:
        step, token, _, patience, bundle = carry
        patience, best, bundle = _token(refs | {"step": step}, plan, step, token, patience, bundle)
        if steps > 1:
            token, patience = _choose(refs | {"step": step}, plan, best, patience)
            # Once a wait was in vain there are no more looks; else each token has its own.
            patience = jnp.where(patience > 0, _MAX_LOOKS, 0)
        return step + 1, token, goes_on(step + 1, token), patience, bundle

    first = refs["first"][0]
    start = jnp.int32(0)
    patience = jnp.full(places(plan).shape, _MAX_LOOKS, jnp.int32)
    bundle = token_step.prefetch(refs, plan, "mixer_in", start)
    carry = (start, first, goes_on(start, first), patience, bundle)
    jax.lax.while_loop(lambda carry: carry[2], read, carry)


def _token(
    refs: dict[str, Any], plan: Plan, step: jax.Array, token: jax.Array, patience: jax.Array,
    bundle: Any,
) -> tuple[jax.Array, Any, Any]:  # fmt: skip
    """One token: what is left of the patience, the largest logits, the next token's bundle."""
    run = functools.partial(token_step.run, refs, plan)
    prefetch = functools.partial(token_step.prefetch, refs, plan)
    _note(refs, plan, step, token)
    token_choice.embed(refs, plan, token, patience)

    def body(layer: jax.Array, carry: tuple[jax.Array, Any]) -> tuple[jax.Array, Any]:
        patience, bundle = carry
        last = layer == plan.layers - 1
        patience = token_step.fetch(refs, plan, "head", 0, 0, patience, now=last)
        for name, following in _FOLLOWING.items():
            at = layer if following != "mixer_in" else jnp.minimum(layer + 1, plan.layers - 1)
            for tile in range(plan.cut.ahead):
                patience = token_step.fetch(refs, plan, following, at, tile, patience)
            then = functools.partial(prefetch, following, at)
            patience, bundle, _ = run(name, layer, bundle, then, patience)
        return patience, bundle

    patience, _ = jax.lax.fori_loop(0, plan.layers, body, (patience, bundle))
    then = functools.partial(prefetch, "mixer_in", jnp.int32(0))
    patience, bundle, best = run("head", 0, prefetch("head", 0), then, patience)
    return patience, best, bundle


def _note(refs: dict[str, Any], plan: Plan, step: jax.Array, token: jax.Array) -> None:
    """Writes down a token that is read."""

    @pl.when(refs["program"] == 0)
    def _() -> None:
        refs["tokens"][step] = token


def _choose(
    refs: dict[str, Any], plan: Plan, best: Any, patience: jax.Array
) -> tuple[jax.Array, jax.Array]:
    patience = token_choice.publish_best(refs, plan, best, patience)
    return token_choice.choose(refs, plan, patience)


def _emulate(
    refs: dict[str, Any], plan: Plan, steps: int, goes_on: Callable[[Any, jax.Array], jax.Array]
) -> None:
    """One phase of one program: all programs finish a phase before the next begins."""
    phases = 4 * plan.layers + 2
    step, phase = pl.program_id(0) // phases, pl.program_id(0) % phases
    refs = refs | {"step": step}
    patience = jnp.ones(places(plan).shape, jnp.int32)

    @pl.when(phase == 0)
    def _() -> None:
        before = refs | {"step": jnp.maximum(step - 1, 0)}
        token = refs["first"][0]
        if steps > 1:
            token = jnp.where(step == 0, token, token_choice.choose(before, plan, patience)[0])
        read = refs["tokens"][jnp.maximum(step - 1, 0)] >= 0

        @pl.when(goes_on(step, token) & ((step == 0) | read))
        def _() -> None:
            _note(refs, plan, step, token)
            token_choice.embed(refs, plan, token, patience)

    layer = (phase - 1) // 4
    on = refs["tokens"][step] >= 0
    for number, name in enumerate([*_FOLLOWING, "head"]):
        at = 0 if name == "head" else layer
        last = phase == phases - 1
        now = last if name == "head" else (phase > 0) & ((phase - 1) % 4 == number) & ~last

        @pl.when(now & on)
        def _(name: str = name, at: Any = at) -> None:
            bundle = token_step.prefetch(refs, plan, name, at)
            _, _, best = token_step.run(refs, plan, name, at, bundle, lambda: None, patience)
            if name == "head" and steps > 1:
                token_choice.publish_best(refs, plan, best, patience)
