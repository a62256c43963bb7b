"""XLA's int8 product is refused on a GPU where its sums are wrong; the device here is a CPU."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax.pallas_kernels import integer_products
from mmfree_jax.pallas_kernels.bitlinear import int8_backward
from mmfree_jax.pallas_kernels.cross_entropy.api import ternary_linear_cross_entropy
from mmfree_jax.pallas_kernels.errors import IntegerProductError
from mmfree_jax.pallas_kernels.integer_products import int8_dot
from mmfree_jax.pallas_kernels.packed_matmul.api import pack, packed_matmul
from mmfree_jax.pallas_kernels.ternary_matmul.api import ternary_matmul


@pytest.fixture
def gpu(monkeypatch):
    """Lets the check believe in a GPU; gives the shapes of the products that it makes."""
    made = []
    product = integer_products._product

    def record(x, trits, axes):
        assert not isinstance(x, jax.core.Tracer)
        made.append((*x.shape, trits.shape[0]))
        return product(x, trits, axes)

    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(integer_products, "_product", record)
    looked_at = integer_products._wrong_sums
    looked_at.cache_clear()
    yield made
    looked_at.cache_clear()


def off_by_one(at):
    """A product that is wrong in one place."""

    def product(x, trits, axes):
        return integer_products._dot(x, trits, axes).at[at].add(1)

    return product


def operands(m=3, n=40, k=70):
    rng = np.random.default_rng(1)
    x = jnp.asarray(rng.integers(-127, 128, (m, k)), jnp.int8)
    return x, jnp.asarray(rng.integers(-1, 2, (n, k)), jnp.int8)


def test_right_sums_pass_and_a_shape_is_looked_at_once(gpu):
    x, trits = operands()
    want = np.asarray(x, np.int64) @ np.asarray(trits, np.int64).T
    for _ in range(2):
        np.testing.assert_array_equal(jax.jit(int8_dot)(x, trits), want)
        np.testing.assert_array_equal(int8_dot(x[None], trits)[0], want)
    assert gpu == [(4, 70, 40)]
    int8_dot(*operands(n=41))
    assert len(gpu) == 2


def test_on_a_cpu_nothing_is_looked_at(monkeypatch):
    monkeypatch.setattr(integer_products, "_product", None)
    int8_dot(*operands(n=43))


@pytest.mark.parametrize("at", [(0, 0), (3, 39)])
def test_one_wrong_sum_is_refused_with_the_flag_and_the_way_out(at, gpu, monkeypatch):
    monkeypatch.setattr(integer_products, "_product", off_by_one(at))
    message = (
        r"\[3, 70\] with \[40, 70\] is wrong.*--xla_gpu_autotune_level=0"
        r".*--xla_gpu_enable_triton_gemm=false.*--xla_gpu_deterministic_ops=true"
    )
    for _ in range(2):
        with pytest.raises(IntegerProductError, match=message) as error:
            jax.make_jaxpr(lambda *a: int8_dot(*a))(*operands())  # traced anew each time
        assert "\n" not in str(error.value)


def test_the_check_runs_under_a_mesh_and_inside_a_loop(gpu):
    x, trits = operands(m=8)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    @jax.jit
    def twice(x, trits):
        return jax.lax.fori_loop(0, 2, lambda _, y: y + int8_dot(x, trits), jnp.zeros((8, 40), int))

    with jax.set_mesh(mesh):
        found = twice(x, trits)
    np.testing.assert_array_equal(found, 2 * (np.asarray(x, int) @ np.asarray(trits, int).T))
    assert gpu == [(8, 70, 40)]


def test_what_is_made_to_look_is_small(gpu, monkeypatch):
    sizes = []
    monkeypatch.setattr(
        integer_products, "_wrong_sums", lambda m, n, k, axes: sizes.append((m, n)) or 0
    )
    integer_products.require_exact(1 << 20, 32000, 2048)
    integer_products.require_exact(1 << 20, 1024, 1024)
    integer_products.require_exact(1, 32000, 1024)
    assert sizes == [(1024, 32000), (2048, 1024), (1, 32000)]


def test_every_op_asks_where_it_takes_xlas_int8_product(gpu, monkeypatch):
    monkeypatch.setattr(integer_products, "_product", off_by_one((0, 0)))
    x, trits = operands()
    one, scale = jnp.ones((1, 1)), jnp.ones((3, 1))
    calls = [
        lambda: ternary_matmul(x, scale, trits, one, implementation="xla_int8"),
        lambda: packed_matmul(x, pack(trits), implementation="xla"),
        lambda: ternary_linear_cross_entropy(
            x.astype(jnp.float32), trits.astype(jnp.float32), trits, one,
            jnp.zeros(3, jnp.int32), implementation="xla",
        ),
    ]  # fmt: skip
    for call in calls:
        integer_products._wrong_sums.cache_clear()
        with pytest.raises(IntegerProductError, match=re.escape("[40, 70]")):
            jax.make_jaxpr(call)()


@pytest.mark.parametrize("axes", [(-1, 1), (-1, 0), (0, 0), (0, 1)])
def test_every_layout_is_looked_at_as_it_is_used(axes, gpu, monkeypatch):
    x, trits = operands()
    want = np.asarray(x, np.int64) @ np.asarray(trits, np.int64).T
    left, right = x if axes[0] else x.T, trits if axes[1] else trits.T
    np.testing.assert_array_equal(int8_dot(left, right, axes), want)
    assert gpu == [((4, 70) if axes[0] else (70, 4)) + (right.shape[0],)]
    monkeypatch.setattr(integer_products, "_product", off_by_one((1, 1)))
    integer_products._wrong_sums.cache_clear()
    with pytest.raises(IntegerProductError, match=re.escape("[40, 70]")):
        int8_dot(left, right, axes)


def test_the_int8_backward_asks_too(gpu, monkeypatch):
    monkeypatch.setattr(integer_products, "_product", off_by_one((0, 0)))
    d, (x, trits) = jnp.ones((3, 40)), operands()
    for call in (
        lambda: int8_backward.input_gradient(d, trits, jnp.float32),
        lambda: int8_backward.weight_gradient(d, x, jnp.ones((3, 1)), jnp.float32),
    ):
        with pytest.raises(IntegerProductError):
            jax.make_jaxpr(call)()


@pytest.mark.parametrize("shape", [(40,), (1, 40), (1, 1, 40)])
@pytest.mark.parametrize("axes", [(-1, 1), (-1, 0)])
def test_one_row_is_summed_as_many_are(shape, axes):
    rng = np.random.default_rng(0)
    x = rng.integers(-128, 128, shape, np.int8)
    w = rng.integers(-1, 2, (24, 40) if axes[1] else (40, 24), np.int8)
    found = jax.jit(functools.partial(int8_dot, axes=axes))(x, w)
    expected = x.astype(int) @ (w.T if axes[1] else w).astype(int)
    assert found.dtype == jnp.int32
    np.testing.assert_array_equal(found, expected)
