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
from mmfree_jax.files import sha256
from mmfree_jax.model.weights import Master
from mmfree_jax.model_config import RUN_SETTINGS, ModelConfig
from mmfree_jax.saved.checkpoint_files import read_manifest_bytes
from mmfree_jax.saved.manifest import read_manifest
from mmfree_jax.saved.open_model import open_model
from mmfree_jax.train.same_run import other_model


def training_config(
    path: str | os.PathLike[str], base: ModelConfig, begun: ModelConfig | None = None
) -> ModelConfig:
    """The config to train a model on from a folder: the model there, run and kept as in `base`.

    Args:
      path: as `open_model` takes it.
      base: has the settings that are no part of the model.
      begun: of the run that has begun from there; it goes on also where the folder is gone.

    Raises:
      ConfigError, CheckpointError: as `open_model`.
    """
    kept = {name: getattr(base, name) for name in RUN_SETTINGS}
    return dataclasses.replace(open_model(path).config if begun is None else begun, **kept)


def initial_params(
    path: str | os.PathLike[str],
    config: TrainConfig,
    mesh: Mesh | None = None,
    data: Sequence[RowSource] = (),
) -> tuple[dict[str, Any], str]:
    """Parameters with which to start training from a model in any folder, and what they are.

    Args:
      path: as `open_model` takes it; not a packed model, which has no master weights.
      config: of the new run; its model must have the loaded model's parameters.
      mesh: of the new run.
      data: of the new run; a run's checkpoint says by which tokenizer its data was made, another
        folder need not have the very file.

    Returns:
      The parameters, and a line that says of which model they are; of a run, of which step.

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
    account = f"weights of {path}"
    if (checkpoint := saved.checkpoint()) is not None:
        manifest = read_manifest(checkpoint)
        for dataset in data:
            check_compatible(
                dataset, identity=manifest.data["tokenizer"], owner=f"init_from {path}"
            )
        digest = sha256(read_manifest_bytes(checkpoint))
        account += f" at step {manifest.step} (SHA-256 of the checkpoint's manifest: {digest})"
    weights = saved.weights("master", mesh)
    assert isinstance(weights, Master)
    dtype = jnp.dtype(config.model.param_dtype)
    params = jax.tree.map(lambda x: x if x.dtype == dtype else x.astype(dtype), weights.params)
    return params, account
