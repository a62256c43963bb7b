"""Chunked linear cross-entropy, plain and ternary, against a float64 oracle."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType, NamedSharding, PartitionSpec
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels.cross_entropy import pallas_gpu, reference, xla
from mmfree_jax.pallas_kernels.cross_entropy.api import (
    linear_cross_entropy,
    linear_cross_entropy_sum,
    ternary_linear_cross_entropy,
    ternary_linear_cross_entropy_sum,
)

FUNCTIONS = {
    "linear": (linear_cross_entropy, reference.linear_cross_entropy),
    "ternary": (ternary_linear_cross_entropy, reference.ternary_linear_cross_entropy),
}

SUMS = {"linear": linear_cross_entropy_sum, "ternary": ternary_linear_cross_entropy_sum}


def make_inputs(N, V, D, dtype, seed=0):
    """Inputs rounded to `dtype`, a fifth of the targets dropped, random cotangents."""
    rng = np.random.default_rng(seed)
    x = np.asarray(jnp.asarray(rng.normal(size=(N, D)), dtype), np.float64)
    w = np.asarray(jnp.asarray(rng.normal(size=(V, D)) / D**0.5, dtype), np.float64)
    targets = np.where(rng.random(N) < 0.2, -1, rng.integers(0, V, N)).astype(np.int32)
    targets[0] = V - 1
    scale = np.abs(w).mean()
    trits = np.clip(np.round(w / scale), -1, 1).astype(np.int8)
    cotangents = (rng.normal(size=N), rng.normal(size=N))
    return x, w, trits, np.float32(scale), targets, cotangents


def value_and_gradients(function, x, w, targets, cotangents, dtype):
    def apply(x, w):
        loss, correct, lse = function(x, w, jnp.asarray(targets))
        return (loss, lse), correct

    @jax.jit
    def run(x, w, cotangents):
        (loss, lse), pullback, correct = jax.vjp(apply, x, w, has_aux=True)
        dx, dw = pullback(tuple(c.astype(loss.dtype) for c in cotangents))
        return {"loss": loss, "lse": lse, "correct": correct, "dx": dx, "dw": dw}

    cotangents = tuple(jnp.asarray(c, jnp.promote_types(dtype, jnp.float32)) for c in cotangents)
    return run(jnp.asarray(x, dtype), jnp.asarray(w, dtype), cotangents)


@pytest.mark.parametrize("head", ["linear", "ternary"])
@pytest.mark.parametrize(
    ("N", "V", "D", "chunk_size"),
    [(1, 7, 5, None), (24, 129, 16, 8), (23, 65, 15, 4)],
)
def test_matches_the_float64_oracle(head, N, V, D, chunk_size):
    for dtype, tolerance in ((jnp.float32, 1e-5), (jnp.bfloat16, 5e-3)):
        got, want = run_both(head, N, V, D, chunk_size, dtype)
        assert got["loss"].dtype == jnp.float32
        assert got["dx"].dtype == dtype
        np.testing.assert_array_equal(got.pop("correct"), want.pop("correct"))
        for name, value in got.items():
            assert relative_rms(value, want[name]) < tolerance, name


def run_both(head, N, V, D, chunk_size, dtype):
    """What `value_and_gradients` gives for the tested function and for the float64 oracle."""
    x, w, trits, scale, targets, cotangents = make_inputs(N, V, D, dtype)
    weights = () if head == "linear" else (jnp.asarray(trits), scale)

    def call(function, **options):
        return lambda x, w, targets: function(x, w, *weights, targets, z_loss=1e-2, **options)

    tested, oracle = FUNCTIONS[head]
    arrays = (x, w, targets, cotangents)
    got = value_and_gradients(call(tested, chunk_size=chunk_size), *arrays, dtype)
    with jax.enable_x64(True):
        want = value_and_gradients(call(oracle), *arrays, jnp.float64)
    return got, want


@pytest.mark.parametrize("head", ["linear", "ternary"])
def test_sum_has_the_gradients_of_the_summed_losses(head):
    x, w, trits, scale, targets, _ = make_inputs(23, 65, 15, jnp.float32)
    x, w, targets = jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(targets)
    weights = () if head == "linear" else (jnp.asarray(trits), scale)
    options = {"z_loss": 1e-2, "chunk_size": 4}
    per_token, summed = FUNCTIONS[head][0], SUMS[head]

    def mean_of_losses(x, w):
        return per_token(x, w, *weights, targets, **options).loss_N.sum() / 7

    def mean_of_sum(x, w):
        total, result = summed(x, w, *weights, targets, **options)
        return total / 7 + result.lse_N.sum() * 0, result

    want = jax.jit(jax.value_and_grad(mean_of_losses, (0, 1)))(x, w)
    (total, result), gradients = jax.jit(jax.value_and_grad(mean_of_sum, (0, 1), has_aux=True))(
        x, w
    )
    for a, b in zip((total, *gradients), jax.tree.leaves(want), strict=True):
        assert relative_rms(a, b) < 1e-6
    plain = jax.jit(functools.partial(per_token, **options))(x, w, *weights, targets)
    for a, b in zip(result, plain, strict=True):
        np.testing.assert_array_equal(a, b)


def test_integer_sums_are_exact():
    """Every logit of the ternary head is one exact integer times the two scales."""
    rng = np.random.default_rng(3)
    x = rng.normal(size=(5, 301)).astype(np.float32)
    trits = rng.integers(-1, 2, (11, 301)).astype(np.int8)
    w_scale = jnp.float32(0.5)
    q, scale, _ = xla._operands(jnp.asarray(x), w_scale)
    logits = xla._logits(q, scale, jnp.asarray(trits), w_scale)
    sums = np.asarray(q, np.int64) @ trits.astype(np.int64).T
    expected = sums.astype(np.float32) * (np.asarray(scale) * np.float32(0.5))
    np.testing.assert_array_equal(logits, expected)


def test_ternary_head_never_reads_the_master_weights():
    x, w, trits, scale, targets, _ = make_inputs(6, 9, 4, jnp.float32)
    arguments = (jnp.asarray(trits), scale, jnp.asarray(targets))
    run = jax.jit(ternary_linear_cross_entropy)
    clean = run(jnp.asarray(x, jnp.float32), jnp.asarray(w), *arguments)
    poisoned = run(jnp.asarray(x, jnp.float32), jnp.full(w.shape, jnp.nan), *arguments)
    np.testing.assert_array_equal(clean.loss_N, poisoned.loss_N)


def test_ignored_tokens_give_nothing_even_when_not_finite_elsewhere():
    x, w, _, _, _, _ = make_inputs(6, 9, 4, jnp.float32)
    targets = jnp.full((6,), -100)
    loss, gradients = jax.jit(
        jax.value_and_grad(
            lambda x, w: linear_cross_entropy(x, w, targets, z_loss=0.1).loss_N.sum(), (0, 1)
        )
    )(jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32))
    assert loss == 0
    assert all(not np.any(g) for g in gradients)


@pytest.mark.parametrize(
    ("N", "chunk_size", "expected"),
    [(16384, 2048, 8), (24, 10, 3), (23, 4, 6), (1, 5, 1), (7, 1, 7)],
)
def test_number_of_chunks(N, chunk_size, expected):
    assert xla.number_of_chunks(N, 100, chunk_size) == expected


def test_logits_are_never_materialised():
    """The largest array of the compiled gradient is far below [N, V]."""
    N, V, D = 512, 1000, 8
    x, w = jnp.ones((N, D)), jnp.ones((V, D))
    targets = jnp.zeros(N, jnp.int32)

    def total(x, w):
        return linear_cross_entropy(x, w, targets, chunk_size=16).loss_N.sum()

    compiled = jax.jit(jax.grad(total, (0, 1))).lower(x, w).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < N * V * 4 / 4


def test_vocabulary_and_tokens_split_by_the_compiler():
    """Tokens over `data`, vocabulary over `model`: same numbers, and no token changes device."""
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    x, w, trits, scale, targets, cotangents = make_inputs(64, 66, 16, jnp.float32)

    @jax.jit
    def gradients(x, w, trits, targets):
        def total(x, w):
            out = ternary_linear_cross_entropy(x, w, trits, scale, targets, chunk_size=16)
            return jnp.vdot(out.loss_N, jnp.asarray(cotangents[0], jnp.float32))

        return jax.value_and_grad(total, (0, 1))(x, w)

    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), trits, targets)
    axes = ("data", "model", "model", "data")
    placed = [
        jax.device_put(array, NamedSharding(mesh, PartitionSpec(axis)))
        for array, axis in zip(arrays, axes, strict=True)
    ]
    compiled = gradients.lower(*placed).compile()
    assert "all-to-all" not in compiled.as_text()
    got, want = compiled(*placed), gradients(*arrays)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(a, b) < 1e-5


@pytest.mark.parametrize("head", ["linear", "ternary"])
def test_token_axes_reduce_the_weight_gradient_once(head):
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)
    x, w, trits, scale, targets, _ = make_inputs(64, 66, 16, jnp.float32)
    weights = (jnp.asarray(trits), scale) if head == "ternary" else ()

    def gradients(x, w, targets, **options):
        def total(x, w):
            return SUMS[head](x, w, *weights, targets, chunk_size=4, z_loss=1e-2, **options)

        return jax.value_and_grad(total, (0, 1), has_aux=True)(x, w)

    arrays = (jnp.asarray(x, jnp.float32), jnp.asarray(w, jnp.float32), jnp.asarray(targets))
    want = jax.jit(gradients)(*arrays)
    with jax.set_mesh(mesh):
        tokens = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))
        placed = (jax.device_put(arrays[0], tokens), arrays[1], jax.device_put(arrays[2], tokens))
        step = jax.jit(functools.partial(gradients, token_axes=("data", "fsdp")))
        compiled = step.lower(*placed).compile()
        got = compiled(*placed)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert relative_rms(a, b) < 1e-5
    # Computations of the compiled module begin at the margin; loop bodies come before ENTRY.
    before, entry = compiled.as_text().split("\nENTRY ")
    assert "all-reduce(" not in before, "the loop over chunks must not communicate"
    weight_sized = [line for line in entry.splitlines() if " all-reduce(" in line]
    assert sum("f32[66,16]" in line.split(" all-reduce(")[0] for line in weight_sized) == 1


def test_bad_input_is_named():
    x, w, targets = jnp.ones((3, 4)), jnp.ones((5, 4)), jnp.zeros(3, jnp.int32)
    with pytest.raises(ValueError, match="w_VD"):
        linear_cross_entropy(x, w[:, :3], targets)
    with pytest.raises(ValueError, match="targets_N"):
        linear_cross_entropy(x, w, targets[:2])
    with pytest.raises(TypeError, match="targets_N"):
        linear_cross_entropy(x, w, targets.astype(jnp.float32))
    with pytest.raises(ValueError, match="chunk_size"):
        linear_cross_entropy(x, w, targets, chunk_size=0)
    with pytest.raises(ValueError, match="implementation"):
        linear_cross_entropy(x, w, targets, implementation="cutlass")
    with pytest.raises(TypeError, match="trits_VD"):
        ternary_linear_cross_entropy(x, w, w, 1.0, targets)
    with pytest.raises(ValueError, match="w_scale"):
        ternary_linear_cross_entropy(x, w, w.astype(jnp.int8), jnp.ones(5), targets)


@pytest.mark.parametrize("head", ["linear", "ternary"])
@pytest.mark.parametrize(("N", "V", "D", "chunk_size"), [(5, 128, 5, None), (13, 4480, 16, 4)])
def test_the_gpu_program_equals_the_xla_program(head, N, V, D, chunk_size):
    """The kernel over rows is interpreted; vocabularies of one piece and of several."""
    x, w, trits, scale, targets, _ = make_inputs(N, V, D, jnp.float32)
    weights = (jnp.asarray(w, jnp.float32), None) if head == "linear" else (trits, scale)
    weights = jax.tree.map(jnp.asarray, weights)
    arguments = (jnp.asarray(x, jnp.float32), *weights, jnp.asarray(targets))
    options = {"z_loss": 1e-2, "chunk_size": chunk_size}
    for name in ("forward", "forward_with_gradients"):
        want = jax.jit(functools.partial(getattr(xla, name), **options))(*arguments)
        tested = functools.partial(getattr(pallas_gpu, name), **options, interpret=True)
        for a, b in zip(jax.jit(tested)(*arguments), want, strict=True):
            assert a.dtype == b.dtype
            assert relative_rms(a, b) < 2e-6


def test_rows_that_are_not_finite_stay_so_and_ties_take_the_first():
    logits = jnp.zeros((4, 4992)).at[0, 7].set(jnp.inf).at[1, 4991].set(jnp.nan).at[2].set(-jnp.inf)
    loss, _, _, gradient = pallas_gpu.softmax_rows(
        logits, jnp.array([1, 2, -1, 0]), 0.0, jnp.float32, interpret=True
    )
    assert not np.isfinite(loss[:2]).any()
    np.testing.assert_array_equal(loss[2], 0)
    np.testing.assert_array_equal(gradient[2], 0)
    _, correct, lse, _ = pallas_gpu.softmax_rows(
        jnp.zeros((2, 4992)), jnp.array([0, 4096]), 0.0, jnp.float32, interpret=True
    )
    np.testing.assert_array_equal(correct, [True, False])
    np.testing.assert_allclose(lse, np.log(4992), rtol=1e-6)


def test_the_gpu_program_lowers_for_an_h100():
    h100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=h100)
    N, V, D = 4096, 32000, 1024
    shapes = [((N, D), jnp.bfloat16), ((V, D), jnp.float32), ((V, D), jnp.int8), ((N,), jnp.int32)]
    arguments = [jax.ShapeDtypeStruct(*s) for s in shapes]

    def gradients(x, w, trits, targets):
        def total(x, w):
            return ternary_linear_cross_entropy_sum(
                x, w, trits, 0.02, targets, chunk_size=2048, implementation="pallas_gpu"
            )[0]

        return jax.grad(total, (0, 1))(x, w)

    with jax.sharding.use_abstract_mesh(mesh):
        text = jax.jit(gradients).trace(*arguments).lower(lowering_platforms=("cuda",)).as_text()
    assert "softmax_rows" in text
