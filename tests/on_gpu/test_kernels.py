"""The kernels on a GPU, at the widths of real models, against XLA's programs.

The interpreter, lowering and compiling ahead of time know nothing of what the last compiler makes
of a kernel. `make gpu` runs this where there is an NVIDIA GPU, without the tests' own settings of
XLA, which are a CPU's.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from relative_rms import relative_rms

from mmfree_jax.pallas_kernels.cross_entropy.api import ternary_linear_cross_entropy_sum
from mmfree_jax.pallas_kernels.norm_quant import api as norm_quant
from mmfree_jax.pallas_kernels.recurrence.api import linear_recurrence, mlgru_recurrence
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternarize, ternary_matmul

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: make gpu"),
]

# Odd multiples of 128 leave a thread a column at a time, others two or four.
WIDTHS = (128, 256, 384, 640, 1024, 1792, 2048, 2560, 2816)
TOKENS = 1024


def normal(seed, *shape, dtype=jnp.bfloat16):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def norm_arguments(form, width):
    """x, the consumers' weights, the outer weight and options of a norm; see `norm_quant`."""
    gated = form == "gated"
    x = normal(0, TOKENS, 2 * width if gated else width)
    consumers = 3 if form == "residual" else 1
    weights = tuple(jnp.linspace(0.5, 1.5, width) + 0.1 * j for j in range(consumers))
    options = {
        "residual": {"residual": normal(1, TOKENS, width)},
        "times_silu": {"times_silu": normal(1, TOKENS, width)},
        "gated": {"gated": True},
    }[form]
    return x, weights, None if gated else jnp.linspace(1.5, 0.5, width), options


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("form", ["residual", "times_silu", "gated"])
def test_norms(form, width):
    x, weights, outer, options = norm_arguments(form, width)

    def forward(implementation):
        return jax.jit(
            lambda x: norm_quant.norm_quant(
                x, weights, outer, eps=1e-6, implementation=implementation, **options
            )
        )(x)

    expected, got = forward("xla"), forward("pallas_gpu")
    for q, wanted in zip(got[1], expected[1], strict=True):
        off = np.abs(np.asarray(q, np.int32) - np.asarray(wanted, np.int32))
        # A value at the edge of two integers may be rounded to either.
        assert off.max() <= 2
        assert off.mean() < 0.1
        assert np.abs(np.asarray(wanted, np.int32)).mean() > 3
    for a, b in zip(jax.tree.leaves(got[2:]), jax.tree.leaves(expected[2:]), strict=True):
        assert relative_rms(a, b) < 0.01

    x, stats = expected[0], expected[3]
    kept = {name: value for name, value in options.items() if name != "residual"}
    gradients = tuple(normal(3 + j, TOKENS, width) for j in range(len(weights)))
    scales = tuple(jnp.float32(1 + j) for j in range(len(weights)))

    def backward(implementation, input_dtype):
        return jax.jit(
            lambda x, gradients: norm_quant.norm_backward(
                x,
                weights,
                outer,
                stats,
                gradients,
                scales,
                eps=1e-6,
                input_dtype=input_dtype,
                implementation=implementation,
                **kept,
            )
        )(x, gradients)

    for input_dtype in (None, jnp.int8):
        expected, got = backward("xla", input_dtype), backward("pallas_gpu", input_dtype)
        for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
            assert relative_rms(a, b) < 0.02


@pytest.mark.parametrize("width", [32, 128, 384, 640, 1024, 2048, 2560])
@pytest.mark.parametrize("gates", ["fused", "given"])
def test_recurrence(gates, width):
    # At the widest, more programs than the chip holds at once, which are cut otherwise.
    rows, tokens = 8 if width == 2560 else 3, 515
    i, f = normal(0, rows, tokens, width), normal(1, rows, tokens, width)
    bound, start = jnp.linspace(0.0, 0.9, width), normal(2, rows, width, dtype=jnp.float32)
    reset = jax.random.bernoulli(jax.random.key(3), 0.01, (rows, tokens))
    cotangents = normal(4, rows, tokens, width), normal(5, rows, width, dtype=jnp.float32)

    def results(implementation):
        options = {"reset_BT": reset, "implementation": implementation}

        def run(i, f, bound, start):
            if gates == "fused":
                return mlgru_recurrence(i, f, bound, h0_BD=start, **options)
            return linear_recurrence(jax.nn.sigmoid(f) * bound, i, h0_BD=start, **options)

        def both(*arguments):
            out, pull = jax.vjp(run, *arguments)
            return out, pull(cotangents)

        return jax.jit(both)(i, f, bound.astype(jnp.float32), start)

    for a, b in zip(*(jax.tree.leaves(results(n)) for n in ("pallas_gpu", "xla")), strict=True):
        assert relative_rms(a, b) < 0.01


# Rows that end within one tile, whose kernel is cut into shorter stretches; held towards their end.
@pytest.mark.parametrize("tokens", [16, 32, 48, 96])
@pytest.mark.parametrize("rows", [1, 256])
def test_the_recurrence_of_short_rows(rows, tokens):
    width = 640
    i, f = normal(0, rows, tokens, width), normal(1, rows, tokens, width)
    bound, start = jnp.linspace(0.0, 0.9, width), normal(2, rows, width, dtype=jnp.float32)
    held = jnp.broadcast_to(jnp.arange(tokens) >= tokens - 5, (rows, tokens))

    def results(padding, implementation):
        options = {"padding_BT": padding, "implementation": implementation}
        run = lambda i, f: mlgru_recurrence(i, f, bound, h0_BD=start, **options)  # noqa: E731
        return jax.tree.leaves(jax.jit(run)(i, f))

    for padding in (None, held):
        got, expected = (results(padding, name) for name in ("pallas_gpu", "xla"))
        for a, b in zip(got, expected, strict=True):
            assert relative_rms(a, b) < 0.01


@pytest.mark.parametrize("vocabulary", [2048, 8192, 32000])
def test_cross_entropy(vocabulary):
    width, tokens = 384, 512
    x = normal(0, tokens, width)
    w = 0.02 * normal(1, vocabulary, width, dtype=jnp.float32)
    trits, scale = ternarize(w)
    targets = jax.random.randint(jax.random.key(2), (tokens,), -1, vocabulary)

    def results(implementation):
        def total(x, w):
            return ternary_linear_cross_entropy_sum(
                x, w, trits, scale, targets, z_loss=1e-3, implementation=implementation
            )

        return jax.jit(jax.value_and_grad(total, argnums=(0, 1), has_aux=True))(x, w)

    for a, b in zip(*(jax.tree.leaves(results(n)) for n in ("pallas_gpu", "xla")), strict=True):
        assert relative_rms(a, b) < 0.01


@pytest.mark.parametrize(
    ("n", "k"), [(384, 128), (640, 640), (640, 1792), (3584, 640), (2048, 5632), (8192, 640)]
)
@pytest.mark.parametrize("implementation", [None, "pallas_mosaic_gpu"])
def test_ternary_products_are_exact(implementation, n, k):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, (TOKENS, k)).astype(np.int8)
    trits = rng.integers(-1, 2, (n, k)).astype(np.int8)
    got = jax.jit(
        lambda x, trits: ternary_matmul(
            x, jnp.ones((TOKENS, 1)), trits, jnp.ones((1, 1)), implementation=implementation
        )
    )(x, trits)
    np.testing.assert_array_equal(
        np.asarray(got, np.int64), x.astype(np.int64) @ trits.astype(np.int64).T
    )
