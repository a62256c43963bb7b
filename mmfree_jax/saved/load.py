"""Loading the model of a training run: its config, and the parameters of a checkpoint."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from mmfree_jax.config import ModelConfig
from mmfree_jax.errors import CheckpointError
from mmfree_jax.model import LanguageModel
from mmfree_jax.model.parameters import flatten, param_shapes
from mmfree_jax.model.weights import Params, Weights
from mmfree_jax.saved import run_directory as run_dir
from mmfree_jax.saved import run_model
from mmfree_jax.saved.packed import is_packed, load_packed


def is_run(path: str | os.PathLike[str]) -> bool:
    """Whether `path` is the folder of a training run."""
    return (Path(path) / run_dir.CONFIG).is_file()


def load_run(
    path: str | os.PathLike[str], *, step: int | None = None, mesh: Mesh | None = None
) -> tuple[LanguageModel, dict[str, Any]]:
    """The model of a run directory and its parameters; the optimiser's state is not read.

    Args:
      path: the run directory.
      step: of the checkpoint; None: the newest that is whole.
      mesh: to lay the parameters out on by the sharding table; None: the default device.

    Raises:
      ConfigError: the folder has no config.
      CheckpointError: it has no such checkpoint, none is whole, or its shapes are not the
        config's.
    """
    config = run_dir.load_config(Path(path)).model
    folder = run_model.find_checkpoint(Path(path), step)
    return LanguageModel(config), run_model.read_params(folder, param_shapes(config), mesh)


def run_leaves(
    path: str | os.PathLike[str], *, step: int | None = None
) -> tuple[ModelConfig, Callable[[tuple[str, ...]], jax.Array]]:
    """The config of a run and a function that reads one of its parameters at a time.

    Args and errors as `load_run`.
    """
    config = run_dir.load_config(Path(path)).model
    folder = run_model.find_checkpoint(Path(path), step)
    shapes = param_shapes(config)

    def load(names: tuple[str, ...]) -> jax.Array:
        name = "/".join(names)
        return flatten(run_model.read_params(folder, {name: shapes[name]}, None))[name]

    return config, load


def load_model(
    path: str | os.PathLike[str], *, mesh: Mesh | None = None
) -> tuple[LanguageModel, Params | Weights]:
    """A model from a packed folder, a run directory or a Hugging Face folder, for decoding.

    Raises:
      CheckpointError: the folder is missing or holds no model.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"model {folder} is not a folder: give a run directory or a model")
    if is_packed(folder):
        return load_packed(folder)
    if is_run(folder):
        return load_run(folder, mesh=mesh)
    # Here, because interop itself imports this module.
    from mmfree_jax.saved.pretrained import load_pretrained

    return load_pretrained(folder, mesh=mesh)


def folder_leaves(
    path: str | os.PathLike[str],
) -> tuple[ModelConfig, Callable[[tuple[str, ...]], jax.Array]]:
    """The config of a model folder or Hugging Face folder, and a reader of one parameter at a time.

    Raises:
      ConfigError: the folder's config is missing, malformed or not implemented.
      CheckpointError: the folder is missing; from the reader also: tensors of the parameter are
        missing, misshapen or damaged, or the folder holds some that the model does not have.
    """
    # Here, because interop itself imports this module.
    from mmfree_jax.saved import huggingface
    from mmfree_jax.saved import pretrained as folders
    from mmfree_jax.saved.tensors import Slot, TensorFolder, read_params, refuse_pickled

    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"model {folder} is not a folder: give a run directory or a model")
    refuse_pickled(folder)
    config = folders.model_config(folder)
    shapes = param_shapes(config)
    if (folder / folders.MODEL_CONFIG).is_file():
        stem, tied = folders.PARAMS, False
        mapping = {name: (Slot(name, shape.shape),) for name, shape in shapes.items()}
    else:
        stem, tied = "model", huggingface.read_config(folder).tied
        mapping = huggingface.tensor_map(config, tied=tied)

    def known(name: str) -> bool:
        return name in mapping or huggingface.known_extra(name, tied=tied)

    def load(names: tuple[str, ...]) -> jax.Array:
        wanted = "/".join(names)
        slots = {
            name: tuple(slot for slot in found if slot.path == wanted)
            for name, found in mapping.items()
        }
        slots = {name: found for name, found in slots.items() if found}
        with TensorFolder(folder, stem) as tensors:
            leaf: Any = read_params(tensors, slots, {wanted: shapes[wanted]}, ignore=known)
        for name in names:
            leaf = leaf[name]
        return leaf

    return config, load


def find_tokenizer(path: str | os.PathLike[str]) -> Path | None:
    """Where a model's folder keeps its tokenizer: `tokenizer/`, or files beside the weights."""
    folder = Path(path)
    if (folder / run_dir.TOKENIZER).is_dir():
        return folder / run_dir.TOKENIZER
    for name in ("tokenizer.json", "tokenizer.model"):
        if (folder / name).is_file():
            return folder / name
    return None
