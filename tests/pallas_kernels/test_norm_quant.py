"""The fused double norm and quantisation: definition, kernels in interpret mode, backward."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels.norm_quant import api
from mmfree_jax.pallas_kernels.norm_quant.reference import norm_quantize, quantize_int8, rms_norm

EPS = {"eps": 1e-6, "outer_eps": 1e-5}
# (tokens, K, own norms, outer norm): odd sizes, one token, one consumer and several.
CASES = [
    ((11,), 131, 3, True),
    ((2, 3), 64, 1, True),
    ((1,), 100, 2, False),
    ((5,), 48, 0, True),
    ((4,), 33, 0, False),
]
# Those of a GPU take multiples of 128 columns: test_mosaic.py.
KERNELS = ["pallas_tpu"]


def inputs(leading, k, own, outer, dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def weight():
        return jnp.array(rng.uniform(0.5, 1.5, k), jnp.float32)

    x = jnp.array(rng.normal(size=(*leading, k)) * 3, dtype)
    weights = tuple(weight() for _ in range(own)) or (None,)
    gradients = tuple(jnp.array(rng.normal(size=x.shape), dtype) for _ in weights)
    scales = tuple(jnp.full((1, 1), 0.2 + 0.3 * j, jnp.float32) for j in range(len(weights)))
    return x, weights, weight() if outer else None, gradients, scales


def test_definition():
    x = jnp.array([[3.0, -4.0, 0.0, 0.0]])
    weight = jnp.array([1.0, 1.0, 2.0, 2.0])
    np.testing.assert_allclose(rms_norm(x, weight, eps=0.0), [[1.2, -1.6, 0.0, 0.0]], rtol=1e-6)
    q, scale = norm_quantize(x, weight, eps=0.0)
    np.testing.assert_array_equal(q, [[95, -127, 0, 0]])
    np.testing.assert_allclose(scale, [[1.6 / 127]], rtol=1e-6)


def test_halves_round_to_even_and_zero_stays_zero():
    x = jnp.array([[127.0, 0.5, 1.5, 2.5, -0.5, -1.5], [0.0] * 6])
    q, scale = quantize_int8(x)
    np.testing.assert_array_equal(q, [[127, 0, 2, 2, 0, -2], [0] * 6])
    np.testing.assert_allclose(scale, [[1.0], [1e-5 / 127]], rtol=1e-6)


@pytest.mark.parametrize(("leading", "k", "own", "outer"), CASES)
def test_xla_equals_composition(leading, k, own, outer):
    x, weights, outer_weight, *_ = inputs(leading, k, own, outer)
    _, qs, scales, _ = api.norm_quant(x, weights, outer_weight, **EPS, implementation="xla")
    h = rms_norm(x, outer_weight, eps=1e-5) if outer else x
    for weight, q, scale in zip(weights, qs, scales, strict=True):
        n = h if weight is None else rms_norm(h, weight, eps=1e-6)
        expected_q, expected_scale = quantize_int8(n)
        np.testing.assert_allclose(scale, expected_scale, rtol=1e-5)
        steps = np.asarray(q, int) - np.asarray(expected_q, int)
        assert np.abs(steps).max() <= 1
        assert (steps != 0).mean() < 1e-3


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(
    ("leading", "k", "own", "outer", "dtype"),
    [
        (*case, dtype)
        for case, dtype in zip(
            CASES, ["float32", "bfloat16", "bfloat16", "float32", "bfloat16"], strict=True
        )
    ],
)
def test_kernels_equal_xla(implementation, leading, k, own, outer, dtype):
    dtype = jnp.dtype(dtype)
    x, weights, outer_weight, gradients, scales = inputs(leading, k, own, outer, dtype)
    residual = inputs(leading, k, 0, False, dtype, seed=1)[0]
    forward = functools.partial(api.norm_quant, **EPS, residual=residual)
    expected = jax.jit(functools.partial(forward, implementation="xla"))(x, weights, outer_weight)
    got = jax.jit(functools.partial(forward, implementation=implementation, interpret=True))(
        x, weights, outer_weight
    )
    np.testing.assert_array_equal(got[0].astype(jnp.float32), expected[0].astype(jnp.float32))
    for q, expected_q in zip(got[1], expected[1], strict=True):
        steps = np.asarray(q, int) - np.asarray(expected_q, int)
        # bf16 values without a norm often lie exactly on a rounding boundary.
        assert np.abs(steps).max() <= 1
        assert (steps != 0).mean() < (0.03 if dtype == jnp.bfloat16 and own == 0 else 1e-3)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got[2:]), jax.tree.leaves(expected[2:]), strict=True):
        assert g.shape == e.shape
        np.testing.assert_allclose(g, e, rtol=2e-6)

    stats = expected[3]
    backward = functools.partial(api.norm_backward, eps=1e-6, d_skip=residual)
    arguments = (expected[0], weights, outer_weight, stats, gradients, scales)
    expected = jax.jit(functools.partial(backward, implementation="xla"))(*arguments)
    got = jax.jit(functools.partial(backward, implementation=implementation, interpret=True))(
        *arguments
    )
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.shape == e.shape
        assert relative_rms(g, e) < (5e-3 if dtype == jnp.bfloat16 else 1e-5)


@pytest.mark.parametrize("implementation", KERNELS)
def test_gated_kernels_equal_xla(implementation):
    x = inputs((5,), 96, 0, False)[0]
    _, weights, _, gradients, scales = inputs((5,), 48, 1, False)

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, x):
        options = {"implementation": implementation, "interpret": True, "gated": True}
        forward = api.norm_quant(x, weights, eps=1e-6, **options)
        return forward, api.norm_backward(
            x, weights, None, forward[3], gradients, scales, eps=1e-6, **options
        )

    got, expected = both(implementation, x), both("xla", x)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.shape == e.shape
        assert relative_rms(g, e) < 1e-3
    with pytest.raises(ValueError, match="gated=True takes no residual"):
        api.norm_quant(x, weights, eps=1e-6, gated=True, residual=x)


@pytest.mark.parametrize("implementation", KERNELS)
@pytest.mark.parametrize(("leading", "k", "own"), [((37,), 131, 2), ((2, 3), 64, 0)])
def test_times_silu_kernels_equal_xla(implementation, leading, k, own):
    x, weights, outer_weight, gradients, scales = inputs(leading, k, own, True)
    s = inputs(leading, k, 0, False, jnp.bfloat16, seed=1)[0]

    @functools.partial(jax.jit, static_argnums=0)
    def both(implementation, x, s):
        options = {"implementation": implementation, "interpret": True, "times_silu": s}
        forward = api.norm_quant(x, weights, outer_weight, **EPS, **options)
        return forward, api.norm_backward(
            x, weights, outer_weight, forward[3], gradients, scales, eps=1e-6, d_skip=x, **options
        )

    got, expected = both(implementation, x, s), both("xla", x, s)
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert g.shape == e.shape
        assert g.dtype == e.dtype
        assert relative_rms(g, e) < 1e-3
    with pytest.raises(ValueError, match="times_silu needs outer_weight"):
        api.norm_quant(x, weights, eps=1e-6, times_silu=s)


@pytest.mark.parametrize(
    ("leading", "k", "own", "outer", "silu"),
    [*((*case, False) for case in CASES[:3]), *((*case, True) for case in CASES[:2])],
)
def test_backward_equals_autodiff(leading, k, own, outer, silu):
    x, weights, outer_weight, gradients, scales = inputs(leading, k, own, outer)
    s = inputs(leading, k, 0, False, seed=1)[0] if silu else None

    def norms(x, weights, outer_weight, s):
        h = rms_norm(x, outer_weight, eps=1e-5) if outer else x
        h = h if s is None else h * jax.nn.silu(s)
        return tuple(rms_norm(h, b, eps=1e-6) for b in weights)

    _, vjp = jax.vjp(norms, x, weights, outer_weight, s)
    expected = vjp(tuple(g * scale for g, scale in zip(gradients, scales, strict=True)))
    options = {"times_silu": s, "implementation": "xla"}
    stats = api.norm_quant(x, weights, outer_weight, **EPS, **options)[3]
    got = api.norm_backward(
        x, weights, outer_weight, stats._replace(absmaxes=()), gradients, scales, eps=1e-6,
        **options,
    )  # fmt: skip
    assert got[3] == ()
    assert (got[4] is not None) == silu
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 1e-5


@pytest.mark.parametrize("implementation", ["xla", "pallas_gpu"])
@pytest.mark.parametrize("gated", [False, True])
def test_the_gradient_around_the_norm_is_added(implementation, gated):
    k = 128
    x, weights, _, gradients, scales = inputs((9,), k, 1, False)
    if gated:
        x = jnp.concatenate([x, x[::-1]], axis=-1)
    options = {"implementation": implementation, "interpret": True, "gated": gated}
    stats = api.norm_quant(x, weights, eps=1e-6, **options)[3]
    d_skip = inputs((9,), x.shape[-1], 0, False, seed=1)[0]
    arguments = (x, weights, None, stats, gradients, scales)
    without = api.norm_backward(*arguments, eps=1e-6, **options)
    added = api.norm_backward(*arguments, eps=1e-6, d_skip=d_skip, **options)
    assert relative_rms(added[0], without[0] + d_skip) < 1e-6
    assert relative_rms(added[1][0], without[1][0]) < 1e-6


@pytest.mark.parametrize("implementation", KERNELS)
def test_split_over_a_mesh_equals_whole(implementation):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x, weights, outer_weight, gradients, scales = inputs((8, 3), 128, 2, True)
    axes = {"token_axes": ("data", "fsdp"), "implementation": implementation, "interpret": True}

    @functools.partial(jax.jit, static_argnums=0)
    def both(split, x, s, gradients):
        keywords = (axes if split else {"implementation": "xla"}) | {"times_silu": s}
        forward = api.norm_quant(x, weights, outer_weight, **EPS, **keywords)
        stats = forward[3]
        backward = api.norm_backward(
            x, weights, outer_weight, stats, gradients, scales, eps=1e-6, **keywords
        )
        return forward, backward

    s = inputs((8, 3), 128, 0, False, seed=1)[0]
    expected = both(False, x, s, gradients)
    sharding = jax.NamedSharding(mesh, jax.P(("data", "fsdp")))
    with jax.set_mesh(mesh):
        arguments = jax.device_put((x, s, gradients), sharding)
        compiled = both.lower(True, *arguments).compile()
        got = compiled(*arguments)
    for g, e in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert relative_rms(g, e) < 1e-3
    # The only collective sums the norm weights' gradients.
    text = compiled.as_text()
    assert "all-gather" not in text
    assert "all-reduce" in text


def test_default_is_measured_or_xla():
    assert api.default_implementation(1024, device_kind="cpu") == "xla"
    assert api.default_implementation(1024, device_kind="TPU v5 lite") == "xla"
    h100 = functools.partial(api.default_implementation, device_kind="NVIDIA H100 80GB HBM3")
    assert h100(1024) == "pallas_gpu"
    assert h100(10000) == "xla"
    with pytest.raises(ValueError, match="'magic' is unknown"):
        api.norm_quant(jnp.ones((2, 4)), (None,), eps=1e-6, implementation="magic")
