"""The token mixers by their names."""

from mmfree_jax.mixer_pattern import MixerName
from mmfree_jax.model import attention, hgrn2, mingru, mlgru, rglru, rwkv4
from mmfree_jax.model.mixer import Mixer

MIXERS: dict[MixerName, Mixer] = {
    "mlgru": mlgru.MIXER,
    "attention": attention.MIXER,
    "rwkv4": rwkv4.MIXER,
    "mingru": mingru.MIXER,
    "rglru": rglru.MIXER,
    "hgrn2": hgrn2.MIXER,
}
