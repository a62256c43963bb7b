"""Which modules the weights pass through on their way from `generate` to a token."""

import sys

import pytest
from initial_params import initial_params

from mmfree_jax.infer import generate
from mmfree_jax.model import LanguageModel, Master, Packed, Ternary, as_weights
from mmfree_jax.model.layer import GLUWeights, MLGRUWeights
from mmfree_jax.model.linear import LinearWeights
from mmfree_jax.model.packing import pack
from mmfree_jax.model.weights import EmbeddingTable, PackedLinear
from mmfree_jax.model_config import ModelConfig

# Whoever holds one of these follows the weights.
FORMS = (Master, Ternary, Packed)
PARTS = (EmbeddingTable, GLUWeights, LinearWeights, MLGRUWeights, PackedLinear)

TERNARY = [
    "mmfree_jax.infer.api",
    "mmfree_jax.infer.decode",
    "mmfree_jax.model.language_model",
    "mmfree_jax.model.layer",
    "mmfree_jax.model.linear",
    "mmfree_jax.model.mlgru",
    "mmfree_jax.model.weights",
]
PACKED = [
    "mmfree_jax.infer.api",
    "mmfree_jax.infer.decode",
    "mmfree_jax.model.language_model",
    "mmfree_jax.model.layer",
    "mmfree_jax.model.linear",
    "mmfree_jax.model.packed_model",
    "mmfree_jax.model.weights",
]


def holds(value, params):
    if isinstance(value, (*FORMS, *PARTS)) or value is params:
        return True
    return isinstance(value, list | tuple) and any(holds(item, params) for item in value)


def modules_that_hold(params, run):
    """Modules of mmfree_jax with a function that takes or returns weights while `run` runs."""
    found = set()

    def note(frame, event, result):
        name = frame.f_globals.get("__name__", "")
        kernels = name.startswith("mmfree_jax.pallas_kernels")
        if not name.startswith("mmfree_jax.") or kernels or event not in ("call", "return"):
            return
        code = frame.f_code
        count = code.co_argcount + code.co_kwonlyargcount + bool(code.co_flags & 0x04)
        given = [frame.f_locals.get(argument) for argument in code.co_varnames[:count]]
        if any(holds(value, params) for value in (*given, result)):
            found.add(name)

    sys.setprofile(note)
    try:
        run()
    finally:
        sys.setprofile(None)
    return sorted(found)


@pytest.mark.parametrize(("form", "expected"), [("ternary", TERNARY), ("packed", PACKED)])
def test_params_pass_seven_modules_from_generate_to_a_token(form, expected):
    # A size of its own: a program that is compiled already calls nothing.
    config = ModelConfig(
        vocab_size=43,
        hidden_size=24 if form == "packed" else 20,
        num_layers=2,
        intermediate_size=40,
        compute_dtype="float32",
        residual_dtype="float32",
        remat="none",
    )
    model = LanguageModel(config)
    params = initial_params(config)
    if form == "packed":
        params = pack(as_weights(params, config), config)
    outputs = []

    def run():
        outputs.append(generate(model, params, [[1, 2, 3]], max_new_tokens=2, temperature=0))

    assert modules_that_hold(params, run) == expected
    assert len(expected) <= 7
    assert len(outputs[0].tokens[0]) == 2, "the weights did not get as far as a token"
