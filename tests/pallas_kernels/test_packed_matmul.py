"""Packed formats and products against plain jnp, on odd shapes, integers exact."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels.norm_quant.api import norm_quant
from mmfree_jax.pallas_kernels.packed_matmul import pallas_gpu, reference, rows_gpu
from mmfree_jax.pallas_kernels.packed_matmul.api import packed_matmul
from mmfree_jax.pallas_kernels.packed_matmul.words import from_words, plane_columns, to_words

EPS, OUTER_EPS = 1e-6, 1e-5


def random_trits(rng, *shape):
    return jnp.asarray(rng.integers(-1, 2, shape), jnp.int8)


@pytest.mark.parametrize("bits", ["2", "1.6"])
@pytest.mark.parametrize("columns", [1, 3, 4, 5, 17, 20, 64, 101])
def test_unpack_inverts_pack(bits, columns):
    trits = random_trits(np.random.default_rng(columns), 2, 3, columns)
    packed = reference.pack(trits, bits=bits)
    assert packed.dtype == jnp.uint8
    assert packed.shape == (2, 3, reference.packed_columns(columns, bits))
    np.testing.assert_array_equal(reference.unpack(packed, columns, bits=bits), trits)


def test_the_planar_layout_is_as_documented():
    trits = np.array([[-1, 0, 1, 1, 0, -1, 1, -1]], np.int8)
    packed = np.asarray(reference.pack(jnp.asarray(trits)))
    for k in range(2):
        digits = [int(packed[0, k]) >> (2 * j) & 3 for j in range(4)]
        assert digits == [int(trits[0, 2 * j + k]) + 1 for j in range(4)]


@pytest.mark.parametrize(
    ("implementation", "bits"),
    [("xla", "2"), ("xla", "1.6"), ("pallas_gpu", "2"), ("pallas_tpu", "2")],
)
@pytest.mark.parametrize(("m", "n", "k"), [(1, 19, 45), (17, 70, 261)])
def test_packed_product_is_exact(implementation, bits, m, n, k):
    rng = np.random.default_rng(0)
    trits = random_trits(rng, n, k)
    x = jnp.asarray(rng.integers(-128, 128, (m, k)), jnp.int8)
    packed = reference.pack(trits, bits=bits)
    call = functools.partial(
        packed_matmul, bits=bits, implementation=implementation, interpret=True
    )
    found = jax.jit(call)(x, packed)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, np.asarray(x, np.int64) @ np.asarray(trits, np.int64).T)
    np.testing.assert_array_equal(found, reference.packed_matmul(x, packed, bits=bits))


def test_operands_that_do_not_fit_are_named():
    x, packed = jnp.ones((2, 20), jnp.int8), jnp.ones((3, 5), jnp.uint8)
    with pytest.raises(TypeError, match="int8"):
        packed_matmul(x.astype(jnp.int32), packed)
    with pytest.raises(ValueError, match=r"\[N, 5\]"):
        packed_matmul(x, packed[:, :4])
    with pytest.raises(ValueError, match="bits='3'"):
        packed_matmul(x, packed, bits="3")
    with pytest.raises(ValueError, match="implementation='cuda'"):
        packed_matmul(x, packed, implementation="cuda")
    with pytest.raises(ValueError, match="takes bits='2'"):
        packed_matmul(x, packed[:, :4], bits="1.6", implementation="pallas_gpu")


@pytest.mark.parametrize("columns", [16, 20, 22, 64, 96])
def test_words_hold_four_trits_side_by_side(columns):
    trits = random_trits(np.random.default_rng(columns), 5, columns)
    words = np.asarray(to_words(reference.pack(trits), columns))
    size = plane_columns(columns)
    assert words.shape == (5, size // 4)
    found = np.zeros((5, 4 * size), np.int8)
    for plane in range(4):
        for byte in range(4):
            code = (words >> (2 * plane + 8 * byte)) & 3
            found[:, plane * size + byte : (plane + 1) * size : 4] = code - 1
    np.testing.assert_array_equal(found[:, :columns], trits)


@pytest.mark.parametrize(("m", "n", "k"), [(3, 40, 45), (17, 70, 261), (32, 64, 256)])
def test_stacked_products_and_unpacking_are_exact(m, n, k):
    rng = np.random.default_rng(k)
    trits = random_trits(rng, 2, n, k)
    x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    stack, layer = from_words(to_words(reference.pack(trits), k)), jnp.int32(1)
    found = pallas_gpu.unpack(stack, layer, k, interpret=True)
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, trits[1])
    # Powers of two: scaling by them is exact.
    x_scale = jnp.asarray(2.0 ** rng.integers(-3, 3, (m, 1)), jnp.float32)
    w_scale = jnp.asarray([[[8.0]], [[0.25]]])
    found = pallas_gpu.scaled_matmul(
        x, x_scale, stack, w_scale, layer, out_dtype=jnp.float32, interpret=True
    )
    sums = np.asarray(x, np.int64) @ np.asarray(trits[1], np.int64).T
    np.testing.assert_array_equal(found, sums * np.asarray(x_scale) / 4)


@pytest.mark.parametrize("form", ["residual", "times_silu", "gated"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_quantised_rows_are_those_of_the_model(form, dtype):
    rng = np.random.default_rng(7)
    rows, columns = 5, 83
    x = f32(rng, rows, 2 * columns if form == "gated" else columns).astype(dtype)
    norms = [jnp.asarray(rng.uniform(0.5, 1.5, (3, columns)), jnp.float32) for _ in range(3)]
    outer = None if form == "gated" else norms[2]
    options = {"gated": True}
    if form != "gated":
        options = {form: f32(rng, rows, columns).astype(dtype)}
    layer = 1
    stream, qs, scales = jax.jit(
        lambda: rows_gpu.quantize_rows(
            x, jnp.int32(layer), norms[:2], outer, eps=EPS, outer_eps=OUTER_EPS, interpret=True,
            **options,
        )
    )()  # fmt: skip
    want = jax.jit(
        lambda: norm_quant(
            x, tuple(n[layer] for n in norms[:2]), None if outer is None else outer[layer],
            eps=EPS, outer_eps=OUTER_EPS, implementation="xla", **options,
        )
    )()  # fmt: skip
    if form == "residual":
        np.testing.assert_array_equal(stream.astype(jnp.float32), want[0].astype(jnp.float32))
    for q, scale, want_q, want_scale in zip(qs, scales, want[1], want[2], strict=True):
        close(scale, want_scale)
        # Two orders of a float32 sum: an integer may differ where the value was at a boundary.
        off = np.asarray(q, np.int32) - np.asarray(want_q, np.int32)
        assert np.abs(off).max() <= 1
        assert (off != 0).mean() < 0.01


close = functools.partial(np.testing.assert_allclose, rtol=2e-5, atol=2e-5)


def f32(rng, *shape):
    return jnp.asarray(rng.normal(size=shape), jnp.float32)


@pytest.mark.parametrize(("m", "n", "k"), [(128, 5120, 2560), (33, 45, 131)])
def test_the_product_lowers_for_its_devices(m, n, k, lower_for_cuda):
    operands = (
        jax.ShapeDtypeStruct((m, k), jnp.int8),
        jax.ShapeDtypeStruct((n, reference.packed_columns(k)), jnp.uint8),
    )
    call = functools.partial(packed_matmul, implementation="pallas_gpu")
    assert "triton" in lower_for_cuda(call, *operands).as_text()
    call = jax.jit(functools.partial(packed_matmul, implementation="pallas_tpu"))
    lowered = call.trace(*operands).lower(lowering_platforms=("tpu",))
    assert "tpu_custom_call" in lowered.as_text()
