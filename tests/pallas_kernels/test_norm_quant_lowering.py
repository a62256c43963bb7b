"""The kernels lower for their devices on a machine that has none of them."""

import functools

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfree_jax.pallas_kernels.bitlinear.api import bitlinear_many
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize, ternary_matmul

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
MARKS = {
    "pallas_triton": "triton",
    "pallas_mosaic_gpu": "mosaic_gpu",
    "pallas_gpu": "mosaic_gpu",
    "pallas_tpu": "tpu_custom_call",
}


def lower(function, implementation, *shapes):
    """StableHLO of the function for the implementation's device."""
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]
    traceable = jax.jit(functools.partial(function, implementation=implementation))
    if implementation == "pallas_tpu":
        return traceable.trace(*arguments).lower(lowering_platforms=("tpu",)).as_text()
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        return traceable.trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()


def kernels(text, implementation):
    return text.count(MARKS[implementation])


@pytest.mark.parametrize("implementation", ["pallas_triton", "pallas_mosaic_gpu", "pallas_tpu"])
@pytest.mark.parametrize(("m", "n", "k"), [(512, 512, 1024), (33, 45, 131)])
def test_ternary_matmul(implementation, m, n, k):
    text = lower(
        functools.partial(ternary_matmul, out_dtype=jnp.bfloat16),
        implementation,
        ((m, k), jnp.int8),
        ((m, 1), jnp.float32),
        ((n, k), jnp.int8),
        ((1, 1), jnp.float32),
    )
    assert kernels(text, implementation)


@pytest.mark.parametrize(
    ("implementation", "k"), [("pallas_gpu", 1024), ("pallas_tpu", 1024), ("pallas_tpu", 131)]
)
def test_norm_quant_and_backward(implementation, k):
    def both(x, a, b, g, implementation):
        x, qs, _, stats = norm_quant.norm_quant(
            x, (b, b), a, eps=1e-6, residual=x, implementation=implementation
        )
        scale = jnp.ones((1, 1))
        backward = norm_quant.norm_backward(
            x, (b, b), a, stats, (g, g), (scale, scale), eps=1e-6, implementation=implementation
        )
        return qs, backward

    token, weight = ((96, k), jnp.bfloat16), ((k,), jnp.float32)
    assert kernels(lower(both, implementation, token, weight, weight, token), implementation)


@pytest.mark.parametrize("implementation", ["pallas_mosaic_gpu", "pallas_tpu"])
@pytest.mark.parametrize("form", ["plain", "times_silu", "gated"])
def test_training_a_layer(implementation, form):
    def loss(x, b, w, implementation):
        trits, scale = ternarize(jax.lax.stop_gradient(w))
        behind = {"outer_norm_weight": b, "times_silu": x * 2} if form == "times_silu" else {}
        (y,) = bitlinear_many(
            x, (b,), (w,), (trits,), (scale,), eps=1e-6, implementation=implementation,
            gated=form == "gated", **behind,
        )  # fmt: skip
        return jnp.sum(y.astype(jnp.float32))

    def gradient(x, b, w, implementation):
        # With its value: the gradient alone does not need the forward product.
        return jax.value_and_grad(
            functools.partial(loss, implementation=implementation), (0, 1, 2)
        )(x, b, w)

    text = lower(
        gradient,
        implementation,
        ((2, 256, 512 if form == "gated" else 256), jnp.bfloat16),
        ((256,), jnp.float32),
        ((256, 256), jnp.float32),
    )
    assert kernels(text, implementation)


@pytest.mark.parametrize("backward", ["bf16", "int8"])
def test_layers_of_one_shape_share_their_kernels(backward):
    """Written once each, not once a layer: they are most of a program's text, and of its start."""

    def gradient(layers, x, bs, ws, implementation):
        def loss(x, bs, ws):
            for b, w in [*zip(bs, ws, strict=True)][:layers]:
                trits, scale = ternarize(jax.lax.stop_gradient(w))
                (y,) = bitlinear_many(
                    x, (b,), (w,), (trits,), (scale,), eps=1e-6, implementation=implementation,
                    backward=backward,
                )  # fmt: skip
                x = x + y
            return jnp.sum(x.astype(jnp.float32))

        return jax.value_and_grad(loss, (0, 1, 2))(x, bs, ws)

    def written(layers):
        text = lower(
            functools.partial(gradient, layers),
            "pallas_mosaic_gpu",
            ((1024, 1024), jnp.bfloat16),
            ((4, 1024), jnp.float32),
            ((4, 1024, 1024), jnp.float32),
        )
        return text.count("@mosaic_gpu_v2("), text.count("xla.gpu.triton(")

    mosaic, triton = written(2)  # with one alone no gradient goes on to another
    assert written(4) == (mosaic, triton)
    assert mosaic
    assert (triton > 0) == (backward == "int8")
