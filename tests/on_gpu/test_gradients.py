"""Loss and gradients on a GPU, by the kernels and by XLA, at the widths of the presets."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfree_jax import LanguageModel, ModelConfig
from mmfree_jax.model import training_weights
from mmfree_jax.train import loss_sums

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU: make gpu"),
]

BY_XLA = {"matmul_kernel": "xla_int8", "recurrence_kernel": "xla"}
ROWS, LENGTH = 8, 512


def loss_and_gradients(config, batch):
    model = LanguageModel(config)
    params = jax.jit(model.init)(jax.random.key(0), batch["tokens"][:1, :8])["params"]

    def objective(params):
        weights = dataclasses.replace(training_weights(params, config), params=params)
        total, sums = loss_sums(weights, batch, model=model)
        return total / batch["tokens"].size, sums.loss / sums.tokens

    (_, loss), gradients = jax.jit(jax.value_and_grad(objective, has_aux=True))(params)
    return float(loss), gradients


@pytest.mark.parametrize(
    ("width", "vocabulary", "backward"),
    [
        *((width, 8192, "bf16") for width in (128, 192, 256, 384, 512, 640, 1024, 2048)),
        (2560, 32000, "bf16"),
        (640, 8192, "int8_dx"),
        (2048, 32000, "int8_dx"),
        (1024, 32000, "int8"),
    ],
)
def test_kernels_give_xlas_loss_and_gradients(width, vocabulary, backward):
    config = ModelConfig(
        vocab_size=vocabulary, hidden_size=width, num_layers=2, remat="gated", backward=backward
    )
    tokens = jax.random.randint(jax.random.key(1), (ROWS, LENGTH), 0, vocabulary)
    documents = jnp.cumsum(jax.random.bernoulli(jax.random.key(2), 0.01, (ROWS, LENGTH)), axis=1)
    targets = jnp.where(documents == jnp.roll(documents, -1, 1), jnp.roll(tokens, -1, 1), -1)
    batch = {"tokens": tokens, "targets": targets, "segment_ids": documents.astype(jnp.int32) + 1}
    loss, gradients = loss_and_gradients(config, batch)
    expected_loss, expected = loss_and_gradients(dataclasses.replace(config, **BY_XLA), batch)
    assert loss == pytest.approx(expected_loss, abs=2e-3)
    assert loss == pytest.approx(np.log(vocabulary), abs=0.3)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(gradients), jax.tree.leaves(expected), strict=True
    ):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        name = jax.tree_util.keystr(path)
        assert np.isfinite(a).all(), name
        # Activations at the edge of two integers fall to either side.
        assert np.linalg.norm(a - b) < 0.1 * np.linalg.norm(b), name
