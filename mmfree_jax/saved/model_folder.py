"""A model folder of ours: `model.yaml`, `params*.safetensors`, and `tokenizer/` if there is one."""

from pathlib import Path
from typing import Any

import numpy as np

from mmfree_jax.config_io import dump_yaml, from_dict, read_yaml
from mmfree_jax.files import write_text
from mmfree_jax.model.parameters import flatten
from mmfree_jax.model_config import ModelConfig
from mmfree_jax.saved.kinds import MODEL_CONFIG
from mmfree_jax.saved.writing import StoredTensor, write_tensors

PARAMS = "params"


def read_config(folder: Path) -> ModelConfig:
    """The config of the model.

    Raises:
      ConfigError: it cannot be read, or a field is unknown or malformed.
    """
    return from_dict(ModelConfig, read_yaml(folder / MODEL_CONFIG))


def write_model(folder: Path, config: ModelConfig, params: dict[str, Any]) -> None:
    """Writes a config and its parameters, in float32, into a folder that exists."""
    write_text(folder / MODEL_CONFIG, dump_yaml(config))
    write_tensors(
        folder,
        (
            StoredTensor(name, x.shape, np.float32, lambda x=x: np.asarray(x))
            for name, x in flatten(params).items()
        ),
        stem=PARAMS,
    )
