"""Which models are exported."""

from mmfree_jax.errors import ConfigError
from mmfree_jax.model.packing import can_pack
from mmfree_jax.model_config import ModelConfig


def check_supported(config: ModelConfig) -> None:
    """Refuses what is not exported.

    Raises:
      ConfigError: names the setting.
    """
    if config.mixer != "mlgru":
        raise ConfigError(
            f"model.mixer is {config.mixer!r}: only MatMul-free models with mixer mlgru are "
            "exported; for a Transformer++ use `mmfree export-hf` and its own tools"
        )
    if not config.as_released:
        raise ConfigError(
            f"{' and '.join(config.unreleased)}: only the MLGRU of the released models, and its "
            "GLU, is exported; train one without this setting"
        )
    if config.short_conv:
        raise ConfigError(
            f"model.short_conv is {config.short_conv}: models with short convolutions are not "
            "exported; train one without: --model.short-conv 0"
        )
    if not can_pack(config):
        raise ConfigError(
            f"the model is a {config.family} whose linear layers are not all BitLinear: only "
            "models that are MatMul-free throughout are exported"
        )
