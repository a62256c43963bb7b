"""One door for every folder that holds a model."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmfree_jax.config import NOT_THE_FUNCTION, ModelConfig, TrainConfig
from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import flatten, param_shapes, unflatten
from mmfree_jax.model.weights import Ternary
from mmfree_jax.parallel.sharding import param_shardings
from mmfree_jax.saved import huggingface
from mmfree_jax.saved.tensors import Slot, TensorFolder, read_params, refuse_pickled

MODEL_CONFIG = "model.yaml"
PARAMS = "params"


def load_pretrained(
    path: str | os.PathLike[str], *, compute_dtype: Any = None, mesh: Mesh | None = None
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model in a folder and its parameters: `model.apply({"params": params}, tokens)`.

    Args:
      path: a run directory; a model folder (`mmfree import-hf`); a packed model (`mmfree
        pack`); or a Hugging Face folder of `model_type` hgrn_bit or llama with
        `model.safetensors` or its sharded index.
      compute_dtype: dtype of activations ("float32", "bfloat16", "float16" or a dtype). None:
        as the run was trained; float32 for Hugging Face folders.
      mesh: to lay the weights out on by the sharding table, each device reading only its own
        part; None: all on the default device.

    Returns:
      The model and its parameters. A packed model has no master weights: its ternary ones come
      as the weights that ternarise to its trits and scales. `mmfree_jax.infer.load_model` keeps
      it packed.

    Raises:
      ConfigError: the folder's config is missing, malformed or asks for something that is not
        implemented.
      CheckpointError: the weights are missing, damaged, pickled, or do not fit the config; all
        tensors that do not fit are listed.
    """
    folder = Path(path)
    refuse_pickled(folder)
    if not folder.is_dir():
        raise CheckpointError(
            f"{folder} is no folder: give a run directory, a model folder or a Hugging Face folder"
        )
    from mmfree_jax.saved.load import is_run, load_run
    from mmfree_jax.saved.packed import is_packed

    if is_packed(folder):
        model, params = _load_packed(folder, mesh)
    elif is_run(folder):
        model, params = load_run(folder, mesh=mesh)
    elif (folder / MODEL_CONFIG).is_file():
        model, params = _load_model_folder(folder, mesh)
    elif huggingface.is_huggingface(folder):
        model, params = _load_huggingface(folder, mesh)
    else:
        raise CheckpointError(
            f"{folder} holds no model: it has no config.yaml (run directory), no {MODEL_CONFIG} "
            f"(model folder), no packed.safetensors (packed model) and no {huggingface.CONFIG} "
            "(Hugging Face folder)"
        )
    return LanguageModel(_with_dtype(model.config, compute_dtype)), params


def model_config(path: str | os.PathLike[str]) -> ModelConfig:
    """The config of the model in a folder, weights unread. Args and errors as `load_pretrained`."""
    from mmfree_jax.saved.load import is_run
    from mmfree_jax.saved.packed import is_packed, open_packed
    from mmfree_jax.saved.run_directory import load_config

    folder = Path(path)
    if is_packed(folder):
        return open_packed(folder)[1]
    if is_run(folder):
        return load_config(folder).model
    if (folder / MODEL_CONFIG).is_file():
        return _read_model_config(folder)
    return huggingface.read_config(folder).config


def training_config(path: str | os.PathLike[str], base: ModelConfig) -> ModelConfig:
    """The config to train a model on from a folder: the model there, run and kept as in `base`.

    Raises:
      ConfigError, CheckpointError: as `load_pretrained`.
    """
    kept = {name: getattr(base, name) for name in NOT_THE_FUNCTION}
    return dataclasses.replace(model_config(path), **kept)


def initial_params(
    path: str | os.PathLike[str], config: TrainConfig, mesh: Mesh | None = None
) -> dict[str, Any]:
    """Parameters with which to start training from a model in any folder.

    Args:
      path: as `load_pretrained` takes it; not a packed model, which has no master weights.
      config: of the new run; its model must have the loaded model's parameters.
      mesh: of the new run.

    Raises:
      ConfigError: the two models differ; the message names the fields.
      CheckpointError: as `load_pretrained`, or a packed model.
    """
    from mmfree_jax.saved.packed import is_packed

    if is_packed(path):
        raise CheckpointError(
            f"init_from {path} is a packed model, which has no master weights: give the run or "
            "model folder that it was made from"
        )
    model, params = load_pretrained(path, mesh=mesh)
    differing = []
    for field in dataclasses.fields(ModelConfig):
        old, new = getattr(model.config, field.name), getattr(config.model, field.name)
        if field.name == "intermediate_size":
            old, new = model.config.glu_size, config.model.glu_size
        elif field.name == "num_heads" and config.model.mixer == "attention":
            old, new = model.config.attention_heads, config.model.attention_heads
        if field.name not in NOT_THE_FUNCTION and old != new:
            differing.append(f"model.{field.name} is {new!r}, there {old!r}")
    if differing:
        raise ConfigError(
            f"init_from {path} holds another model ({'; '.join(differing)}): set these fields "
            "as they are there"
        )
    dtype = jnp.dtype(config.model.param_dtype)
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), params)


def _with_dtype(config: ModelConfig, compute_dtype: Any) -> ModelConfig:
    if compute_dtype is None:
        return config
    try:
        name = jnp.dtype(compute_dtype).name
    except TypeError:
        name = str(compute_dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise ConfigError(
            f"compute_dtype is {name!r}: choose one of float32, bfloat16, float16, or None"
        )
    return dataclasses.replace(config, compute_dtype=name, residual_dtype=name)  # type: ignore[arg-type]


def _load_huggingface(folder: Path, mesh: Mesh | None) -> tuple[LanguageModel, dict[str, Any]]:
    found = huggingface.read_config(folder)
    with TensorFolder(folder) as tensors:
        params = read_params(
            tensors,
            huggingface.tensor_map(found.config, tied=found.tied),
            param_shapes(found.config),
            mesh=mesh,
            ignore=lambda name: huggingface.known_extra(name, tied=found.tied),
        )
    return LanguageModel(found.config), params


def _load_packed(folder: Path, mesh: Mesh | None) -> tuple[LanguageModel, dict[str, Any]]:
    from mmfree_jax.saved.packed import load_packed

    model, weights = load_packed(folder, keep_packed=False)
    assert isinstance(weights, Ternary)
    params, trits = flatten(weights.params), flatten(weights.ternary)
    for name in [n for n in trits if n.endswith("/trits")]:
        layer = name.removesuffix("/trits")
        params[f"{layer}/weight"] = _unternarize(trits[name], trits[f"{layer}/scale"])
    shapes = param_shapes(model.config)
    # The bfloat16 of stored norms widens without loss.
    params = {name: params[name].astype(shape.dtype) for name, shape in shapes.items()}
    tree = unflatten(params)
    if mesh is not None:
        tree = jax.device_put(tree, param_shardings(mesh, tree))
    return model, tree


@jax.jit
def _unternarize(trits: jax.Array, scale: jax.Array) -> jax.Array:
    """Weights whose absmean is `scale` and which round to `trits`: s t / (share that is not 0)."""
    filled = jnp.mean(jnp.abs(trits.astype(jnp.float32)), axis=(-2, -1), keepdims=True)
    return trits * (scale / jnp.maximum(filled, 1e-9))


def _read_model_config(folder: Path) -> ModelConfig:
    file = folder / MODEL_CONFIG
    return from_dict(ModelConfig, read_yaml(file))


def _load_model_folder(folder: Path, mesh: Mesh | None) -> tuple[LanguageModel, dict[str, Any]]:
    config = _read_model_config(folder)
    shapes = param_shapes(config)
    mapping = {path: (Slot(path, shape.shape),) for path, shape in shapes.items()}
    with TensorFolder(folder, PARAMS) as tensors:
        return LanguageModel(config), read_params(tensors, mapping, shapes, mesh=mesh)


def model_folder_config(config: ModelConfig) -> str:
    """The text of a model folder's `model.yaml`."""
    return dump_yaml(config)
