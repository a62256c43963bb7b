"""The decode kernels for a few rows against plain jnp, on odd shapes, integers exact."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.decode import fused_gpu
from mmfree_jax.pallas_kernels.decode.api import Linears
from mmfree_jax.pallas_kernels.norm_quant.reference import rms_norm
from mmfree_jax.pallas_kernels.packed_matmul import reference
from mmfree_jax.pallas_kernels.packed_matmul.words import plane_columns, to_words

EPS, OUTER_EPS = 1e-6, 1e-5


def random_trits(rng, *shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.int8)


def make_layer(rng, layers, outputs, columns, count):
    """Weights for the kernels, and the trits for the reference."""
    trits = [random_trits(rng, layers, outputs, columns) for _ in range(count)]
    scales = [jnp.asarray(rng.uniform(0.01, 0.05, (layers, 1, 1)), jnp.float32) for _ in trits]
    norms = [jnp.asarray(rng.uniform(0.5, 1.5, (layers, columns)), jnp.float32) for _ in trits]
    words = [to_words(reference.pack(t), columns) for t in trits]
    return Linears(tuple(words), tuple(scales), tuple(norms)), trits


def expected(x, weights, trits, layer, outer, dtype):
    @jax.jit
    def call(x, weights, trits, outer):
        return bitlinear_many(
            x,
            tuple(n[layer] for n in weights.norms),
            (None,) * len(trits),
            tuple(t[layer] for t in trits),
            tuple(s[layer] for s in weights.scales),
            eps=EPS,
            outer_norm_weight=None if outer is None else outer[layer],
            outer_eps=OUTER_EPS,
            out_dtype=dtype,
            implementation="xla_int8",
        )

    return call(x, weights, trits, outer)


def f32(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


SHAPES = [(1, 48, 1), (3, 22, 2)]
OPTIONS = {"eps": EPS, "interpret": True}
close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_mixer_in(layers, width, batch, dtype):
    rng = np.random.default_rng(width)
    weights, trits = make_layer(rng, layers, width, width, 3)
    x, outer = f32(rng, batch, width).astype(dtype), f32(rng, layers, width)
    bound = jnp.asarray(rng.uniform(0, 1, (layers, width)), jnp.float32)
    h = f32(rng, layers, batch, width)
    layer = layers - 1
    i, f, g = expected(x, weights, trits, layer, outer, dtype)
    i, f = i.astype(jnp.float32), f.astype(jnp.float32)
    forget = bound[layer] + (1 - bound[layer]) * jax.nn.sigmoid(f)
    new = forget * h[layer] + (1 - forget) * jax.nn.silu(i)
    found_g, found_h = fused_gpu.mixer_in(
        x, jnp.array([layer]), outer, weights, bound, h, dtype=dtype, outer_eps=OUTER_EPS,
        **OPTIONS,
    )  # fmt: skip
    assert found_g.dtype == dtype
    # In bfloat16 one unit in the last place; the integers behind it are the same.
    rtol = 2e-5 if dtype == jnp.float32 else 1e-2
    close(found_g.astype(jnp.float32), g.astype(jnp.float32), rtol=rtol)
    close(found_h, new, rtol=rtol, atol=1e-4)


@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_mixer_out(layers, width, batch):
    rng = np.random.default_rng(width)
    weights, trits = make_layer(rng, layers, width, width, 1)
    g, h, gate = f32(rng, batch, width), f32(rng, batch, width), f32(rng, layers, width)
    residual, layer = f32(rng, batch, width), layers - 1
    gated = rms_norm(g, gate[layer], eps=OUTER_EPS) * jax.nn.silu(h)
    (update,) = expected(gated, weights, trits, layer, None, jnp.float32)
    found = fused_gpu.mixer_out(
        g, h, jnp.array([layer]), gate, weights, residual, dtype=jnp.float32,
        outer_eps=OUTER_EPS, **OPTIONS,
    )  # fmt: skip
    close(found, residual + update)


@pytest.mark.parametrize(("layers", "width", "batch"), SHAPES)
def test_glu(layers, width, batch):
    rng = np.random.default_rng(width)
    inner = width + 6
    weights, trits = make_layer(rng, layers, 2 * inner, width, 1)
    x, outer, layer = f32(rng, batch, width), f32(rng, layers, width), layers - 1
    (gate_up,) = expected(x, weights, trits, layer, outer, jnp.float32)
    z = jax.nn.silu(gate_up[:, :inner]) * gate_up[:, inner:]
    found = fused_gpu.glu_in(
        x, jnp.array([layer]), outer, weights, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS
    )
    close(found, z)
    weights, trits = make_layer(rng, layers, width, inner, 1)
    (update,) = expected(z, weights, trits, layer, None, jnp.float32)
    found = fused_gpu.glu_out(z, jnp.array([layer]), weights, x, dtype=jnp.float32, **OPTIONS)
    close(found, x + update)


def test_head_and_exact_integers():
    rng = np.random.default_rng(1)
    weights, trits = make_layer(rng, 1, 83, 40, 1)
    x, outer = f32(rng, 3, 40), jnp.ones((1, 40))
    (logits,) = expected(x, weights, trits, 0, outer, jnp.float32)
    found = fused_gpu.head(x, outer, weights, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS)
    close(found, logits)
    # With the scales divided out, what remains are the integers of the reference.
    unit = dataclasses.replace(weights, scales=(jnp.ones((1, 1, 1)),), norms=(jnp.ones((1, 40)),))
    q = jnp.asarray(rng.integers(-127, 128, (2, 40)), jnp.float32).at[:, 0].set(127)
    rms = jnp.sqrt(jnp.mean(q * q, axis=1))
    sums = fused_gpu.head(q, outer, unit, dtype=jnp.float32, outer_eps=OUTER_EPS, **OPTIONS)
    integers = np.asarray(q, np.int64) @ np.asarray(trits[0][0], np.int64).T
    np.testing.assert_array_equal(np.rint(np.asarray(sums * rms[:, None])), integers)


def test_too_many_rows_and_wrong_words_are_refused():
    rng = np.random.default_rng(0)
    weights, _ = make_layer(rng, 1, 8, 16, 1)
    outer = jnp.ones((1, 16))
    call = functools.partial(
        fused_gpu.head, outer_norm=outer, weights=weights, dtype=jnp.float32,
        outer_eps=OUTER_EPS, **OPTIONS,
    )  # fmt: skip
    with pytest.raises(ValueError, match="at most 8"):
        call(jnp.ones((9, 16)))
    with pytest.raises(ValueError, match="words are"):
        call(jnp.ones((1, 40)))


@pytest.mark.parametrize(("width", "inner", "batch"), [(1024, 2816, 1), (2560, 6912, 4)])
def test_kernels_lower_for_cuda(width, inner, batch, lower_for_cuda):
    def shape(*dims, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(dims, dtype)

    def layer(outputs, columns, count):
        words = plane_columns(columns) // 4
        return Linears(
            (shape(2, outputs, words, dtype=jnp.int32),) * count,
            (shape(2, 1, 1),) * count,
            (shape(2, columns, dtype=jnp.bfloat16),) * count,
        )

    x, index = shape(batch, width, dtype=jnp.bfloat16), shape(1, dtype=jnp.int32)
    norm, h = shape(2, width), shape(batch, width)
    options = {"eps": EPS, "dtype": jnp.bfloat16}
    norms = options | {"outer_eps": OUTER_EPS}
    cases = [
        (fused_gpu.mixer_in, norms, x, index, norm, layer(width, width, 3), norm,
         shape(2, batch, width)),
        (fused_gpu.mixer_out, norms, x, h, index, norm, layer(width, width, 1), x),
        (fused_gpu.glu_in, norms, x, index, norm, layer(2 * inner, width, 1)),
        (fused_gpu.glu_out, options, shape(batch, inner, dtype=jnp.bfloat16), index,
         layer(width, inner, 1), x),
    ]  # fmt: skip
    for function, keywords, *args in cases:
        lowered = lower_for_cuda(functools.partial(function, **keywords), *args)
        assert "triton" in lowered.as_text()
