"""The ternary product gives the same integers in every implementation."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.ternary_matmul import pallas_tpu, pallas_triton, reference, xla
from mmfree_jax.pallas_kernels.ternary_matmul.api import (
    IMPLEMENTATIONS,
    available_implementations,
    default_implementation,
    mosaic_config,
    ternarize,
    ternary_matmul,
)
from mmfree_jax.pallas_kernels.ternary_matmul.benchmark import MODEL_SHAPES


def operands(leading, n, k, seed=0):
    rng = np.random.default_rng(seed)
    x_q = rng.integers(-128, 128, (*leading, k)).astype(np.int8)
    x_q[..., 0] = -128
    trits = rng.integers(-1, 2, (n, k)).astype(np.int8)
    x_scale = rng.uniform(0.5, 2.0, (*leading, 1)).astype(np.float32)
    return x_q, x_scale, trits, np.full((1, 1), 0.37, np.float32)


@pytest.mark.parametrize("implementation", xla.OPERAND_DTYPES)
@pytest.mark.parametrize(
    ("leading", "n", "k"), [((1,), 1, 1), ((1,), 33, 257), ((3, 5), 40, 96), ((), 7, 513)]
)
def test_integers_are_exact(implementation, leading, n, k):
    x_q, _, trits, _ = operands(leading, n, k)
    expected = x_q.astype(np.int64) @ trits.astype(np.int64).T
    got = xla.integer_matmul(jnp.array(x_q), jnp.array(trits), implementation=implementation)
    np.testing.assert_array_equal(np.asarray(got, np.int64), expected)


@pytest.mark.parametrize("implementation", xla.OPERAND_DTYPES)
def test_largest_sum_is_exact(implementation):
    k = xla.MAX_FLOAT_COLUMNS - 1
    x_q = jnp.full((1, k), -128, jnp.int8).at[0, 0].set(-127)
    trits = jnp.ones((2, k), jnp.int8).at[1].multiply(-1)
    got = xla.integer_matmul(x_q, trits, implementation=implementation)
    total = 128 * k - 1
    np.testing.assert_array_equal(np.asarray(got, np.int64), [[-total, total]])


def test_float_operands_refuse_sums_that_could_round():
    x_q = jnp.ones((1, xla.MAX_FLOAT_COLUMNS), jnp.int8)
    with pytest.raises(ValueError, match="use 'xla_int8'"):
        xla.integer_matmul(x_q, x_q, implementation="xla_f32")


@pytest.mark.parametrize("implementation", [None, *xla.OPERAND_DTYPES])
@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_equals_the_reference_bit_for_bit(implementation, out_dtype):
    args = [jnp.array(a) for a in operands((2, 3), 20, 131)]
    expected = reference.ternary_matmul(*args, out_dtype=out_dtype)
    got = ternary_matmul(*args, out_dtype=out_dtype, implementation=implementation)
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.asarray(got.astype(jnp.float32)), np.asarray(expected.astype(jnp.float32))
    )


def test_ternarize_definition():
    w = np.random.default_rng(0).normal(size=(2, 9, 31)).astype(np.float32)
    trits, scale = ternarize(jnp.array(w))
    assert trits.shape == w.shape
    assert trits.dtype == jnp.int8
    assert scale.shape == (2, 1, 1)
    mean = np.abs(w.astype(np.float64)).mean((1, 2), keepdims=True)
    np.testing.assert_allclose(scale, mean, rtol=1e-6)
    np.testing.assert_array_equal(trits, np.clip(np.round(w / mean), -1, 1))
    zero_trits, zero_scale = ternarize(jnp.zeros((4, 4)))
    assert not zero_trits.any()
    assert float(zero_scale[0, 0]) == pytest.approx(1e-5)


def test_default_is_measured_or_xla():
    assert default_implementation(16384, 1024, 1024, device_kind="cpu") == "xla_int8"
    assert default_implementation(16384, 1024, 1024, device_kind="TPU v9") == "xla_int8"
    hopper = functools.partial(default_implementation, device_kind="NVIDIA H100 80GB HBM3")
    assert hopper(16384, 1024, 1024) == "pallas_mosaic_gpu"
    assert hopper(2048, 1024, 1024) == hopper(2048, 2560, 6912) == "pallas_mosaic_gpu"
    assert hopper(1, 1024, 1024) == hopper(1024, 1024, 1024) == "xla_int8"
    assert hopper(16384, 1000, 1024) == "xla_int8"
    assert set(available_implementations("gpu")) < set(IMPLEMENTATIONS)


def test_bad_operands_are_named():
    x_q, x_scale, trits, w_scale = (jnp.array(a) for a in operands((4,), 8, 16))
    with pytest.raises(TypeError, match="x_q must be int8, got float32"):
        ternary_matmul(x_q.astype(jnp.float32), x_scale, trits, w_scale)
    with pytest.raises(ValueError, match="do not fit"):
        ternary_matmul(x_q, x_scale, trits[:, :-1], w_scale)
    with pytest.raises(ValueError, match="x_scale must be"):
        ternary_matmul(x_q, x_scale[0], trits, w_scale)
    with pytest.raises(ValueError, match="one element"):
        ternary_matmul(x_q, x_scale, trits, jnp.ones((8, 1)))
    with pytest.raises(ValueError, match="'magic' is unknown"):
        ternary_matmul(x_q, x_scale, trits, w_scale, implementation="magic")


def test_ternarize_is_a_global_mean_under_a_mesh():
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    w = jax.random.normal(jax.random.key(0), (16, 32)) * jnp.arange(16)[:, None]
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("a", "b"))
    trits, scale = jax.jit(ternarize)(jax.device_put(w, sharding))
    expected_trits, expected_scale = ternarize(w)
    np.testing.assert_allclose(scale, expected_scale, rtol=1e-6)
    np.testing.assert_array_equal(trits, expected_trits)


@pytest.mark.parametrize("implementation", ["pallas_triton", "pallas_tpu"])
@pytest.mark.parametrize(("leading", "n", "k"), [((1,), 7, 64), ((3, 11), 45, 131)])
def test_kernels_equal_the_reference_bit_for_bit(implementation, leading, n, k):
    args = [jnp.array(a) for a in operands(leading, n, k)]
    expected = reference.ternary_matmul(*args, out_dtype=jnp.bfloat16)
    got = ternary_matmul(
        *args, out_dtype=jnp.bfloat16, implementation=implementation, interpret=True
    )
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(
        np.asarray(got.astype(jnp.float32)), np.asarray(expected.astype(jnp.float32))
    )


def test_kernels_walk_several_tiles():
    x_q, x_scale, trits, w_scale = (jnp.array(a) for a in operands((70,), 300, 400))
    expected = reference.ternary_matmul(x_q, x_scale, trits, w_scale)
    config = pallas_triton.Config(tile_m=16, tile_n=32, tile_k=64, group=2)
    got = pallas_triton.ternary_matmul(
        x_q, x_scale[:, 0], trits, w_scale[0], out_dtype=jnp.float32, config=config, interpret=True
    )
    np.testing.assert_array_equal(got, expected)
    got = pallas_tpu.ternary_matmul(
        x_q, x_scale, trits, w_scale, out_dtype=jnp.float32, block_m=32, block_n=128, block_k=128,
        interpret=True,
    )  # fmt: skip
    np.testing.assert_array_equal(got, expected)


def test_split_over_a_mesh_gathers_nothing():
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    x_q, x_scale, trits, w_scale = (jnp.array(a) for a in operands((8, 3), 20, 64))
    expected = reference.ternary_matmul(x_q, x_scale, trits, w_scale)
    split = jax.jit(
        functools.partial(
            ternary_matmul,
            implementation="pallas_triton",
            token_axes=("data", "fsdp"),
            interpret=True,
        )
    )
    with jax.set_mesh(mesh):
        tokens = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
        x_q, x_scale = jax.device_put((x_q, x_scale), tokens)
        compiled = split.lower(x_q, x_scale, trits, w_scale).compile()
        got = compiled(x_q, x_scale, trits, w_scale)
    np.testing.assert_array_equal(got, expected)
    assert "all-gather" not in compiled.as_text()


def test_measured_tiles_divide_their_shapes():
    for m, (n, k) in itertools.product((2048, 16384), MODEL_SHAPES):
        config = mosaic_config(m, n, k)
        sizes = zip((m, n, k), config.block, strict=True)
        assert not any(size % block for size, block in sizes), (m, n, k)


def test_tiles_are_those_of_the_nearest_number_of_tokens():
    few, many = (mosaic_config(m, 2560, 2560) for m in (2048, 16384))
    assert few != many
    assert mosaic_config(1, 2560, 2560) == mosaic_config(4096, 2560, 2560) == few
    assert mosaic_config(8192, 2560, 2560) == mosaic_config(1 << 20, 2560, 2560) == many
