"""What the kernels' tests share: lowering for a GPU that is not here, and a small packed model."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, AxisType

from mmfree_jax.pallas_kernels.decode.api import Linears, Model
from mmfree_jax.pallas_kernels.packed_matmul.reference import pack
from mmfree_jax.pallas_kernels.packed_matmul.words import to_words

H100 = AbstractDevice(device_kind="NVIDIA H100 80GB HBM3", num_cores=132, platform="gpu")


def _lower_for_cuda(function, *shapes):
    mesh = AbstractMesh((1,), ("x",), axis_types=(AxisType.Explicit,), abstract_device=H100)
    with jax.sharding.use_abstract_mesh(mesh):
        return jax.jit(function).trace(*shapes).lower(lowering_platforms=("cuda",))


@pytest.fixture(scope="session")
def lower_for_cuda():
    """Lowers a function of these shapes for an H100, on a machine that has none."""
    return _lower_for_cuda


def _linears(rng, layers, rows, columns, count=1):
    trits = [rng.integers(-1, 2, (layers, rows, columns)) for _ in range(count)]
    return Linears(
        tuple(to_words(pack(jnp.asarray(t, jnp.int8)), columns) for t in trits),
        tuple(jnp.asarray(rng.uniform(0.02, 0.1, (layers, 1, 1)), jnp.float32) for _ in trits),
        tuple(jnp.asarray(rng.uniform(0.5, 1.5, (layers, columns)), jnp.float32) for _ in trits),
    )


def _random_model(layers, width, state, glu, vocabulary, seed=0):
    rng = np.random.default_rng(seed)

    def norm(rows, columns):
        return jnp.asarray(rng.uniform(0.5, 1.5, (rows, columns)), jnp.float32)

    return Model(
        mixer_in=_linears(rng, layers, state, width, 3),
        mixer_out=_linears(rng, layers, width, state),
        glu_in=_linears(rng, layers, 2 * glu, width),
        glu_out=_linears(rng, layers, width, glu),
        head=_linears(rng, 1, vocabulary, width),
        mixer_norm=norm(layers, width),
        gate_norm=norm(layers, state),
        glu_norm=norm(layers, width),
        final_norm=norm(1, width),
        lower_bound=jnp.asarray(rng.uniform(0, 1, (layers, state)), jnp.float32),
        embedding=jnp.asarray(rng.normal(size=(vocabulary, width)), jnp.float32),
    )


@pytest.fixture(scope="session")
def random_model():
    """Makes a packed model of the given layers, width, state size, GLU size and vocabulary."""
    return _random_model
