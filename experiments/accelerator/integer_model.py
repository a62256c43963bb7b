"""The MatMul-free model on integers, in JAX: MLGRU, GLU and head of `quantize`'s arrays.

This is the fixed-point model that `mmfree eval --numerics` scores and that the compiled program
and the RTL must equal to the bit. Every value is an int32 that holds a 16-bit word.

Shapes: B rows, T tokens, D hidden, M GLU width, V vocabulary.
"""

from typing import Any

import jax
import jax.numpy as jnp

from mmfree_jax.experiments.accelerator import fixed
from mmfree_jax.experiments.accelerator.numerics import Numerics
from mmfree_jax.model import functional

Tree = dict[str, Any]


def _norm(x: jax.Array, p: Tree, site: str, numerics: Numerics) -> jax.Array:
    root, _ = fixed.norm_constants(x.shape[-1], 0)
    return fixed.norm(
        x,
        eps=p[f"eps/{site}"],
        root=root,
        shift=p[f"shift/{site}"],
        newton=numerics.newton_steps,
    )


def _scaled(x: jax.Array, p: Tree, weight: str, site: str, bits: int) -> jax.Array:
    return fixed.mul(
        x, p[f"weight/{weight}"].astype(jnp.int32), shift=p[f"shift/{site}"], bits=bits
    )


def normed(x: jax.Array, p: Tree, site: str, between: str, numerics: Numerics) -> jax.Array:
    """The outer norm, and the BitLinear's behind it where the two are not fused."""
    u = _norm(x, p, site, numerics)
    if f"weight/{between}" in p:
        v = _scaled(u, p, between, between, 16)
        u = _norm(v, p, f"u{between}", numerics)
    return u


def mlgru(
    x_BTD: jax.Array,
    h_BD: jax.Array,
    p: Tree,
    numerics: Numerics,
    reset_BT: jax.Array | None,
    padding_BT: jax.Array | None,
) -> tuple[jax.Array, jax.Array]:
    """The token mixer in integers: its update of the residual stream, and the new state."""
    bits, entries = numerics.activation_bits, numerics.sigmoid_entries
    u_BTD = normed(x_BTD, p, "u", "v", numerics)
    i_BTD, f_BTD, g_BTD = (
        fixed.tmatmul(
            _scaled(u_BTD, p, name, f"x{name}", bits),
            p[f"trits/{name}"],
            shift=p[f"shift/{name}"],
            bits=bits,
        )
        for name in ("i", "f", "g")
    )
    forget_BTD = fixed.sig(f_BTD, frac=p["frac/f"], entries=entries)
    rest_D, lower_D = (p[f"bound/{k}"].astype(jnp.int32) for k in ("rest", "lower"))
    forget_BTD = fixed.add(fixed.mul(forget_BTD, rest_D, shift=fixed.GATE_FRAC), lower_D)
    gate_BTD = fixed.sig(i_BTD, frac=p["frac/i"], entries=entries)
    enters_BTD = fixed.mul(i_BTD, gate_BTD, shift=p["shift/c"])
    keeps_BTD = fixed.sub(jnp.full_like(forget_BTD, fixed.ONE), forget_BTD)
    enters_BTD = fixed.mul(enters_BTD, keeps_BTD, shift=fixed.GATE_FRAC)

    def step(h_BD: jax.Array, inputs: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array]:
        forget_BD, enters_BD, reset_B, padding_B = inputs
        before_BD = jnp.where(reset_B[:, None], 0, h_BD)
        new_BD = fixed.add(fixed.mul(before_BD, forget_BD, shift=fixed.GATE_FRAC), enters_BD)
        new_BD = jnp.where(padding_B[:, None], h_BD, new_BD)
        return new_BD, new_BD

    none_BT = jnp.zeros(x_BTD.shape[:2], bool)
    over_time = [
        jnp.swapaxes(y, 0, 1)
        for y in (
            forget_BTD,
            enters_BTD,
            none_BT if reset_BT is None else reset_BT,
            none_BT if padding_BT is None else padding_BT,
        )
    ]
    h_BD, h_TBD = jax.lax.scan(step, h_BD, tuple(over_time))
    h_BTD = jnp.swapaxes(h_TBD, 0, 1)
    silu_BTD = fixed.mul(
        h_BTD,
        fixed.sig(h_BTD, frac=p["frac/h"], entries=entries),
        shift=p["shift/sh"],
        bits=bits,
    )
    gate_BTD = _scaled(_norm(g_BTD, p, "gn", numerics), p, "gate_norm", "gs", 16)
    o_BTD = fixed.mul(gate_BTD, silu_BTD, shift=p["shift/o"], bits=bits)
    o_BTD = _scaled(_norm(o_BTD, p, "on", numerics), p, "o", "os", bits)
    return fixed.tmatmul(o_BTD, p["trits/o"], shift=p["shift/x1"]), h_BD


def glu(x_BTD: jax.Array, p: Tree, numerics: Numerics) -> jax.Array:
    """The channel mixer in integers: its update of the residual stream."""
    bits = numerics.activation_bits
    u_BTD = normed(x_BTD, p, "u2", "v2", numerics)
    u_BTD = _scaled(u_BTD, p, "gate", "xu", bits)
    gate_BTM, up_BTM = (
        fixed.tmatmul(u_BTD, p[f"trits/{name}"], shift=p[f"shift/{name}"], bits=bits)
        for name in ("gate", "up")
    )
    sigmoid_BTM = fixed.sig(gate_BTM, frac=p["frac/gate"], entries=numerics.sigmoid_entries)
    p_BTM = fixed.mul(gate_BTM, sigmoid_BTM, shift=p["shift/s"], bits=bits)
    p_BTM = fixed.mul(p_BTM, up_BTM, shift=p["shift/p"], bits=bits)
    p_BTM = _scaled(_norm(p_BTM, p, "pn", numerics), p, "down", "ps", bits)
    return fixed.tmatmul(p_BTM, p["trits/down"], shift=p["shift/x2"])


def block(
    x_BTD: jax.Array,
    h_BD: jax.Array,
    p: Tree,
    numerics: Numerics,
    reset_BT: jax.Array | None = None,
    padding_BT: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """One block in integers: the residual stream and the state after it.

    Args:
      x_BTD: the residual stream with p["frac/x0"] fraction bits.
      h_BD: the recurrent state with p["frac/h"].
      p: one layer of `Quantized.arrays["layers"]`.
      numerics: the switches.
      reset_BT: True where the state is dropped.
      padding_BT: True where it is held.
    """
    y_BTD, h_BD = mlgru(x_BTD, h_BD, p, numerics, reset_BT, padding_BT)
    x_BTD = fixed.add(x_BTD, y_BTD, shift=p["shift/add1"])
    y_BTD = glu(x_BTD, p, numerics)
    return fixed.add(x_BTD, y_BTD, shift=p["shift/add2"]), h_BD


def hidden(
    arrays: Tree,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array | None,
    h_LBD: jax.Array,
    numerics: Numerics,
) -> tuple[jax.Array, jax.Array]:
    """The residual stream after the last block and the state, both int32."""
    reset_BT = padding_BT = None
    if segment_ids_BT is not None:
        reset_BT, padding_BT = functional.document_edges(segment_ids_BT)

    def layer(x_BTD: jax.Array, inputs: tuple[Tree, jax.Array]) -> tuple[jax.Array, jax.Array]:
        p, h_BD = inputs
        return block(x_BTD, h_BD, p, numerics, reset_BT, padding_BT)

    x_BTD = jnp.take(arrays["embedding"], tokens_BT, axis=0).astype(jnp.int32)
    return jax.lax.scan(layer, x_BTD, (arrays["layers"], h_LBD.astype(jnp.int32)))


def logits(arrays: Tree, x: jax.Array, numerics: Numerics) -> jax.Array:
    """Final norm and head, [..., V] int32 with arrays["final"]["frac/logits"] fraction bits."""
    p = arrays["final"]
    u = normed(x.astype(jnp.int32), p, "u", "v", numerics)
    u = _scaled(u, p, "head", "xh", numerics.activation_bits)
    return fixed.tmatmul(u, p["trits/head"], shift=p["shift/logits"])
