"""BitLinear's values and straight-through gradients against compositions written here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels.bitlinear import pallas_tpu, reference
from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear, bitlinear_many
from mmfree_jax.pallas_kernels.norm_quant.api import norm_quant
from mmfree_jax.pallas_kernels.norm_quant.reference import quantize_int8, rms_norm
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize, ternary_matmul

TOLERANCE = 0.005  # relative RMS, bf16 included


def ste(value, quantized):
    return value + jax.lax.stop_gradient(quantized - value)


def oracle(x, outer, norms, ws, times_silu=None, *, eps, outer_eps, int8=True):
    """The double norm and the BitLinears in x's own precision, differentiable by JAX."""

    def rms(v, weight, e):
        return v / jnp.sqrt(jnp.mean(v * v, axis=-1, keepdims=True) + e) * weight

    if outer is not None:
        x = rms(x, outer, outer_eps)
    if times_silu is not None:
        x = x * times_silu / (1 + jnp.exp(-times_silu))
    outputs = []
    for b, w in zip(norms, ws, strict=True):
        n = x if b is None else rms(x, b, eps)
        if int8:
            s = 127 / jnp.maximum(jnp.abs(n).max(-1, keepdims=True), 1e-5)
            n = ste(n, jnp.clip(jnp.round(n * s), -128, 127) / s)
        s = 1 / jnp.maximum(jnp.abs(w).mean(), 1e-5)
        outputs.append(n @ ste(w, jnp.clip(jnp.round(w * s), -1, 1) / s).T)
    return tuple(outputs)


def inputs(leading, k, widths, seed=0, dtype=np.float32):
    rng = np.random.default_rng(seed)
    x = jnp.array(rng.normal(size=(*leading, k)) * 3, dtype)
    outer = jnp.array(rng.uniform(0.5, 1.5, k), jnp.float32)
    norms = tuple(jnp.array(rng.uniform(0.5, 1.5, k), jnp.float32) for _ in widths)
    ws = tuple(jnp.array(rng.normal(size=(n, k)) * 0.02, jnp.float32) for n in widths)
    cotangents = tuple(jnp.array(rng.normal(size=(*leading, n)), dtype) for n in widths)
    return x, outer, norms, ws, cotangents


def run(x, outer, norms, ws, **options):
    trits, scales = zip(*(ternarize(w) for w in ws), strict=True)
    return bitlinear_many(x, norms, ws, trits, scales, outer_norm_weight=outer, **options)


@functools.partial(jax.jit, static_argnums=0)
def gradients(function, x, outer, norms, ws, cotangents, *more):
    outputs, vjp = jax.vjp(function, x, outer, norms, ws, *more)
    cotangents = tuple(c.astype(o.dtype) for c, o in zip(cotangents, outputs, strict=True))
    return outputs, vjp(cotangents)


CASES = [
    # leading, K, widths, outer norm, own norms, int8
    ((2, 7), 48, (40, 24, 33), True, True, True),
    ((5,), 131, (17,), False, True, True),
    ((1,), 64, (9, 9), True, False, True),
    ((3, 4), 40, (16,), False, False, True),
    ((2, 3), 56, (24, 8), True, True, False),
]


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("leading", "k", "widths", "outer", "own", "int8"), CASES)
def test_against_float64(leading, k, widths, outer, own, int8, dtype):
    x, outer_weight, norms, ws, cotangents = inputs(leading, k, widths, dtype=dtype)
    outer_weight = outer_weight if outer else None
    norms = norms if own else None
    options = {"eps": 1e-6, "outer_eps": 1e-5}
    got = gradients(
        functools.partial(run, int8_activations=int8, **options),
        x, outer_weight, norms, ws, cotangents,
    )  # fmt: skip
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.array(np.asarray(a, np.float64)),
            (x, outer_weight, norms if own else (None,) * len(ws), ws, cotangents),
        )
        expected = gradients(functools.partial(oracle, int8=int8, **options), *wide)
        expected = jax.tree.map(np.asarray, expected)
    got_leaves, expected_leaves = jax.tree.leaves(got), jax.tree.leaves(expected)
    assert len(got_leaves) == len(expected_leaves)
    for g, e in zip(got_leaves, expected_leaves, strict=True):
        assert g.shape == e.shape
        assert relative_rms(g, e) < (TOLERANCE if dtype == jnp.bfloat16 else 2e-3)


@pytest.mark.parametrize(
    ("dtype", "int8"), [(jnp.float32, True), (jnp.bfloat16, True), (jnp.float32, False)]
)
def test_times_silu_against_float64(dtype, int8):
    """RMSNorm(x) * silu(s) inside the layer, and nothing kept of it but x, s and scalars."""
    x, outer, norms, ws, cotangents = inputs((3, 7), 51, (20,), dtype=dtype)
    s = inputs((3, 7), 51, (20,), seed=1, dtype=dtype)[0]
    options = {"eps": 1e-6, "outer_eps": 1e-5}

    def layer(x, outer, norms, ws, s):
        return run(x, outer, norms, ws, times_silu=s, int8_activations=int8, **options)

    got = gradients(layer, x, outer, norms, ws, cotangents, s)
    with jax.enable_x64(True):
        wide = jax.tree.map(
            lambda a: jnp.array(np.asarray(a, np.float64)), (x, outer, norms, ws, cotangents, s)
        )
        expected = gradients(functools.partial(oracle, int8=int8, **options), *wide)
        expected = jax.tree.map(np.asarray, expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.shape == e.shape
        assert relative_rms(g, e) < (TOLERANCE if dtype == jnp.bfloat16 else 2e-3)
    _, vjp = jax.vjp(layer, x, outer, norms, ws, s)
    assert sum(a.shape == x.shape for a in jax.tree.leaves(vjp)) == 2


@pytest.mark.parametrize("int8", [True, False])
def test_gated_equals_the_unit_in_front(int8):
    """silu(gate) * up inside the layer equals the layer of it, and keeps no copy of it."""
    x, _, norms, ws, cotangents = inputs((3, 5), 36, (20,))
    x = jnp.concatenate([x, x[::-1] * 0.7], axis=-1)
    options = {"eps": 1e-6, "int8_activations": int8}

    def composed(x, outer, norms, ws):
        gate, up = jnp.split(x, 2, axis=-1)
        return run(jax.nn.silu(gate) * up, outer, norms, ws, **options)

    gated = functools.partial(run, gated=True, **options)
    got = gradients(gated, x, None, norms, ws, cotangents)
    expected = gradients(composed, x, None, norms, ws, cotangents)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 1e-5
    _, vjp = jax.vjp(gated, x, None, norms, ws)
    assert not any(a.shape == (3, 5, 36) for a in jax.tree.leaves(vjp))


@pytest.mark.parametrize(
    ("own", "outer", "silu"), [(True, True, False), (False, False, False), (True, True, True)]
)
def test_tpu_kernel_equals_the_xla_program(own, outer, silu):
    x, outer_weight, (b,), (w,), _ = inputs((45,), 131, (270,), dtype=jnp.bfloat16)
    b, outer_weight = b if own else None, outer_weight if outer else None
    trits, scale = ternarize(w)
    s = inputs((45,), 131, (270,), seed=1)[0] if silu else None
    eps = {"eps": 1e-6, "outer_eps": 1e-5, "times_silu": s}
    y, stats = pallas_tpu.bitlinear(
        x, b, outer_weight, trits, scale, **eps, out_dtype=jnp.float32, interpret=True
    )
    _, (q,), (q_scale,), expected_stats = norm_quant(
        x, (b,), outer_weight, **eps, implementation="xla"
    )
    expected = ternary_matmul(q, q_scale, trits, scale)
    assert relative_rms(y, expected) < 1e-3
    assert jax.tree.structure(stats) == jax.tree.structure(expected_stats)
    for s, e in zip(jax.tree.leaves(stats), jax.tree.leaves(expected_stats), strict=True):
        np.testing.assert_allclose(s, e, rtol=1e-5)


def test_exact_values_in_float32():
    # Both factors are powers of two times integers, so that float32 rounds nowhere.
    x = jnp.array([[127.0, -127.0, 64.0, 1.0]])
    w = jnp.array([[1.0, -1.0, 0.0, 2.0], [0.0, 0.0, 0.0, -4.0]])
    trits, scale = ternarize(w)
    assert float(scale[0, 0]) == 1.0
    y, vjp = jax.vjp(lambda x, w: bitlinear(x, None, w, trits, scale, eps=0.0, norm=False), x, w)
    np.testing.assert_array_equal(y, [[255.0, -1.0]])
    dx, dw = vjp(jnp.array([[2.0, 3.0]]))
    np.testing.assert_array_equal(dx, [[2.0, -2.0, 0.0, -1.0]])
    np.testing.assert_array_equal(dw, np.outer([2.0, 3.0], x[0]))


def test_trits_and_scale_get_no_gradient_and_weights_no_forward():
    x, _, (b,), (w,), _ = inputs((4,), 32, (8,))
    trits, scale = ternarize(w)

    def loss(w, scale):
        return bitlinear(x, b, w, trits, scale, eps=1e-6).sum()

    assert not np.asarray(jax.grad(loss, argnums=1)(w, scale)).any()
    # The forward reads the trits, whatever the master weight holds.
    np.testing.assert_array_equal(loss(w, scale), loss(jnp.full_like(w, jnp.nan), scale))
    no_weight = bitlinear(x, b, None, trits, scale, eps=1e-6)
    np.testing.assert_array_equal(no_weight, bitlinear(x, b, w, trits, scale, eps=1e-6))


def test_many_equals_composition():
    """One pass of statistics equals the block norm followed by each BitLinear."""
    x, outer, norms, ws, cotangents = inputs((3, 16), 96, (32, 24, 40), seed=3)

    def composed(x, outer, norms, ws):
        h = rms_norm(x, outer, eps=1e-5)
        return tuple(
            bitlinear(h, b, w, *ternarize(jax.lax.stop_gradient(w)), eps=1e-6)
            for b, w in zip(norms, ws, strict=True)
        )

    many = functools.partial(run, eps=1e-6, outer_eps=1e-5)
    got = gradients(many, x, outer, norms, ws, cotangents)
    expected = gradients(composed, x, outer, norms, ws, cotangents)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 1e-3
    # Count the quantised inputs that differ, read off through an identity matrix.
    eye, one = jnp.eye(96, dtype=jnp.int8), jnp.ones((1, 1))
    (q_many,) = bitlinear_many(
        x, norms[:1], (None,), (eye,), (one,), eps=1e-6, outer_norm_weight=outer, outer_eps=1e-5
    )
    q, scale = quantize_int8(rms_norm(rms_norm(x, outer, eps=1e-5), norms[0], eps=1e-6))
    steps = np.round(np.asarray(q_many / scale)) - np.asarray(q)
    assert np.abs(steps).max() <= 1
    assert (steps != 0).mean() < 1e-3


def test_skip_returns_the_input_and_adds_its_gradient():
    x, outer, norms, ws, cotangents = inputs((3, 4), 32, (16, 24), seed=4)
    around = cotangents[0][..., :1] * x

    def total(x, skip):
        *ys, x = (
            *run(x, outer, norms, ws, eps=1e-6, outer_eps=1e-5, skip=skip),
            *([] if skip else [x]),
        )
        return sum(jnp.sum(y * c) for y, c in zip(ys, cotangents, strict=True)) + jnp.sum(
            x * around
        )

    value, gradient = jax.value_and_grad(total)(x, True)
    expected_value, expected = jax.value_and_grad(total)(x, False)
    np.testing.assert_allclose(value, expected_value, rtol=1e-6)
    assert relative_rms(gradient, expected) < 1e-6


def test_reference_agrees():
    x, _, (b,), (w,), (c,) = inputs((6,), 72, (24,))
    trits, scale = ternarize(w)
    got = jax.vjp(lambda *a: bitlinear(*a, trits, scale, eps=1e-6), x, b, w)
    expected = jax.vjp(lambda *a: reference.bitlinear(*a, eps=1e-6), x, b, w)
    assert relative_rms(got[0], expected[0]) < 1e-5
    for g, e in zip(got[1](c), expected[1](c), strict=True):
        assert relative_rms(g, e) < 1e-5


@pytest.mark.parametrize("implementation", ["xla_int8", "xla_bf16", "xla_f32"])
def test_implementations_agree_bit_for_bit(implementation):
    x, outer, norms, ws, _ = inputs((2, 5), 67, (31, 8))
    expected = run(x, outer, norms, ws, eps=1e-6)
    got = run(x, outer, norms, ws, eps=1e-6, implementation=implementation)
    for g, e in zip(got, expected, strict=True):
        np.testing.assert_array_equal(g, e)


def test_under_scan_and_remat():
    layers, k = 3, 32
    rng = np.random.default_rng(5)
    ws = jnp.array(rng.normal(size=(layers, k, k)), jnp.float32)
    bs = jnp.array(rng.uniform(0.5, 1.5, (layers, k)), jnp.float32)
    x = jnp.array(rng.normal(size=(4, k)), jnp.float32)
    trits, scales = ternarize(ws)

    def layer(h, parameters):
        b, w, t, s = parameters
        return h + bitlinear(h, b, w, t, s, eps=1e-6), None

    def scanned(x, bs, ws):
        return jax.lax.scan(jax.checkpoint(layer), x, (bs, ws, trits, scales))[0].sum()

    def unrolled(x, bs, ws):
        for i in range(layers):
            x, _ = layer(x, (bs[i], ws[i], trits[i], scales[i]))
        return x.sum()

    got = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1, 2)))(x, bs, ws)
    expected = jax.value_and_grad(unrolled, argnums=(0, 1, 2))(x, bs, ws)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 2e-3


@pytest.mark.parametrize("w_spec", [(None, "data"), ("model", None), ("model", "data")])
def test_sharded_equals_unsharded(w_spec):
    P, Named = jax.sharding.PartitionSpec, jax.sharding.NamedSharding
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, outer, norms, ws, cotangents = inputs((8, 6), 32, (16, 24), seed=7)

    @jax.jit
    def step(x, outer, norms, ws):
        return gradients(functools.partial(run, eps=1e-6), x, outer, norms, ws, cotangents)

    expected = step(x, outer, norms, ws)
    got = step(
        jax.device_put(x, Named(mesh, P("data"))),
        jax.device_put(outer, Named(mesh, P())),
        jax.device_put(norms, Named(mesh, P())),
        jax.device_put(ws, Named(mesh, P(*w_spec))),
    )
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 2e-3


def test_residuals_are_the_input_and_scalars():
    """The backward of three BitLinears keeps x, trits and weights: no normalised copy."""
    x, outer, norms, ws, _ = inputs((4, 8), 64, (64, 64, 64), dtype=jnp.bfloat16)
    trits, scales = zip(*(ternarize(w) for w in ws), strict=True)

    def f(x, outer, norms, ws):
        return bitlinear_many(x, norms, ws, trits, scales, eps=1e-6, outer_norm_weight=outer)

    _, vjp = jax.vjp(f, x, outer, norms, ws)
    token_sized = [a for a in jax.tree.leaves(vjp) if a.shape[:2] == x.shape[:2]]
    assert sum(a.shape[-1] == 64 for a in token_sized) == 1
    assert all(a.shape[-1] in (1, 64) for a in token_sized)
    assert not any(a.shape == ws[0].shape and a.dtype == jnp.float32 for a in jax.tree.leaves(vjp))


def test_gradients_of_all_zero_tokens_are_finite():
    x, outer, norms, ws, cotangents = inputs((3,), 16, (8,))
    x = x.at[1].set(0.0)
    outputs, grads = gradients(functools.partial(run, eps=1e-6), x, outer, norms, ws, cotangents)
    assert all(np.isfinite(a).all() for a in jax.tree.leaves((outputs, grads)))
    np.testing.assert_array_equal(outputs[0][1], 0)


def test_bad_arguments_are_named():
    x, _, (b,), (w,), _ = inputs((4,), 16, (8,))
    trits, scale = ternarize(w)
    call = functools.partial(bitlinear, eps=1e-6)
    with pytest.raises(ValueError, match="needs norm_weight"):
        call(x, None, w, trits, scale)
    with pytest.raises(TypeError, match="trits must be int8, got float32"):
        call(x, b, w, w, scale)
    with pytest.raises(ValueError, match="w must be"):
        call(x, b, w[:3], trits, scale)
    with pytest.raises(ValueError, match=r"trits must be \[N, 15\]"):
        call(x[:, 1:], b[1:], w, trits, scale)
    with pytest.raises(ValueError, match="norm_weight must be"):
        call(x, b[1:], w, trits, scale)
    with pytest.raises(TypeError, match="x must be floating"):
        call(trits, b, w, trits, scale)
    with pytest.raises(ValueError, match="times_silu needs outer_norm_weight"):
        bitlinear_many(x, (b,), (w,), (trits,), (scale,), eps=1e-6, times_silu=x)
    with pytest.raises(ValueError, match="times_silu must be"):
        bitlinear_many(
            x, (b,), (w,), (trits,), (scale,), eps=1e-6, outer_norm_weight=b, times_silu=x[:2]
        )
    with pytest.raises(ValueError, match="ws has 0 entries"):
        bitlinear_many(x, (b,), (), (trits,), (scale,), eps=1e-6)
