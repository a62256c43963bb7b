"""A model from any folder in one call, and into a folder of ours; `open_model` gives more.

The call decides the form of the weights, not the folder: `load_pretrained` gives parameters to
train or to study, `load_model` what decoding reads.
"""

import os
from typing import Any

from jax.sharding import Mesh

from mmfree_jax.data.tokenizer import tokenizer_copy
from mmfree_jax.errors import CheckpointError
from mmfree_jax.files import copy_folder
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import flatten, param_shapes
from mmfree_jax.model.weights import Master, Weights
from mmfree_jax.outputs import new_folder
from mmfree_jax.saved.kinds import MODEL_CONFIG
from mmfree_jax.saved.model_folder import write_model
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.saved.run_directory import TOKENIZER


def load_pretrained(
    path: str | os.PathLike[str], *, compute_dtype: Any = None, mesh: Mesh | None = None
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in a folder and its float parameters: `model.apply({"params": params}, tokens)`.

    Args:
      path: a run directory; a model folder (`mmfree import-hf`); a packed model (`mmfree
        pack`), whose parameters are then such that ternarise to its trits and scales; or a
        Hugging Face folder of `model_type` hgrn_bit, llama, mistral, qwen2 or qwen3, in
        safetensors.
      compute_dtype: dtype of activations ("float32", "bfloat16", "float16" or a dtype). None:
        as the run was trained; float32 for Hugging Face folders.
      mesh: to lay the weights out on by the sharding table, each device reading only its own
        part; None: all on the default device.

    Raises:
      ConfigError: the folder's config is missing, malformed or asks for something that is not
        implemented.
      CheckpointError: the weights are missing, damaged, pickled, or do not fit the config; all
        tensors that do not fit are listed.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax import load_pretrained, save_pretrained
      >>> save_pretrained("models/new", model, params)
      >>> model, params = load_pretrained("models/new")
      >>> params["head"]["weight"].shape
      (258, 16)
    """
    saved = open_model(path)
    model = saved.model(compute_dtype)
    weights = saved.weights("master", mesh)
    assert isinstance(weights, Master)
    return model, weights.params


def load_model(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None
) -> tuple[LanguageModel, Weights]:
    """The model in a folder and its weights as decoding on this device reads them.

    At 2 bits where the model is MatMul-free throughout, except on a CPU; ternarised once elsewhere.
    `generate` and `model.apply(weights, tokens)` take them in any form.

    Args and errors: as `load_pretrained`.
    """
    saved = open_model(path)
    return saved.model(), saved.weights(None, mesh)


def save_pretrained(
    path: str | os.PathLike[str],
    model: LanguageModel,
    params: dict[str, Any],
    *,
    tokenizer: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
) -> None:
    """Writes a model folder, which `load_pretrained` and every command open, whole or not at all.

    Args:
      path: new folder, or its URL.
      model: whose config is written.
      params: its float parameters, written in float32.
      tokenizer: folder of its tokenizer, to be copied; None: the model gets none.
      overwrite: replace an earlier folder of this function.

    Raises:
      CheckpointError: the parameters are not those of the model.
      OutputError: `path` exists and may not be replaced, or cannot be written.
      StorageError: the bucket refuses, or cannot be reached.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from mmfree_jax import LanguageModel, ModelConfig
      >>> config = ModelConfig(vocab_size=258, hidden_size=16, num_layers=1, intermediate_size=16)
      >>> model = LanguageModel(config)
      >>> tokens = jnp.array([[1, 2, 3]])
      >>> params = jax.jit(model.init)(jax.random.key(0), tokens)["params"]
      >>> from mmfree_jax import load_pretrained, save_pretrained
      >>> save_pretrained("models/tiny", model, params)
      >>> again, its_params = load_pretrained("models/tiny")
      >>> again.config == model.config
      True
    """
    shapes = {name: leaf.shape for name, leaf in param_shapes(model.config).items()}
    given = {name: leaf.shape for name, leaf in flatten(params).items()}
    if wrong := sorted({name for name, _ in shapes.items() ^ given.items()}):
        name = wrong[0]
        raise CheckpointError(
            f"params: {name} is {given.get(name, 'missing')}, the model's is "
            f"{shapes.get(name, 'none')}: give the parameters of this model"
        )
    sources = [] if tokenizer is None else [tokenizer]
    with new_folder(
        path, command="save_pretrained", sources=sources, overwrite=overwrite, last=MODEL_CONFIG
    ) as folder:
        write_model(folder, model.config, params)
        if tokenizer is not None:
            copy_folder(tokenizer_copy(tokenizer), folder / TOKENIZER)
