"""What reading a long prompt with packed weights adds: many matrices a launch, gated products."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfree_jax.pallas_kernels.packed_matmul import pallas_gpu, reference, rows_gpu
from mmfree_jax.pallas_kernels.packed_matmul.words import from_words, to_words
from mmfree_jax.pallas_kernels.ternary_matmul import pallas_mosaic_gpu
from mmfree_jax.pallas_kernels.ternary_matmul.api import (
    gated_ternary_matmul,
    mosaic_gated_config,
    ternary_matmul,
)


def lower_for_cuda(function, *args):
    device = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=device)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*args).lower(lowering_platforms=("cuda",)).as_text()


def shape(*dims, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(dims, dtype)


@pytest.mark.parametrize("columns", [45, 261, 640])
def test_several_matrices_are_unpacked_in_one_launch(columns):
    rng = np.random.default_rng(columns)
    trits = jnp.asarray(rng.integers(-1, 2, (3, 2, 70, columns)), jnp.int8)
    stacks = [from_words(to_words(reference.pack(t), columns)) for t in trits]
    found = pallas_gpu.unpack_many(stacks, jnp.int32(1), columns, interpret=True)
    assert len(found) == 3
    for f, t in zip(found, trits, strict=True):
        np.testing.assert_array_equal(f, t[1])


def test_every_integer_and_half_rounds_as_numpy_does():
    x = np.arange(-254, 255, dtype=np.float32) / 2
    near = np.concatenate([np.nextafter(x, np.float32(-1e9)), x, np.nextafter(x, np.float32(1e9))])
    near = near[np.abs(near) <= 127]
    found = jax.jit(rows_gpu.nearest_int8)(jnp.asarray(near))
    assert found.dtype == jnp.int8
    np.testing.assert_array_equal(found, np.rint(near).astype(np.int8))


@pytest.mark.parametrize("columns", [83, 700, 4200])
def test_rows_in_pieces_and_the_matrices_scales(columns):
    rng = np.random.default_rng(columns)
    x = rng.normal(size=(3, columns)).astype(np.float32)
    norms = rng.uniform(0.5, 1.5, (2, 2, columns)).astype(np.float32)
    matrix_scales = rng.uniform(0.01, 0.1, (2, 2, 1, 1)).astype(np.float32)
    outer = rng.uniform(-1.5, 1.5, (2, columns)).astype(np.float32)
    _, qs, scales = rows_gpu.quantize_rows(
        jnp.asarray(x), jnp.int32(1), list(jnp.asarray(norms)), jnp.asarray(outer), eps=1e-6,
        outer_eps=1e-5, matrix_scales=list(jnp.asarray(matrix_scales)), interpret=True,
    )  # fmt: skip
    v = x.astype(np.float64)
    v = v / np.sqrt(np.mean(v**2, axis=1, keepdims=True) + 1e-5) * outer[1]
    v = v / np.sqrt(np.mean(v**2, axis=1, keepdims=True) + 1e-6)
    for q, scale, norm, matrix_scale in zip(qs, scales, norms, matrix_scales, strict=True):
        n = v * norm[1]
        absmax = np.abs(n).max(axis=1, keepdims=True)
        np.testing.assert_allclose(scale, absmax / 127 * matrix_scale[1], rtol=1e-5)
        off = np.abs(np.asarray(q) - np.rint(n * 127 / absmax))
        assert off.max() <= 1
        assert (off != 0).mean() < 0.005
        assert np.abs(np.asarray(q, np.int32)).max(axis=1).tolist() == [127] * 3


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_a_gated_product_is_the_product_gated(out_dtype):
    rng = np.random.default_rng(0)
    x_q = jnp.asarray(rng.integers(-128, 128, (2, 5, 64)), jnp.int8)
    trits = jnp.asarray(rng.integers(-1, 2, (34, 64)), jnp.int8)
    x_scale = jnp.asarray(rng.uniform(0.001, 0.01, (2, 5, 1)), jnp.float32)
    w_scale = jnp.full((1,), 0.3, jnp.float32)
    y = ternary_matmul(x_q, x_scale, trits, w_scale, out_dtype=out_dtype)
    gate, up = np.split(np.asarray(y, np.float64), 2, axis=-1)
    found = gated_ternary_matmul(x_q, x_scale, trits, w_scale, out_dtype=out_dtype)
    assert found.dtype == out_dtype
    assert found.shape == (2, 5, 17)
    rtol = 1e-5 if out_dtype == jnp.float32 else 2.0**-8
    np.testing.assert_allclose(
        np.asarray(found, np.float64), gate / (1 + np.exp(-gate)) * up, rtol=rtol, atol=1e-6
    )


@pytest.mark.parametrize(("n", "k"), [(2816, 1024), (5632, 2048), (6912, 2560)])
def test_gated_tiles_divide_the_models_shapes(n, k):
    for m in (2048, 16384):
        config = mosaic_gated_config(m, n, k)
        assert config.split == "m"
        assert [size % block for size, block in zip((m, n, k), config.block, strict=True)] == [
            0
        ] * 3


def test_gated_tiles_that_cannot_be_are_refused():
    operands = (
        shape(256, 128, dtype=jnp.int8), shape(256, dtype=jnp.float32),
        shape(512, 128, dtype=jnp.int8), shape(1, dtype=jnp.float32),
    )  # fmt: skip
    for config, match in (
        (pallas_mosaic_gpu.Config(split="n"), "split='m'"),
        (pallas_mosaic_gpu.Config(tile_n=96), "multiples"),
    ):
        call = functools.partial(
            pallas_mosaic_gpu.ternary_matmul, out_dtype=jnp.bfloat16, config=config,
            multiprocessors=132, gated=True,
        )  # fmt: skip
        with pytest.raises(ValueError, match=match):
            jax.eval_shape(call, *operands)


@pytest.mark.parametrize("columns", [1024, 2560, 6912])
def test_the_kernels_lower_for_cuda(columns):
    index, norm = shape(dtype=jnp.int32), shape(2, columns)
    rows, scale = shape(2048, columns), shape(2, 1, 1, dtype=jnp.float32)
    eps: dict[str, Any] = {"eps": 1e-6, "outer_eps": 1e-5}

    def mixer_in(x, residual, index, outer, scale, *norms):
        return rows_gpu.quantize_rows(
            x, index, norms, outer, residual=residual, matrix_scales=[scale] * 3, **eps
        )

    def mixer_out(x, h, index, outer, scale, norm):
        return rows_gpu.quantize_rows(
            x, index, [norm], outer, times_silu=h, matrix_scales=[scale], **eps
        )

    assert "triton" in lower_for_cuda(mixer_in, rows, rows, index, norm, scale, *[norm] * 3)
    assert "triton" in lower_for_cuda(mixer_out, rows, rows, index, norm, scale, norm)
    gated = functools.partial(rows_gpu.quantize_rows, gated=True, **eps)
    wide = shape(2048, 2 * columns)
    assert "triton" in lower_for_cuda(lambda x, i, n: gated(x, i, [n]), wide, index, norm)
    stacks = [shape(2, 2560, columns // 4, dtype=jnp.uint8)] * 3
    unpack = functools.partial(pallas_gpu.unpack_many, columns=columns)
    assert "triton" in lower_for_cuda(unpack, stacks, index)
