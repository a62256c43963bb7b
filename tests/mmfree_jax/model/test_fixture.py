"""The model against outputs of the authors' package (tests/data/authors_package)."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from mmfree_jax.model import LanguageModel, training_weights
from mmfree_jax.model.parameters import unflatten
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.tensor_names import tensor_map
from mmfree_jax.train.loss import loss_sums


def _tree(tensors, prefix, config):
    """The parameter tree from the authors' names."""
    parts = {}
    for name, (slot,) in tensor_map(config).items():
        parts.setdefault(slot.path, []).append(jnp.asarray(tensors[prefix + name]))
    return unflatten(
        {
            path: jnp.stack(values) if path.startswith("blocks/") else values[0]
            for path, values in parts.items()
        }
    )


def _relative(a, b):
    return float(np.linalg.norm(np.asarray(a) - b) / np.linalg.norm(b))


@pytest.mark.parametrize("program", ["fused", "plain"])
@pytest.mark.parametrize(("variant", "eps"), [("fused", 1e-6), ("vanilla", 1e-8)])
def test_matches_the_authors_package(authors_package, variant, eps, program):
    hf = json.loads((authors_package / "dev_config.json").read_text())
    expected = load_file(authors_package / f"dev_{variant}.safetensors")
    config = ModelConfig(
        vocab_size=hf["vocab_size"],
        hidden_size=hf["hidden_size"],
        num_layers=hf["num_hidden_layers"],
        linear_norm_eps=eps,
        compute_dtype="float32",
        residual_dtype="float32",
        bitlinear=program,
    )
    params = _tree(load_file(authors_package / "dev_model.safetensors"), "", config)
    model = LanguageModel(config)
    tokens = jnp.asarray(expected["input_ids"])

    logits = model.apply({"params": params}, tokens)
    assert _relative(logits, expected["logits"]) <= 1e-2
    np.testing.assert_array_equal(np.argmax(logits, -1), np.argmax(expected["logits"], -1))

    # Labels are the inputs shifted by one; the last position predicts nothing.
    batch = {
        "tokens": tokens,
        "targets": jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)), constant_values=-1),
        "segment_ids": jnp.ones_like(tokens),
    }

    @jax.jit
    def loss_and_grads(params):
        weights = training_weights(params, config)

        def mean_loss(p):
            objective, sums = loss_sums(
                dataclasses.replace(weights, params=p), batch, model=model, chunk=7
            )
            return objective / sums.tokens

        return jax.value_and_grad(mean_loss)(params)

    loss, grads = loss_and_grads(params)
    assert abs(float(loss) - float(expected["loss"][0])) <= 5e-4
    expected_grads = _tree(expected, "grad.", config)
    errors = jax.tree.map(_relative, grads, expected_grads)
    worst = max(jax.tree.leaves(errors))
    assert worst <= 2e-2, errors
    if variant == "fused":  # No rounding flips here, so the agreement is to float32.
        assert _relative(logits, expected["logits"]) <= 1e-5
        assert worst <= 1e-4, errors
