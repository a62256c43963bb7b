"""Starting a run from a model in any folder (`--init-from`)."""

import dataclasses
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mmfree_jax.config import TrainConfig
from mmfree_jax.data.dataset import check_compatible
from mmfree_jax.data.row_source import RowSource
from mmfree_jax.errors import CheckpointError, ConfigError
from mmfree_jax.model.weights import Master
from mmfree_jax.model_config import RUN_SETTINGS, ModelConfig
from mmfree_jax.saved.manifest import read_manifest
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.train.same_run import other_model


def training_config(path: str | os.PathLike[str], base: ModelConfig) -> ModelConfig:
    """The config to train a model on from a folder: the model there, run and kept as in `base`.

    Raises:
      ConfigError, CheckpointError: as `open_model`.
    """
    kept = {name: getattr(base, name) for name in RUN_SETTINGS}
    return dataclasses.replace(open_model(path).config, **kept)


def initial_params(
    path: str | os.PathLike[str],
    config: TrainConfig,
    mesh: Mesh | None = None,
    data: Sequence[RowSource] = (),
) -> dict[str, Any]:
    """Parameters with which to start training from a model in any folder.

    Args:
      path: as `open_model` takes it; not a packed model, which has no master weights.
      config: of the new run; its model must have the loaded model's parameters.
      mesh: of the new run.
      data: of the new run; a run's checkpoint says by which tokenizer its data was made, another
        folder need not have the very file.

    Raises:
      ConfigError: the two models differ; the message names the fields.
      DataError: the model is a run's, and the data was made with another tokenizer.
      CheckpointError: as `open_model`, or a packed model.
    """
    saved = open_model(path)
    if saved.kind == "packed":
        raise CheckpointError(
            f"init_from {path} is a packed model, which has no master weights: give the run or "
            "model folder that it was made from"
        )
    differing = other_model(saved.config, config.model)
    if differing:
        raise ConfigError(
            f"init_from {path} holds another model ({'; '.join(differing)}): leave out what "
            "sets these fields, as --init-from takes them from there"
        )
    if data and (checkpoint := saved.checkpoint()) is not None:
        identity = read_manifest(checkpoint).data["tokenizer"]
        for dataset in data:
            check_compatible(dataset, identity=identity, owner=f"init_from {path}")
    weights = saved.weights("master", mesh)
    assert isinstance(weights, Master)
    dtype = jnp.dtype(config.model.param_dtype)
    return jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), weights.params)
