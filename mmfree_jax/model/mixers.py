"""The token mixers by their names."""

from mmfree_jax.model import attention, mingru, mlgru, rglru, rwkv4
from mmfree_jax.model.mixer import Mixer
from mmfree_jax.model_config import ModelConfig

MIXERS: dict[str, Mixer] = {
    "mlgru": mlgru.MIXER,
    "attention": attention.MIXER,
    "rwkv4": rwkv4.MIXER,
    "mingru": mingru.MIXER,
    "rglru": rglru.MIXER,
}


def mixer_of(config: ModelConfig) -> Mixer:
    """The token mixer of a model."""
    return MIXERS[config.mixer]
