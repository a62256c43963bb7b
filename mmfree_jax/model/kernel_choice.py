"""Whether the kernels that a config names run on these devices."""

import dataclasses
from typing import Any

from mmfree_jax.errors import ConfigError
from mmfree_jax.model_config import ModelConfig

_NEEDS = {
    "pallas_mosaic_gpu": "gpu",
    "pallas_triton": "gpu",
    "pallas_gpu": "gpu",
    "cudnn": "gpu",
    "pallas_tpu": "tpu",
}
_FIELDS = ("matmul_kernel", "recurrence_kernel", "attention_kernel")


def _foreign(config: ModelConfig, platform: str) -> dict[str, Any]:
    """The fields that name a kernel of another platform, with their values."""
    values = {name: getattr(config, name) for name in _FIELDS}
    return {name: v for name, v in values.items() if _NEEDS.get(v, platform) != platform}


def check_kernels(config: ModelConfig, platform: str) -> None:
    """Refuses a kernel that the devices cannot run.

    Args:
      config: of the model.
      platform: of the devices, as JAX names it: cpu, gpu or tpu.

    Raises:
      ConfigError: names the field.
    """
    for name, value in _foreign(config, platform).items():
        raise ConfigError(
            f"model.{name} is {value!r}, which needs a {_NEEDS[value].upper()}, and these devices "
            f"are of kind {platform}: leave it out, for the fastest known here"
        )


def without_foreign_kernels(config: ModelConfig, platform: str) -> ModelConfig:
    """`config` with the fastest kernels known where it names those of another platform.

    A run names what it was trained with; the same weights compute the same elsewhere.
    """
    return dataclasses.replace(config, **dict.fromkeys(_foreign(config, platform)))
